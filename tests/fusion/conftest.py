from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before counts as compiled, and nothing compiled here stays."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
