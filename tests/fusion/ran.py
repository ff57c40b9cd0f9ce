"""Which calls of BatchNorms a forward made, and what was fused with each: what explain's rows are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fusedres
from fusedres import reference
from fusedres.functional import Norm

Rows = Counter[tuple[str, str, str]]  # module, pattern, path


def _ours(kwargs: dict[str, Any]) -> str:
    return f"bn{'_add' * (kwargs.get('residual') is not None)}{'_act' * (kwargs.get('act') is not None)}"


# How many arguments are activations, what the call is named, and its path.
FUNCTIONS: dict[tuple[Any, str], tuple[int, Callable[[dict[str, Any]], str], str]] = {
    (reference, "normalise"): (1, _ours, "reference"),
    (reference, "add_normalise"): (2, lambda kwargs: f"add_{_ours(kwargs)}", "reference"),
    (reference, "batch_norm_act_conv2d"): (1, _ours, "reference"),
    (reference, "add_batch_norm_act_conv2d"): (2, lambda kwargs: f"add_{_ours(kwargs)}", "reference"),
    (reference, "normalise_max_pool2d"): (1, lambda kwargs: f"{_ours(kwargs)}_maxpool", "reference"),
    (reference, "batch_norm_act_global_avg_pool2d"): (1, lambda kwargs: f"{_ours(kwargs)}_avgpool", "reference"),
    (reference, "batch_norm_add_batch_norm_act"): (2, lambda kwargs: f"bn_add_{_ours(kwargs)}", "reference"),
    (F, "batch_norm"): (1, lambda kwargs: "bn", "eager"),
}


def said(model: nn.Module) -> Rows:
    """The rows of explain."""
    rows = fusedres.explain(model).rows
    return Counter((row["module"], row["pattern"], row["path"]) for row in rows if row["pattern"] != "print")


@contextmanager
def ran(model: nn.Module) -> Iterator[Rows]:
    """The calls on the reference path, and eager ones; modules are known by their tensors."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    names = {
        tensor.data_ptr(): name
        for name, norm in norms.items()
        for tensor in (*norm.parameters(recurse=False), *norm.buffers(recurse=False))
    }
    rows: Rows = Counter()
    inside: list[str] = []  # of a function of ours

    def recorded(function: Callable[..., Any], first: int, pattern: Callable[[dict[str, Any]], str], path: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            given = [*args[first:], *kwargs.values()]
            given += [item for state in given if isinstance(state, Norm) for item in state]
            tensors = [arg for arg in given if isinstance(arg, Tensor)]
            if not inside:
                rows[next(names[t.data_ptr()] for t in tensors if t.data_ptr() in names), pattern(kwargs), path] += 1
            inside.append(path)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return record

    patches = [
        mock.patch.object(owner, name, recorded(getattr(owner, name), *how)) for (owner, name), how in FUNCTIONS.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield rows
    finally:
        for patch in patches:
            patch.stop()


def assert_true(model: nn.Module, *inputs: Tensor, uncalled: frozenset[str] = frozenset()) -> None:
    """Every call has its row and every row its call, in both modes, but for those of ``uncalled`` modules."""
    expected = Counter({row: count for row, count in said(model).items() if row[0] not in uncalled})
    for training in (True, False):
        with ran(model.train(training)) as rows:
            model(*inputs)
        assert rows == expected, training
