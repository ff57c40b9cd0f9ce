"""Pre-activation networks: how the summands of a block's output pass from module to module.

In these networks a block ends in ``out + shortcut`` and the next one begins with ``relu(bn(x))``, while the sum itself
goes on as the identity path. A block that takes part gets a second forward, ``_fusedres_operands(self, x, residual)``:
what the block computes of ``x + residual``, as a pair of summands where it ends in an addition. Its parent passes the
pair of one block to the next (see :mod:`fusedres.fusion.pairs`), and so does the parent's own second forward to its
siblings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.pairs import is_apart
from fusedres.fusion.rewriting import Call
from fusedres.fusion.runtime import FORK, POOL
from fusedres.nn import SyncBatchNormAct

# What makes a value: the path of a child, and of its calls which, counted from 0.
Maker = tuple[str, int]


@dataclass(frozen=True)
class Forks:
    """How a block ends the values that it makes (see :mod:`fusedres.fusion.forks`). BatchNorms go by their paths too.

    Attributes:
        takes: whether two readers of its input may have a name each.
        gives: what makes the output, and can end it as it is asked; ``None`` where nothing can.
        pools: whether that can be by averaging.
        links: what in the forward makes which value, and how that ends.
        asks: the children of which a second forward is called.
    """

    takes: bool = False
    gives: Maker | None = None
    pools: bool = False
    links: tuple[tuple[Maker, str], ...] = ()
    asks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Chain:
    """How a block passes pairs on. Children and BatchNorms go by their paths; ``""`` is an addition of the block's own.

    Attributes:
        takes: what adds the residual to the block's input; ``None`` where it is added before the block begins.
        gives: whose summands are the output; ``None`` where the output is no pair.
        links: from what to what pairs are passed inside of the block.
        forks: what it does with other values.
    """

    takes: str | None = None
    gives: str | None = None
    links: tuple[tuple[str, str], ...] = ()
    forks: Forks = Forks()


NATIVE = Chain(takes="bn1", gives="")  # the blocks of fusedres.nn


def merge_forks(training: Forks, evaluation: Forks) -> Forks:
    """What holds in both modes."""
    gives = training.gives if training.gives == evaluation.gives else None
    return Forks(
        training.takes and evaluation.takes,
        gives,
        gives is not None and training.pools and evaluation.pools,
        tuple(link for link in training.links if link in evaluation.links),
        training.asks | evaluation.asks,
    )


def calls_by_end(chains: Mapping[nn.Module, Chain]) -> dict[tuple[nn.Module, Maker], str]:
    """The calls of BatchNorms, by their blocks, that do not end in writing a value once; nobody watches on the way.

    Those of a block that is called more than once are in it if all of them end so.
    """

    def made_by(block: nn.Module, maker: Maker) -> tuple[nn.Module, Maker] | None:
        part = block.get_submodule(maker[0])
        if isinstance(part, _BatchNorm):
            return None if isinstance(part, SyncBatchNormAct) else (block, maker)
        chain = chains.get(part)
        if chain is None or chain.forks.gives is None or is_apart(part):
            return None
        return made_by(part, chain.forks.gives)

    found: dict[tuple[nn.Module, Maker] | None, set[str]] = {}
    for block, chain in chains.items():
        for maker, kind in chain.forks.links:
            found.setdefault(made_by(block, maker), set()).add(kind)
    return {call: kinds.pop() for call, kinds in found.items() if call is not None and len(kinds) == 1}


def with_ends(calls: Iterable[Call], ends: Mapping[Maker, str]) -> list[Call]:
    """The ``calls`` of a forward, saying which of them end otherwise than by writing a value once."""
    found: list[Call] = []
    for call in calls:
        place = sum(other.module == call.module and other.pattern != "print" for other in found)
        end = ends.get((call.module, place)) if call.pattern != "print" else None
        pattern = f"{call.pattern}_avgpool" if end == POOL else call.pattern
        found.append(replace(call, pattern=pattern, forks=end == FORK))
    return found


def norms_that_add(chains: Mapping[nn.Module, Chain]) -> set[nn.Module]:
    """The BatchNorms to which pairs are passed, where nobody watches the blocks on the way."""

    def gives(block: nn.Module) -> bool:
        chain = chains.get(block)
        if chain is None or chain.gives is None or is_apart(block):
            return False
        return not chain.gives or gives(block.get_submodule(chain.gives))

    def taker(part: nn.Module) -> nn.Module | None:
        chain = chains.get(part)
        if chain is None or isinstance(part, _BatchNorm):
            return part if isinstance(part, _BatchNorm) else None
        return None if chain.takes is None or is_apart(part) else taker(part.get_submodule(chain.takes))

    links = [(block, *link) for block, chain in chains.items() for link in chain.links]
    takers = (
        taker(block.get_submodule(target))
        for block, source, target in links
        if not source or gives(block.get_submodule(source))
    )
    return {norm for norm in takers if norm is not None}
