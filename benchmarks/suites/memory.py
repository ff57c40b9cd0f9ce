"""What a training step keeps in memory: bytes saved for the backward and, on a GPU, the peak.

Each model is measured in a process of its own. On a CPU that is with the kernels'
launchers at work, which allocate what they do on a GPU; the kernels themselves run, interpreted, for the check alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks.environment import describe
from benchmarks.errors import BenchmarkError
from benchmarks.instruments.interpreter import fast_interpreter, kernels_skipped
from benchmarks.instruments.saved import peak_bytes, saved_for_backward
from benchmarks.parity import first_line
from benchmarks.providers import BASELINE, EAGER, PROVIDERS, Instance, instantiate
from benchmarks.results import Key, Row
from benchmarks.suite import Request, Suite
from benchmarks.suites.subject import SUBJECTS, Subject, check
from benchmarks.workers import INTERPRETED, apart

GPU_PROVIDERS = (EAGER, BASELINE, "torch.compile", "fusedres", "fusedres + recompute", "fusedres + compile")
CPU_PROVIDERS = (EAGER, BASELINE, "fusedres", "fusedres + recompute")  # the C++ compiler takes minutes for a network
# What may be saved, of what eager saves in float32.
BUDGET = {
    ("resnet34", "fusedres"): 0.87,
    ("resnet34", "fusedres + recompute"): 0.72,
    ("resnet50", "fusedres + recompute"): 0.82,
}
CHECKED = {"cpu": 2, "cuda": 8}  # samples
HIDDEN = 0.01  # of what is saved; a GPU's allocator rounds up by less
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A training step of one model by each of ``providers``."""

    workload: str
    providers: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.workload]

    @property
    def baseline(self) -> str:
        return BASELINE if self.subject.channels_last else EAGER

    def layout(self, provider: str) -> str:
        if not self.subject.channels_last:
            return "contiguous"
        return "channels-last" if PROVIDERS[provider].channels_last else "NCHW"

    @property
    def keys(self) -> list[Key]:
        return [(self.workload, "training", p, self.shape, self.dtype, self.layout(p)) for p in self.providers]


def plan(request: Request) -> list[Case]:
    """Models at each batch and dtype, most telling first.

    Raises:
        BenchmarkError: a dtype that is not measured on a CPU.
    """
    device = request.device
    on_cpu = device.type == "cpu"
    dtypes = request.dtypes or (("float32",) if on_cpu or request.quick else ("bfloat16", "float32"))
    if on_cpu and dtypes != ("float32",):
        raise BenchmarkError(f"dtype {', '.join(dtypes)} is not measured on cpu; only float32 is")
    names = ("resnet34", "resnet50", "preact_resnet50", "residual_mlp")
    names = names[: 1 if on_cpu and request.quick else 2 if request.quick else None]
    batches = request.batches or ((8,) if on_cpu else (32,) if request.quick else (32, 128))
    return [
        Case(name, _entrants(request, SUBJECTS[name]), SUBJECTS[name].shape(batch, device), dtype, device.type)
        for dtype in dtypes
        for name in names
        for batch in batches
    ]


def _entrants(request: Request, subject: Subject) -> tuple[str, ...]:
    """Those asked for, by default those that are practical, and what their memory is a share of."""
    default = CPU_PROVIDERS if request.device.type == "cpu" else GPU_PROVIDERS
    wanted = {*(request.providers or default), BASELINE if subject.channels_last else EAGER}
    return tuple(
        name for name in GPU_PROVIDERS
        if name in wanted and name in PROVIDERS and (subject.channels_last or name != BASELINE)
    )  # fmt: skip


def run(request: Request, cases: Sequence[Case]) -> Iterator[Row]:
    """Measure each case in a process of its own."""
    deadline = time.monotonic() + request.seconds
    for case in cases:
        answers = _unmeasured(case) if time.monotonic() > deadline else _ask(case)
        baseline = answers[case.baseline].get("figures", {}).get("saved_mib")
        for provider in case.providers:
            yield _row(case, provider, answers[provider], baseline)


def _unmeasured(case: Case, status: str = "not measured", note: str = "out of time") -> dict[str, dict[str, Any]]:
    return {provider: {"status": status, "note": note} for provider in case.providers}


def _ask(case: Case) -> dict[str, dict[str, Any]]:
    try:
        return apart(measure, INTERPRETED if case.device == "cpu" else {}, case)
    except BenchmarkError as error:
        return _unmeasured(case, "failed", str(error))


def _row(case: Case, provider: str, answer: dict[str, Any], baseline: float | None = None) -> Row:
    row = Row(
        "memory", case.workload, "training", provider, list(case.shape), case.dtype, case.layout(provider), **answer,
        environment=describe(torch.device(case.device)),
    )  # fmt: skip
    if row.figures:
        saved = row.figures["saved_mib"]
        share = round(saved / baseline, 4) if saved and baseline and row.status == "ok" else None
        row.figures["saved_share"] = share
        most = BUDGET.get((case.workload, provider), 1.0) if case.dtype == "float32" else 1.0
        if provider.startswith("fusedres") and (share or 0) > most:
            row.status, row.check["ok"] = "WRONG", False
            row.check["complaints"] = [f"{share} of what eager saves, more than {most}"]
    return row


def measure(case: Case) -> dict[str, dict[str, Any]]:
    """Status, figures, check and note by provider, in a process that interprets kernels if the device is a CPU."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with fast_interpreter() if case.device == "cpu" else nullcontext():
        return {provider: _measure_one(case, provider) for provider in case.providers}


def _measure_one(case: Case, provider: str) -> dict[str, Any]:
    device = torch.device(case.device)
    try:
        with kernels_skipped(device):
            figures = _figures(case, _instance(case, provider, case.subject.build()))
        verdict = _check(case, provider)
    except torch.OutOfMemoryError as error:
        return {"status": "OOM", "note": first_line(error)}
    except Exception as error:  # a provider that cannot run is a result, not the end of the benchmark
        return {"status": "failed", "note": first_line(error)}
    finally:
        torch.compiler.reset()
    status = "ok" if verdict["ok"] else "WRONG"
    return {"status": status, "figures": figures, "check": verdict, "note": _note(case, provider, figures)}


def _note(case: Case, provider: str, figures: dict[str, float | None]) -> str:
    notes = []
    if case.device == "cpu" and provider.startswith("fusedres"):
        notes.append("kernels, interpreted for the check; the bytes are what their launchers allocate")
    hidden = (figures["alive_mib"] or 0) - (figures["saved_mib"] or 0)
    if hidden > HIDDEN * (figures["saved_mib"] or 0):
        notes.append(f"{hidden:.1f} MiB more are kept than autograd lists")
    return "; ".join(notes)


def _instance(case: Case, provider: str, model: nn.Module) -> Instance:
    device = torch.device(case.device)
    return instantiate(PROVIDERS[provider], model, device, channels_last=case.subject.channels_last)


def _figures(case: Case, instance: Instance) -> dict[str, float | None]:
    subject, device = case.subject, torch.device(case.device)
    x = subject.input(case.shape, device)
    x = x.contiguous(memory_format=instance.memory_format) if x.dim() == 4 else x
    target = subject.labels(len(x), device)
    instance.module.train()

    def forward() -> Tensor:
        with torch.autocast(device.type, getattr(torch, case.dtype), enabled=case.dtype != "float32"):
            return instance.call(x)

    def step() -> None:
        instance.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(forward(), target).backward()
        instance.optimizer.step()

    step()  # compiles, and makes the optimizer's state and the libraries' workspaces
    owned = [x, *instance.module.parameters(), *instance.module.buffers()]
    saved, peak = saved_for_backward(forward, owned), peak_bytes(step, device)
    figures = {"saved_mib": saved.saved, "alive_mib": saved.alive, "peak_mib": peak}
    return {name: None if value is None else round(value / MIB, 4) for name, value in figures.items()}


def _check(case: Case, provider: str) -> dict[str, Any]:
    """Of the whole model on a GPU, of its miniature on a CPU."""
    subject = case.subject
    torch.manual_seed(0)
    model = subject.miniature() if case.device == "cpu" else subject.build()
    shape = (CHECKED[case.device], *case.shape[1:])
    return check(subject, _instance(case, provider, model), model, shape, getattr(torch, case.dtype))


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title="Memory of a training step")
    for name in ("model", "input", "dtype", "provider"):
        shown.add_column(name)
    for name in ("saved MiB", "share", "alive MiB", "peak MiB", "status"):
        shown.add_column(name, justify="right")
    for row in rows:
        figures = [row.figures.get(name) for name in ("saved_mib", "saved_share", "alive_mib", "peak_mib")]
        cells = ["" if figure is None else f"{figure:,.3g}" if figure < 10 else f"{figure:,.1f}" for figure in figures]
        shown.add_row(
            row.workload, "x".join(map(str, row.shape)), row.dtype, row.provider, *cells, row.status,
            end_section=row.provider.startswith("fusedres"),
        )  # fmt: skip
    return shown


SUITE = Suite("memory", "bytes saved for the backward, and the peak of a training step", plan, run, table)
