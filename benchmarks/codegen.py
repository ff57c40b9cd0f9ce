"""Static code report: what the compiler makes of every kernel, for named architectures, without a GPU.

The launches are recorded from the real launchers, so that the code examined is the code that would run. Triton's
wheel carries all the tools used: ptxas and cuobjdump for NVIDIA, LLVM for AMD. Kernels must not be interpreted here
(``TRITON_INTERPRET`` unset).
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its argument types and its compile-time constants."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Code:
    """What a compiled kernel uses: registers and spills a thread, shared memory a program, access widths.

    ``loads`` and ``stores`` count its global access instructions by width in bits. ``fenced`` is whether a
    barrier of the whole program stands between its last store and its atomic, ``None`` without an atomic.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    fenced: bool | None


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; tensors may be uninitialised CPU tensors."""
    launches: list[Launch] = []

    def record(
        kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, num_warps: int = 4, num_stages: int = 3,
        **constexprs: Any,
    ):  # fmt: skip
        values = dict(zip(kernel.arg_names, args, strict=False)) | constexprs
        signature = {name: _type(values[name], param.is_constexpr) for name, param in _params(kernel)}
        constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
        launches.append(Launch(kernel, tuple(signature.items()), tuple(constants.items()), num_warps, num_stages))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def _params(kernel: JITFunction[Any]) -> Iterator[tuple[str, Any]]:
    return ((param.name, param) for param in kernel.params)


def _type(value: Any, is_constexpr: bool) -> str:
    if is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 2**31 else "i64"


@functools.cache
def compile_launch(launch: Launch, arch: str) -> Code:
    """Compile for ``arch``, a key of ``TARGETS``; pointers are taken as 16-byte aligned, as the allocator's are."""
    names = list(launch.kernel.arg_names)
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in launch.signature if kind.startswith("*")}
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constexprs},
        attrs,  # pyright: ignore[reportArgumentType]
    )
    target = TARGETS[arch]
    options = {"num_warps": min(launch.num_warps, 1024 // target.warp_size), "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    read = _read_amd if arch.startswith("gfx") else _read_nvidia
    return read(compiled)


def _read_nvidia(compiled: Any) -> Code:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    loads, stores = (
        Counter(
            int(vector or 1) * int(bits)
            for vector, bits in re.findall(rf"\b{instruction}\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
        )
        for instruction in ("ld", "st")
    )
    fenced = _fenced(ptx, atomic=r"\batom\.[\w.]*acq_rel", store=r"\bst\.global", barrier=r"\bbar\.sync")
    spills = numbers["STACK"] + numbers["LOCAL"]
    return Code(numbers["REG"], spills, compiled.metadata.shared, dict(loads), dict(stores), fenced)


def _read_amd(compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return sum(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", text))

    bits = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "byte": 8, "ubyte": 8}
    loads, stores = (
        Counter(bits[width] for width in re.findall(rf"(?:buffer|global)_{instruction}_({'|'.join(bits)})\b", text))
        for instruction in ("load", "store")
    )
    memory = "(?:buffer|global)"
    fenced = _fenced(text, atomic=f"{memory}_atomic_add", store=f"{memory}_store", barrier="s_barrier")
    spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return Code(number("vgpr_count"), spills, compiled.metadata.shared, dict(loads), dict(stores), fenced)


def _fenced(text: str, *, atomic: str, store: str, barrier: str) -> bool | None:
    """Whether every atomic has a barrier behind the last store before it."""
    ends = [match.start() for match in re.finditer(atomic, text)]
    if not ends:
        return None

    def last(pattern: str, end: int) -> int:
        return max((match.start() for match in re.finditer(pattern, text[:end])), default=-1)

    return all(last(barrier, end) > last(store, end) for end in ends)


WORKLOADS = (
    # The first needs two launches, the second fits on-chip; 67 channels allow no wide access.
    ((8, 64, 56, 56), True),
    ((8, 64, 56, 56), False),
    ((2, 256, 14, 14), True),
    ((2, 256, 14, 14), False),
    ((8, 67, 56, 56), True),
    ((2, 67, 14, 14), True),
)


def batch_norm_launches(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    channels_last: bool,
    residual: bool,
    training: bool,
    act: str | None = "relu",
) -> list[Launch]:
    """The launches of one layer's forward and backward."""
    from fusedres.kernels.batch_norm_backward import Gradients, batch_norm_act_backward
    from fusedres.kernels.batch_norm_forward import batch_norm_act_forward, batch_norm_act_inference_forward

    x = _activation(shape, dtype, channels_last)
    other = torch.empty_like(x) if residual else None
    vector = torch.empty(shape[1])
    with recorded_launches() as launches:
        if training:
            count = torch.tensor(0)
            out, stats, mask = batch_norm_act_forward(
                x, other, vector, vector, vector, vector, count, 0.1, 1e-5, act, residual
            )
        else:
            out, stats, mask = batch_norm_act_inference_forward(
                x, other, vector, vector, vector, vector, 1e-5, act, True, residual
            )
        wanted = Gradients(torch.empty_like(x), other, vector, vector)
        batch_norm_act_backward(out, x, mask if residual else None, stats, act, not training, wanted)
    return launches


def add_batch_norm_launches(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    channels_last: bool,
    training: bool,
    residual_dtype: torch.dtype | None = None,
    act: str | None = "relu",
) -> list[Launch]:
    """The launches of one join of pre-activation blocks, forward and backward."""
    from fusedres.kernels.add_batch_norm import add_batch_norm_act_forward, add_batch_norm_act_inference_forward
    from fusedres.kernels.batch_norm_backward import Gradients, batch_norm_act_backward

    x = _activation(shape, dtype, channels_last)
    residual = _activation(shape, residual_dtype or dtype, channels_last)
    vector = torch.empty(shape[1])
    with recorded_launches() as launches:
        if training:
            count = torch.tensor(0)
            s, out, stats = add_batch_norm_act_forward(
                x, residual, vector, vector, vector, vector, count, 0.1, 1e-5, act
            )  # fmt: skip
        else:
            s, out, stats = add_batch_norm_act_inference_forward(
                x, residual, vector, vector, vector, vector, 1e-5, act, True
            )
        wanted = Gradients(torch.empty_like(s), None, vector, vector)
        batch_norm_act_backward(out, s, None, stats, act, not training, wanted, torch.empty_like(s))
    return launches


def _activation(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=form)


# Every layer of the report; float32 with a residual in 16 bits, and the reverse, differ in the forward only.
LAYERS = (
    functools.partial(batch_norm_launches, residual=True),
    functools.partial(batch_norm_launches, residual=False),
    add_batch_norm_launches,
    functools.partial(add_batch_norm_launches, residual_dtype=torch.float32),
    functools.partial(add_batch_norm_launches, residual_dtype=torch.bfloat16),
)


def training_step_launches(model: nn.Module, images: tuple[int, ...], dtype: torch.dtype) -> list[Launch]:
    """The launches of one channels-last training step of a fused model, found without computing anything."""
    calls: list[tuple[tuple[int, ...], bool, str | None]] = []

    def note(input: torch.Tensor, *_: object, residual: torch.Tensor | None, act: str | None, **__: object):
        calls.append((tuple(input.shape), residual is not None, act))
        return torch.empty_like(input)

    with mock.patch("fusedres.nn.batch_norm.batch_norm_act", note):
        model.to("meta")(torch.empty(images, device="meta"))
    return [
        launch
        for shape, residual, act in calls
        for launch in batch_norm_launches(shape, dtype, channels_last=True, residual=residual, training=True, act=act)
    ]


def report(arch: str, dtypes: Sequence[torch.dtype]) -> Iterator[dict[str, Any]]:
    """One row for every distinct launch of ``WORKLOADS`` on ``arch``."""
    seen = set()
    for (shape, channels_last), dtype, layer, training in product(WORKLOADS, dtypes, LAYERS, (True, False)):
        for launch in layer(shape, dtype, channels_last=channels_last, training=training):
            if launch in seen:
                continue
            seen.add(launch)
            constants = dict(launch.constexprs)
            yield {
                "kernel": launch.name,
                "arch": arch,
                "dtype": str(dtype).removeprefix("torch."),
                "layout": "channels-last" if channels_last else "NCHW",
                "align": constants["ALIGN"],
                "threads": launch.num_warps * TARGETS[arch].warp_size,
                "tile": constants["BLOCK_M"] * constants["BLOCK_C"],
                "tensors": {name: kind for name, kind in launch.signature if kind.startswith("*")},
                **asdict(compile_launch(launch, arch)),
            }


if __name__ == "__main__":
    for row in report(sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]]):
        print(json.dumps(row))
