"""The suites by name."""

from __future__ import annotations

from benchmarks.suites import compile_study, memory, timed, train

SUITES = {suite.name: suite for suite in (*timed.TIMED_SUITES, memory.SUITE, compile_study.SUITE, train.SUITE)}
ALL = tuple(name for name in SUITES if name != "train")  # in this order
