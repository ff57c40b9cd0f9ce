"""What :func:`fusedres.fuse` is asked to do."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

FUSIONS = frozenset({"stem", "join", "fork", "head", "preact", "linear"})
SAVES = ("activations", "recompute")


@dataclass(frozen=True)
class Options:
    """Which of ``FUSIONS`` are left out, and which of ``SAVES`` is kept for the backward."""

    disable: frozenset[str] = frozenset()
    save: str = "activations"

    def allows(self, fusion: str) -> bool:
        return fusion not in self.disable


def make_options(disable: Collection[str], save: str) -> Options:
    """Of what a user passes.

    Raises:
        ValueError: an unknown fusion, or an unknown ``save``.
    """
    if isinstance(disable, str):
        raise ValueError(f"disable must be a collection of names, got {disable!r}")
    if unknown := sorted(set(disable) - FUSIONS):
        raise ValueError(f"disable must be of {sorted(FUSIONS)}, got {unknown}")
    if save not in SAVES:
        raise ValueError(f"save must be one of {SAVES}, got {save!r}")
    return Options(frozenset(disable), save)
