"""The suites by name."""

from __future__ import annotations

from benchmarks.suites import timed, train

SUITES = {suite.name: suite for suite in (*timed.TIMED_SUITES, train.SUITE)}
ALL = tuple(name for name in SUITES if name != "train")  # in this order
