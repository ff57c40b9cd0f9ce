"""Static code report: what the compiler makes of every kernel, for named architectures, without a GPU.

The launches are recorded from the real launchers, so that the code examined is the code that would run. Triton's
wheel carries all the tools used: ptxas and cuobjdump for NVIDIA, LLVM for AMD. Kernels must not be interpreted here
(``TRITON_INTERPRET`` unset).
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
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
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its argument types and its compile-time constants."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Code:
    """What a compiled kernel uses: registers and spills a thread, shared memory a program, access widths.

    ``loads`` and ``stores`` are the distinct widths in bits of its global accesses.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    text: str


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; tensors may be uninitialised CPU tensors."""
    launches: list[Launch] = []

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **constexprs: Any):
        values = dict(zip(kernel.arg_names, args, strict=False)) | constexprs
        signature = {name: _type(values[name], param.is_constexpr) for name, param in _params(kernel)}
        constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
        launches.append(Launch(kernel, tuple(signature.items()), tuple(constants.items()), num_warps))

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
    compiled = triton.compile(source, target=TARGETS[arch], options={"num_warps": launch.num_warps})
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
    return Code(
        numbers["REG"], numbers["STACK"] + numbers["LOCAL"], compiled.metadata.shared, *_ptx_widths(ptx), ptx
    )  # fmt: skip


def _ptx_widths(ptx: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    widths = []
    for instruction in ("ld", "st"):
        found = re.findall(rf"\b{instruction}\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
        widths.append(tuple(sorted({int(vector or 1) * int(bits) for vector, bits in found})))
    return widths[0], widths[1]


def _read_amd(compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return sum(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", text))

    widths = []
    for instruction in ("load", "store"):
        found = re.findall(rf"(?:buffer|global)_{instruction}_(dwordx4|dwordx2|dword|short|ushort|byte|ubyte)", text)
        bits = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "byte": 8, "ubyte": 8}
        widths.append(tuple(sorted({bits[name] for name in found})))
    spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return Code(number("vgpr_count"), spills, compiled.metadata.shared, widths[0], widths[1], text)
