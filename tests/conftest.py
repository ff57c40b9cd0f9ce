"""Shared setup: kernels are interpreted where there is no GPU, and uninitialised memory is poisoned."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import torch
import torch.utils.deterministic

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any test module

import pytest  # noqa: E402

from benchmarks.instruments.interpreter import fast_interpreter  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    with fast_interpreter():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also tests marked slow: the whole zoo, compile studies")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        elif HAS_GPU and _interprets(item):
            item.add_marker(pytest.mark.skip(reason="kernels are compiled here, not interpreted"))


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays, and needs no walk at every collection


def _interprets(item: pytest.Item) -> bool:
    """Whether its kernels are to run on CPU tensors."""
    fixtures = getattr(item, "fixturenames", ())
    return "triton_backend" in fixtures and "device" not in fixtures and not item.get_closest_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels of this session run: compiled on a GPU, else interpreted on the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """No silent fallback: the kernels, or an error."""
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are filled with NaN, so that an element which no kernel wrote fails the comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
