"""What torch.compile makes of a network beside what fusedres launches: kernels, bytes, memory and compile time.

``python -m benchmarks.suites.compile_study QUESTION`` studies one network and provider. It is asked twice: with empty
compiler caches, and with those that the first process left. On a CPU Triton's kernels are interpreted, for the check
alone; all else does not depend on what they compute.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

import fusedres
from benchmarks.environment import describe
from benchmarks.errors import BenchmarkError
from benchmarks.instruments.compiled import AtenCalls, compiled, counted_launches, recompilations
from benchmarks.instruments.interpreter import fast_interpreter, kernels_skipped
from benchmarks.instruments.saved import saved_for_backward
from benchmarks.parity import first_line
from benchmarks.providers import Instance, Provider, instantiate
from benchmarks.results import Key, Row
from benchmarks.suite import Request, Suite
from benchmarks.suites.subject import SUBJECTS, Subject, check
from benchmarks.workers import INTERPRETED, apart

MODES = ("training", "inference")
MIB = 2**20
FUSED = ("fusedres", "fusedres + compile")
QUICK = ("torch.compile", "fusedres")  # on a CPU, where the C++ compiler takes its time
PREPARE: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "torch.compile": torch.compile,  # as users call it: sizes that change become dynamic
    "fusedres": fusedres.fuse,
    "fusedres + compile": lambda model: torch.compile(fusedres.fuse(model)),
}


@dataclass(frozen=True)
class Case:
    """One network by one provider, in training and in inference."""

    workload: str
    provider: str
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.workload]

    @property
    def keys(self) -> list[Key]:
        return [(self.workload, mode, self.provider, self.shape, self.dtype, "channels-last") for mode in MODES]


def plan(request: Request) -> list[Case]:
    """A block and, but for quick runs on a CPU, ResNet-34 and ResNet-50.

    Raises:
        BenchmarkError: a dtype that is not measured on a CPU, or a batch too small to have two smaller ones.
    """
    on_cpu = request.device.type == "cpu"
    dtypes = request.dtypes or (("float32",) if on_cpu else ("bfloat16",))
    if on_cpu and dtypes != ("float32",):
        raise BenchmarkError(f"dtype {', '.join(dtypes)} is not measured on cpu; only float32 is")
    batches = request.batches or ((4,) if on_cpu else (32,))
    if min(batches) < 4:
        raise BenchmarkError(f"compile-study changes the batch size from --batch {min(batches)} down; at least 4 is")
    names = ("basic block",) if on_cpu and request.quick else ("basic block", "resnet34", "resnet50")
    default = QUICK if on_cpu and request.quick else tuple(PREPARE)
    providers = [name for name in PREPARE if name in (request.providers or default)]
    return [
        Case(name, provider, SUBJECTS[name].shape(batch, request.device), dtype, request.device.type)
        for name in names
        for dtype in dtypes
        for batch in batches
        for provider in providers
    ]


def run(request: Request, cases: Sequence[Case]) -> Iterator[Row]:
    """Study each case in two processes, the second with the compiler caches that the first one filled."""
    deadline = time.monotonic() + request.seconds
    for case in cases:
        late = time.monotonic() > deadline
        answers = _both("not measured", "out of time") if late else _ask_twice(case)
        for mode in MODES:
            yield Row(
                "compile-study", case.workload, mode, case.provider, list(case.shape), case.dtype, "channels-last",
                **answers[mode], environment=describe(torch.device(case.device)),
            )  # fmt: skip


def _ask_twice(case: Case) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = _caches(Path(folder)) | (INTERPRETED if case.device == "cpu" else {})
        try:
            answers = apart(study, environment, case)
            if all(answer.get("figures", {}).get("compile_cold_s") is not None for answer in answers.values()):
                warm = apart(partial(study, warm=True), environment, case)
                for mode in MODES:
                    answers[mode]["figures"]["compile_warm_s"] = warm[mode]["figures"]["compile_warm_s"]
        except BenchmarkError as error:
            return _both("failed", str(error))
    return answers


def _caches(folder: Path) -> dict[str, str | None]:
    """Where the compilers keep what they made: nothing else is read.

    On a CPU, Inductor's probes of the vector instructions are left out: they belong to a machine, and not to a model.
    """
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
    }


def _both(status: str, note: str) -> dict[str, dict[str, Any]]:
    return {mode: {"status": status, "note": note} for mode in MODES}


class Study:
    """One network by one provider, in this process."""

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        self.dtype = getattr(torch, case.dtype)
        torch.manual_seed(0)
        self.model = case.subject.build()
        self.x = self.input(case.shape[0])

    def input(self, batch: int) -> torch.Tensor:
        x = self.case.subject.input((batch, *self.case.shape[1:]), self.device)
        return x.contiguous(memory_format=torch.channels_last)

    def instance(self, prepare: Callable[[nn.Module], Callable[..., Any]]) -> Instance:
        return instantiate(Provider(self.case.provider, True, prepare), self.model, self.device)

    def step(self, instance: Instance, mode: str, x: torch.Tensor) -> Callable[[], object]:
        """Forward and backward without an optimizer, or the forward in evaluation mode."""

        cotangent = torch.ones(len(x), self.case.subject.classes, dtype=self.dtype, device=self.device)

        def train() -> None:
            instance.optimizer.zero_grad(set_to_none=True)
            self.forward(instance, x).backward(cotangent)

        def infer() -> None:
            with torch.no_grad():
                self.forward(instance, x)

        instance.module.train(mode == "training")
        return train if mode == "training" else infer

    def forward(self, instance: Instance, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return instance.call(x)

    def answer(self, *, warm: bool = False) -> dict[str, dict[str, Any]]:
        """Status, figures, check and note of each mode; ``warm``: no more than the seconds."""
        instance = self.instance(PREPARE[self.case.provider])
        name = "compile_warm_s" if warm else "compile_cold_s"
        figures: dict[str, dict[str, float | None]] = {}
        with kernels_skipped(self.device):
            for mode in MODES:
                step = self.step(instance, mode, self.x)
                account, seconds = self.compile(step, counted=not warm)
                figures[mode] = {name: seconds} | ({} if warm else self.figures(instance, mode, step) | account)
            if not warm:
                for mode in MODES:
                    figures[mode] |= self.batches(mode)
        return {mode: {"figures": figures[mode]} for mode in MODES} if warm else self.checked(instance, figures)

    def compile(self, step: Callable[[], object], *, counted: bool) -> tuple[dict[str, float | None], float | None]:
        """Inductor's account, and how much longer the first step takes than the second: what compiling takes."""
        start = time.perf_counter()
        account: dict[str, float | None] = {}
        if counted and "compile" in self.case.provider:
            found = compiled(step)
            account = {
                "kernels": found.generated, "extern_kernels": found.extern, "graph_breaks": found.graph_breaks,
                "inductor_mib": None if found.generated_bytes is None else round(found.generated_bytes / MIB, 4),
            }  # fmt: skip
        else:
            step()
        self.synchronize()
        first, start = time.perf_counter() - start, time.perf_counter()
        step()
        self.synchronize()
        seconds = round(first - (time.perf_counter() - start), 3)
        nothing = self.device.type == "cpu" and self.case.provider == "fusedres"  # interpreted kernels are not compiled
        return account, None if nothing else seconds

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def figures(self, instance: Instance, mode: str, step: Callable[[], object]) -> dict[str, float | None]:
        """What does not depend on who compiled it; ATen calls where nobody did."""
        with counted_launches() as launches:
            step()
        found: dict[str, float | None] = {
            "launches": launches.count, "launch_mib": round(launches.bytes / MIB, 4), "saved_mib": None,
            "kernels": None, "extern_kernels": None, "graph_breaks": None, "inductor_mib": None,
        }  # fmt: skip
        if "compile" not in self.case.provider:
            with AtenCalls() as calls:
                step()
            found["extern_kernels"] = len(calls.names)
        if mode == "training":
            owned = [self.x, *instance.module.parameters(), *instance.module.buffers()]
            saved = saved_for_backward(lambda: self.forward(instance, self.x), owned)
            found |= {"saved_mib": round(saved.saved / MIB, 4), "alive_mib": round(saved.alive / MIB, 4)}
        return found

    def batches(self, mode: str) -> dict[str, float | None]:
        """Graphs captured anew for a smaller last batch, and for another one; without code generation, for speed."""
        if "compile" not in self.case.provider:
            return {"recompilations": None, "recompilations_again": None}
        fused = self.case.provider in FUSED
        instance = self.instance(
            lambda model: torch.compile(fusedres.fuse(model) if fused else model, backend="aot_eager")
        )
        batch = self.case.shape[0]

        def step(batch: int) -> None:
            self.step(instance, mode, self.input(batch))()

        _, first, again = recompilations(step, [batch, batch - 1, batch - 2])
        return {"recompilations": first, "recompilations_again": again}

    def checked(self, instance: Instance, figures: dict[str, dict[str, float | None]]) -> dict[str, dict[str, Any]]:
        verdict = check(self.case.subject, instance, self.model, self.case.shape, self.dtype)
        status = "ok" if verdict["ok"] else "WRONG"
        interpreted = self.device.type == "cpu" and self.case.provider in FUSED
        note = "kernels, interpreted for the check" if interpreted else ""
        return {mode: {"status": status, "figures": figures[mode], "check": verdict, "note": note} for mode in MODES}


def study(case: Case, *, warm: bool = False) -> dict[str, dict[str, Any]]:
    """The fields of a case's rows by mode; a case that cannot run is a result, too.

    In a process that interprets kernels if the device is a CPU.
    """
    torch.set_num_threads(1)
    try:
        with fast_interpreter() if case.device == "cpu" else nullcontext():
            return Study(case).answer(warm=warm)
    except torch.OutOfMemoryError as error:
        return _both("OOM", first_line(error))
    except Exception as error:
        return _both("failed", first_line(error))


COLUMNS = {
    "launches": "launches", "kernels": "kernels", "extern_kernels": "library", "launch_mib": "launches MiB",
    "inductor_mib": "kernels MiB", "saved_mib": "saved MiB", "graph_breaks": "breaks", "recompilations": "recompiled",
    "recompilations_again": "again", "compile_cold_s": "cold s", "compile_warm_s": "warm s",
}  # fmt: skip


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title="What torch.compile generates beside what fusedres launches")
    for name in ("network", "mode", "provider"):
        shown.add_column(name)
    for name in (*COLUMNS.values(), "status"):
        shown.add_column(name, justify="right")
    for row in rows:
        figures = [row.figures.get(name) for name in COLUMNS]
        cells = ["" if figure is None else f"{figure:,.4g}" for figure in figures]
        shown.add_row(row.workload, row.mode, row.provider, *cells, row.status)
    return shown


SUITE = Suite("compile-study", "what torch.compile generates beside what fusedres launches", plan, run, table)
