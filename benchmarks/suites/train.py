"""Digits training as rows: eager runs with different summation orders, the fused run, and interpreted kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.suites import digits
from benchmarks.suites.digits import Curve, Recipe
from benchmarks.environment import describe
from benchmarks.results import Row

ACCURACY = 0.97  # held out; every full run must exceed it
INTERPRETED_BATCH = 16


def run(interpreted_steps: int) -> Iterator[tuple[Row, Curve]]:
    """Rows and curves; the interpreted run is compared with eager runs of its own, smaller recipe."""
    recipe = Recipe()
    eager = digits.eager_runs(recipe)
    for name, curve in eager.items():
        yield _row(f"eager, {name}", "eager", recipe, curve, None), curve
    curve = digits.fused_run(recipe)
    yield _row("fusedres", "reference", recipe, curve, digits.agreement(curve, eager)), curve
    if interpreted_steps:
        short = replace(recipe, batch=INTERPRETED_BATCH, steps=interpreted_steps)
        curve = digits.interpreted_run(short)
        verdict = digits.agreement(curve, digits.eager_runs(short))
        yield _row("fusedres, first steps", "kernels, interpreted", short, curve, verdict), curve


def _row(name: str, path: str, recipe: Recipe, curve: Curve, verdict: digits.Agreement | None) -> Row:
    full = recipe.steps is None
    right = (verdict is None or verdict.ok) and (not full or curve.accuracy > ACCURACY)
    figures: dict[str, float | None] = {
        "steps": float(len(curve.losses)),
        "loss": curve.losses[-1],
        "accuracy": curve.accuracy if full else None,
        "difference": None if verdict is None else verdict.difference,
        "allowed": None if verdict is None else verdict.allowed,
    }
    check = {"ok": right, "losses": [float(f"{loss:.8g}") for loss in curve.losses]}
    return Row(
        "train", "digits", "training", name, [recipe.batch, 1, 8, 8], "float32", path, "ok" if right else "WRONG",
        figures, check, environment=describe(torch.device("cpu")),
    )  # fmt: skip
