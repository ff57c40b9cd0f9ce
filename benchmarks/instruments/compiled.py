"""What torch.compile makes of a step, and what a step launches, counted where both keep their own accounts.

Names as in torch 2.11 to 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.errors import BenchmarkError
from benchmarks.instruments.meter import FREE
from benchmarks.instruments.network import PRODUCTS

# Calls in the code that Inductor writes: of kernels it generated, of operators it left as they are, and of ours.
GENERATED = re.compile(r"^\s+(?:cpp_\w+|triton_\w+\.run)\(", re.MULTILINE)
EXTERN = re.compile(r"^\s+(?:\w+ = )?(?:extern_kernels|torch\.ops\.(?!fusedres\.))[\w.]+\(", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """What one step calls, and what Inductor says that its kernels move; ``None`` for what came out of a cache."""

    generated: int | None
    extern: int | None
    generated_bytes: int | None
    graph_breaks: int


def compiled(step: Callable[[], object]) -> Compiled:
    """Compile ``step`` by running it once, after everything compiled before was forgotten, and read the accounts.

    Inductor counts a buffer once a kernel, read or written, at most in its whole size.

    Raises:
        BenchmarkError: this torch keeps no such accounts.
    """
    try:
        from torch._dynamo.utils import counters
        from torch._inductor import metrics
        from torch._inductor.scheduler import ExternKernelSchedulerNode
        from torch._inductor.utils import run_and_get_code
        from torch._logging._internal import set_logs
    except ImportError as error:
        raise BenchmarkError(f"torch {torch.__version__} keeps no account of what it compiles: {error}") from None
    counters.clear()
    metrics.reset()
    set_logs(inductor_metrics=True)  # bytes are added up for this log alone
    try:
        _, codes = run_and_get_code(step)
    finally:
        set_logs()
    breaks = sum(counters["graph_break"].values())
    if counters["inductor"]["fxgraph_cache_hit"] or counters["aot_autograd"]["autograd_cache_hit"]:
        return Compiled(None, None, None, breaks)
    source = "\n".join(codes)
    sizes = [4 * words for node, words in metrics.nodes_num_elem if not isinstance(node, ExternKernelSchedulerNode)]
    moved = sum(sizes) if metrics.nodes_num_elem else None
    return Compiled(len(GENERATED.findall(source)), len(EXTERN.findall(source)), moved, breaks)


@dataclass(frozen=True)
class Scheduled:
    """One graph of Inductor's: its kernels, and the bytes of counted tensors that these and library calls move."""

    backward: bool
    kernels: int
    bytes: int


def scheduled(step: Callable[[], object], counts: Callable[[Sequence[int]], bool]) -> list[Scheduled]:
    """What Inductor would run for ``step``, which compiles something on a CPU: scheduled, and neither built nor run.

    ``step`` itself runs with kernels that do nothing, so that the backward is captured too: its results mean nothing.
    A tensor counts once a kernel that reads or writes it, at most in its whole size; products of ``PRODUCTS`` do not.

    Args:
        counts: whether a tensor of that shape is to be counted.

    Raises:
        BenchmarkError: this torch keeps no such accounts.
    """
    try:
        from torch._inductor import config
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.graph import GraphLowering
        from torch._inductor.utils import fresh_cache
    except ImportError as error:
        raise BenchmarkError(f"torch {torch.__version__} keeps no account of what it compiles: {error}") from None
    found: list[Scheduled] = []
    codegen = GraphLowering.codegen

    def noted(graph: Any) -> Any:
        code = codegen(graph)
        found.append(_account(graph, counts))
        return code

    torch.compiler.reset()
    try:
        with (
            fresh_cache(),  # nothing comes out of one, and code without its kernels stays in none
            config.patch({"cpp.vec_isa_ok": True}),  # no probe of a compiler
            mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None),
            mock.patch.object(GraphLowering, "codegen", noted),
        ):
            step()
    finally:
        torch.compiler.reset()
    return found


def _account(graph: Any, counts: Callable[[Sequence[int]], bool]) -> Scheduled:
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    kernels = moved = 0
    for node in graph.scheduler.nodes:
        extern = isinstance(node, ExternKernelSchedulerNode)
        if isinstance(node, NopKernelSchedulerNode) or (extern and isinstance(node.node, MultiOutput)):
            continue
        if extern and not PRODUCTS.isdisjoint(_called(node.node).split(".")):
            continue
        kernels += not extern
        accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        moved += sum(size for name, size in accesses.items() if counts(_shape(graph, name)))
    return Scheduled(graph.is_backward, kernels, moved)


def _called(node: Any) -> str:
    """``aten.convolution.default`` or ``extern_kernels.mm``."""
    return str(node.op_overload or node.python_kernel_name)


def _shape(graph: Any, name: str) -> list[int]:
    buffer = graph.name_to_buffer.get(name) or graph.graph_inputs[name]
    return [int(size) for size in buffer.get_size()]


def recompilations(step: Callable[[int], object], batches: list[int]) -> list[int]:
    """How many graphs each of ``batches`` adds, in turn; the first ones are its compilation."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    graphs = [0]
    for batch in batches:
        step(batch)
        graphs.append(counters["stats"]["unique_graphs"])
    return [after - before for before, after in pairwise(graphs)]


@dataclass
class Launches:
    """Of this package's kernels. ``bytes`` are of their tensor arguments, each once a launch."""

    count: int = 0
    bytes: int = 0

    def note(self, arguments: list[Any]) -> None:
        self.count += 1
        tensors = {argument.data_ptr(): argument for argument in arguments if isinstance(argument, Tensor)}
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@contextmanager
def counted_launches() -> Iterator[Launches]:
    """Count launches; where kernels are interpreted, instead of running them. Inductor's own are not among them."""
    from triton import knobs
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    launches, run = Launches(), JITFunction.run

    def launch(kernel: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        if not warmup:
            launches.note([*args, *kwargs.values()])
        return run(kernel, *args, warmup=warmup, **kwargs)

    def skip(_: Any, *args: Any, **kwargs: Any) -> None:
        launches.note([*args, *kwargs.values()])

    interpreted = mock.patch.object(interpreter.GridExecutor, "__call__", skip)
    with interpreted if knobs.runtime.interpret else mock.patch.object(JITFunction, "run", launch):
        yield launches


class AtenCalls(TorchDispatchMode):
    """Collects the ATen operators that compute something, and not views, allocations or this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in FREE | {"detach"}:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
