"""The README's timings: speeds over eager on each GPU and on a CPU."""

from __future__ import annotations

from benchmarks.reporting.markdown import (
    CASE,
    Column,
    case,
    fold,
    listing,
    pivot,
    speed,
    spread,
    where,
)
from benchmarks.reporting.report import Report
from benchmarks.results import Row
from benchmarks.workloads import TIMED

TIMES = (
    Column("ms", "ms"), Column("ms q1", "ms_q1"), Column("ms q3", "ms_q3"), Column("forward ms", "forward_ms"),
    Column("backward ms", "backward_ms"), Column("speedup", "speedup", ".2f"), Column("from", "speedup_low", ".2f"),
    Column("to", "speedup_high", ".2f"), Column("samples/s", "samples_per_s"), Column("GB/s", "gb_s"),
    Column("of copy bandwidth", "bandwidth_share", ".0%"), Column("TFLOP/s", "tflop_s"),
    Column("of matmul rate", "matmul_share", ".0%"), Column("peak MiB", "peak_mib", ".0f"),
    Column("host µs", "host_us"), Column("first step s", "first_step_s", ".3g"),
)  # fmt: skip
LISTED = 120  # rows; more make the README too long to be shown
SUMMARY = ("suite", "mode", "dtype")


def gpu(report: Report) -> str:
    """Timings on each GPU."""
    devices = sorted({device for device, suite in report.rows if suite in TIMED} - {"cpu"})
    return "## On a GPU\n\n" + "".join(timings(report, device) for device in devices) if devices else ""


def cpu(report: Report) -> str:
    """The same at reduced size."""
    if not any(("cpu", suite) in report.rows for suite in TIMED):
        return ""
    return (
        "## On a CPU, at reduced size\n\n"
        "**These are not GPU timings.** On a CPU fusedres takes its reference path, which is eager PyTorch, so\n"
        "about 1.0x over eager is expected; what the run shows is that every provider computes the same thing and\n"
        "what conversion costs. One thread.\n\n"
    ) + fold(timings(report, "cpu"), "CPU timings")


def timings(report: Report, device: str) -> str:
    """Of one device: a summary to see, every case to open."""
    suites = {suite: report.rows[device, suite] for suite in TIMED if (device, suite) in report.rows}
    rows = [row for some in suites.values() for row in some]
    text = (
        f"{where(rows)}\n\n"
        "Speed over eager (channels-last for images): the median over the cases and, in brackets, the slowest and the\n"
        "fastest one. Slower: the 95% interval, where there is one, lies below 1.\n\n"
        f"{pivot(rows, SUMMARY, _suite, spread)}\n"
    )
    for suite, some in suites.items():
        images = report.images(device, suite, f"{suite}: speed over eager")
        everything = (
            listing(some, TIMES)
            if len(some) <= LISTED
            else f"All figures are in `{report.folder}/{device}/{suite}.jsonl`.\n"
        )
        cases = f"{pivot(some, CASE, case, speed)}\n{images}\n{everything}"
        text += fold(cases, f"<code>{suite}</code>: {len(some)} measurements")
    return f"{text}\n"


def _suite(row: Row) -> tuple[str, ...]:
    return row.suite, row.mode, row.dtype
