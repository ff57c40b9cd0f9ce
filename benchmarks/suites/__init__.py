"""The suites by name."""

from __future__ import annotations

from benchmarks.suite import Suite

SUITES: dict[str, Suite] = {}
ALL: tuple[str, ...] = ()  # what `all` measures, in this order
