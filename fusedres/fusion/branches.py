"""What rewritten forwards call to hand a value on under two names, or to have it averaged where it is made."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedres.fusion.pairs import is_chained
from fusedres.fusion.runtime import POOL, Ended, end

SECOND_FORWARD = "_fusedres_branches"


def branches(block: nn.Module, input: Tensor, fork: Tensor | None, ends: Any) -> Ended:
    """``block(input)``, ended as ``ends`` says; ``fork``, if any, is the name of ``input`` for its second reader."""
    # A tracer of another library's asks for the modules that are called.
    if isinstance(input, Tensor) and is_chained(block, SECOND_FORWARD):
        return block._fusedres_branches(input, input if fork is None else fork, ends)  # pyright: ignore[reportCallIssue]
    return end(block(input), ends)


def average_end(pool: Any) -> Any:
    """The end that is ``pool(value)``, an nn.AdaptiveAvgPool2d; itself where its output is larger than one pixel."""
    return POOL if pool.output_size in (1, (1, 1), [1, 1]) else pool
