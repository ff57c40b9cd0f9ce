"""What the compiler makes of a kernel, for named architectures, without a GPU.

Launches are recorded from the real launchers, so that the code examined is the code that would run. Triton's wheel
carries all the tools used: ptxas and cuobjdump for NVIDIA, LLVM for AMD. Kernels must not be interpreted here
(``TRITON_INTERPRET`` unset).
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
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
    num_stages: int | None  # None: what the backend takes by itself

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Code:
    """What a compiled kernel uses: registers and spills a thread, shared memory a program, access widths.

    ``loads`` and ``stores`` count its global access instructions by width in bits, ``matrix`` its tensor-core
    instructions. ``fenced`` is whether a barrier of the whole program stands between its last store and its atomic,
    ``None`` without an atomic.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    matrix: int
    fenced: bool | None


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; tensors may be uninitialised CPU tensors."""
    launches: list[Launch] = []

    def record(
        kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, num_warps: int = 4,
        num_stages: int | None = None, **constexprs: Any,
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
    options = {"num_warps": launch.num_warps}
    if launch.num_stages is not None:
        options["num_stages"] = launch.num_stages
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
    matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx))
    return Code(numbers["REG"], spills, compiled.metadata.shared, dict(loads), dict(stores), matrix, fenced)


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
    matrix = len(re.findall(r"\bv_mfma_", text))
    return Code(number("vgpr_count"), spills, compiled.metadata.shared, dict(loads), dict(stores), matrix, fenced)


def _fenced(text: str, *, atomic: str, store: str, barrier: str) -> bool | None:
    """Whether every atomic has a barrier behind the last store before it."""
    ends = [match.start() for match in re.finditer(atomic, text)]
    if not ends:
        return None

    def last(pattern: str, end: int) -> int:
        return max((match.start() for match in re.finditer(pattern, text[:end])), default=-1)

    return all(last(barrier, end) > last(store, end) for end in ends)
