"""The suites by name."""

from __future__ import annotations

from benchmarks.suites import codegen, compile_study, host, memory, timed, traffic, traffic_network, train

SUITES = {
    suite.name: suite
    for suite in (
        *timed.TIMED_SUITES, memory.SUITE, traffic.SUITE, traffic_network.SUITE, codegen.SUITE, host.SUITE,
        compile_study.SUITE, train.SUITE,
    )
}  # fmt: skip
ALL = tuple(name for name in SUITES if name not in ("network", "codegen", "compile-study", "train"))  # in this order
