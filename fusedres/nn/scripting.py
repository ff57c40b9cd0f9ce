"""TorchScript is refused, for it knows neither keyword-only arguments nor the operators."""

from __future__ import annotations

from typing import Any


class Unscriptable:
    """Mixed into modules that ``torch.jit.script`` cannot compile, so that it says so."""

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}, which is fused: script the model before fuse or "
            "after unfuse, or use torch.export or torch.jit.trace"
        )
