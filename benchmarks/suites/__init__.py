"""The suites by name."""

from __future__ import annotations

from benchmarks.suites import compile_study, memory, probe, timed, train

SUITES = {
    suite.name: suite for suite in (*timed.TIMED_SUITES, memory.SUITE, compile_study.SUITE, probe.SUITE, train.SUITE)
}
ALL = tuple(name for name in SUITES if name not in ("probe", "train"))  # in this order
