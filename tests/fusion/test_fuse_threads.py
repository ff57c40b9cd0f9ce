"""Several threads: a trace patches PyTorch and Python for all of them, and must not be noticed by the others."""

from __future__ import annotations

import builtins
import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fusedres
from fusedres.fusion import tracing
from tests import zoo
from tests.zoo import counts, images, randomise


@pytest.fixture
def during_a_trace(monkeypatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs an action in another thread while the forward of a block is traced in this one; its result."""

    def run(action: Callable[[], Any]) -> Any:
        reached, done, results = threading.Event(), threading.Event(), list[Any]()

        def act() -> None:
            assert reached.wait(60)
            try:
                results.append(action())
            except BaseException as error:
                results.append(error)
            done.set()

        class Held(tracing.FlatTracer):
            def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
                if kind == "call_module":
                    reached.set()
                    assert done.wait(60)
                return super().create_node(kind, *args, **kwargs)

        monkeypatch.setattr(tracing, "FlatTracer", Held)
        thread = threading.Thread(target=act)
        thread.start()
        assert counts(fusedres.fuse(zoo.ResBlock(4, 4))) == {"bn_act": 1, "bn_add_act": 1}
        thread.join()
        return results[0]

    return run


def test_other_models_run_during_a_trace(during_a_trace):
    model, x = randomise(zoo.HandBottleneck(8, 2)).eval(), images(2, 8, 5, 5)
    assert torch.equal(during_a_trace(lambda: model(x)), model(x))
    fused = fusedres.fuse(copy.deepcopy(model))
    torch.testing.assert_close(during_a_trace(lambda: fused(x)), model(x))


def test_other_threads_print_and_enter_autocast_during_a_trace(during_a_trace, capsys):
    def act() -> torch.dtype:
        print("printed")
        sys.stdout.write("written\n")
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype

    assert during_a_trace(act) is torch.bfloat16
    assert capsys.readouterr().out == "printed\nwritten\n"


def test_threads_that_fuse_at_once():
    def patched() -> list[Any]:
        names = [vars(nn.Module).get(name) for name in ("__getattribute__", "__getattr__", "__call__")]
        return [*names, sys.stdout, builtins.print, torch.cat, torch.autocast.__enter__]

    def act() -> None:
        model = zoo.ResBlock(4, 4)
        fusedres.explain(model, input=(2, 4, 5, 5))
        results.append(counts(fusedres.fuse(model)))

    before, results = patched(), list[dict[str, int]]()
    threads = [threading.Thread(target=act) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{"bn_act": 1, "bn_add_act": 1}] * 3
    assert all(one is other for one, other in zip(patched(), before, strict=True))
