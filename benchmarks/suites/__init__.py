"""The suites by name."""

from __future__ import annotations

from benchmarks.suites import probe, timed, train

SUITES = {suite.name: suite for suite in (*timed.TIMED_SUITES, train.SUITE, probe.SUITE)}
ALL = tuple(name for name in SUITES if name not in ("train", probe.NAME))  # in this order
