"""Digits training as rows: eager runs with different summation orders, the fused run, and interpreted kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from benchmarks.environment import describe
from benchmarks.results import Key, Row
from benchmarks.suite import CPU, Request, Suite
from benchmarks.suites import digits
from benchmarks.suites.digits import Curve, Recipe

ACCURACY = 0.97  # held out; every full run must exceed it
INTERPRETED_BATCH = 16
NAME = "digits"


@dataclass(frozen=True)
class Training:
    """All runs at once, since each is compared with the eager ones."""

    interpreted_steps: int
    workload: str = NAME

    @property
    def keys(self) -> list[Key]:
        runs = [(name, "eager", Recipe()) for name in map(_eager_name, digits.EAGER_RUNS)]
        runs.append(("fusedres", "reference", Recipe()))
        if self.interpreted_steps:
            runs.append(("fusedres, first steps", "kernels, interpreted", self.short))
        return [_row(name, path, recipe).key for name, path, recipe in runs]

    @property
    def short(self) -> Recipe:
        return replace(Recipe(), batch=INTERPRETED_BATCH, steps=self.interpreted_steps)


def plan(request: Request) -> list[Training]:
    return [Training(request.interpreted_steps)]


def run(request: Request, cases: Sequence[Training]) -> Iterator[Row]:
    """The interpreted run is compared with eager runs of its own, smaller recipe."""
    del request
    for case in cases:
        recipe = Recipe()
        eager = digits.eager_runs(recipe)
        for name, curve in eager.items():
            yield _measured(_row(_eager_name(name), "eager", recipe), recipe, curve, None)
        curve = digits.fused_run(recipe)
        yield _measured(_row("fusedres", "reference", recipe), recipe, curve, digits.agreement(curve, eager))
        if case.interpreted_steps:
            short = case.short
            curve = digits.interpreted_run(short)
            verdict = digits.agreement(curve, digits.eager_runs(short))
            yield _measured(_row("fusedres, first steps", "kernels, interpreted", short), short, curve, verdict)


def _eager_name(name: str) -> str:
    return f"eager, {name}"


def _row(name: str, path: str, recipe: Recipe) -> Row:
    return Row("train", NAME, "training", name, [recipe.batch, 1, 8, 8], "float32", path)


def _measured(row: Row, recipe: Recipe, curve: Curve, verdict: digits.Agreement | None) -> Row:
    full = recipe.steps is None
    right = (verdict is None or verdict.ok) and (not full or curve.accuracy > ACCURACY)
    row.status = "ok" if right else "WRONG"
    row.figures = {
        "steps": len(curve.losses),
        "loss": curve.losses[-1],
        "accuracy": curve.accuracy if full else None,
        "difference": None if verdict is None else verdict.difference,
        "allowed": None if verdict is None else verdict.allowed,
    }
    row.check = {"ok": right, "losses": [float(f"{loss:.8g}") for loss in curve.losses]}
    row.environment = describe(CPU)
    return row


def table(rows: Sequence[Row]) -> Table:
    shown = Table("run", "path", "steps", "final loss", "held-out accuracy", "furthest from eager", "allowed", "check")
    for row in rows:
        figures = {k: "" if v is None else f"{v:.4g}" for k, v in row.figures.items()}
        names = ("steps", "loss", "accuracy", "difference", "allowed")
        shown.add_row(row.provider, row.layout, *(figures[name] for name in names), row.status)
    return shown


SUITE = Suite("train", "loss curves on real images, eager against fused", plan, run, table, on_cpu=True)
