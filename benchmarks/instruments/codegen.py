"""What the compiler makes of a kernel, for named architectures, without a GPU.

Launches are recorded from the real launchers, so that the code examined is the code that would run. Triton's wheel
carries all the tools used: ptxas and cuobjdump for NVIDIA, LLVM for AMD. Kernels must not be interpreted here
(``TRITON_INTERPRET`` unset).
"""

from __future__ import annotations

import functools
import math
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
    """A recorded launch: the kernel, its argument types (a tuple for a tuple) and its compile-time constants."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str | tuple[str, ...]], ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int | None  # None: what the backend takes by itself

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def constants(self) -> dict[str, Any]:
        return dict(self.constexprs)

    @property
    def tensors(self) -> dict[str, str]:
        """Types of the pointers that are given; not of those in tuples, which are vectors."""
        return {name: kind for name, kind in self.signature if isinstance(kind, str) and kind.startswith("*")}


@dataclass(frozen=True)
class Code:
    """What a compiled kernel uses: registers and spills a thread, shared memory a program, access widths.

    ``loads`` and ``stores`` count its global access instructions by width in bits, ``matrix`` its tensor-core
    instructions. ``fenced`` is whether a barrier of the whole program stands between its last store and its atomic,
    ``None`` without an atomic. ``load_bytes`` are those that a program asks for before it waits: of one iteration of
    its widest loop, times the iterations that the compiler prefetches; of all its loads where it has no loop.
    ``narrow`` are the pointers to which it adds 32-bit scalars.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    matrix: int
    fenced: bool | None
    load_bytes: int
    narrow: frozenset[str]


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


def _type(value: Any, is_constexpr: bool) -> str | tuple[str, ...]:
    if is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(str(_type(member, False)) for member in value)
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 2**31 else "i64"


@functools.cache
def compile_launch(launch: Launch, arch: str) -> Code:
    """Compile for ``arch``, a key of ``TARGETS``; pointers are taken as 16-byte aligned, as the allocator's are."""
    names = list(launch.kernel.arg_names)
    constants = {(names.index(name),): value for name, value in launch.constexprs}
    attrs = {}
    for name, kinds in launch.signature:
        place = (names.index(name),)
        members = {place: kinds} if isinstance(kinds, str) else {(*place, i): kind for i, kind in enumerate(kinds)}
        attrs |= {path: [["tt.divisibility", 16]] for path, kind in members.items() if kind.startswith("*")}
        constants |= {path: None for path, kind in members.items() if kind == "constexpr" and path != place}
    source = ASTSource(launch.kernel, dict(launch.signature), constants, attrs)
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
    asked = _load_bytes(compiled)
    spills = numbers["STACK"] + numbers["LOCAL"]
    matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx))
    return Code(
        numbers["REG"],
        spills,
        compiled.metadata.shared,
        dict(loads),
        dict(stores),
        matrix,
        fenced,
        asked,
        _narrow(compiled),
    )


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
    asked = _load_bytes(compiled)
    spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    matrix = len(re.findall(r"\bv_mfma_", text))
    return Code(
        number("vgpr_count"),
        spills,
        compiled.metadata.shared,
        dict(loads),
        dict(stores),
        matrix,
        fenced,
        asked,
        _narrow(compiled),
    )


def _fenced(text: str, *, atomic: str, store: str, barrier: str) -> bool | None:
    """Whether every atomic has a barrier behind the last store before it."""
    ends = [match.start() for match in re.finditer(atomic, text)]
    if not ends:
        return None

    def last(pattern: str, end: int) -> int:
        return max((match.start() for match in re.finditer(pattern, text[:end])), default=-1)

    return all(last(barrier, end) > last(store, end) for end in ends)


def _load_bytes(compiled: Any) -> int:
    """``Code.load_bytes`` from Triton's own representation, which has the loops and is the same for all targets."""
    regions, widest = [_Region()], 0
    for line in compiled.asm["ttir"].splitlines():
        text = line.strip()
        if text.startswith("}") and len(regions) > 1:
            stages = re.search(r"tt\.num_stages = (\d+)", text)
            widest = max(widest, regions.pop().ahead(int(stages[1]) if stages else 0, compiled.metadata.num_stages))
        if text.endswith("{"):
            regions.append(_Region())
        elif load := re.search(r"= tt\.load .*: (?:tensor<([\dx]*)x)?!tt\.ptr<[a-z]+(\d+)>", text):
            sizes = map(int, load[1].split("x")) if load[1] else ()
            regions[-1].load_bytes += math.prod(sizes) * int(load[2]) // 8
        elif " = tt.dot " in text:
            regions[-1].has_product = True
    return widest


def _narrow(compiled: Any) -> frozenset[str]:
    """``Code.narrow``, from the same representation."""
    return frozenset(re.findall(r"tt\.addptr %(\w+_ptr), %\w+ : !tt\.ptr<\w+>, i32\b", compiled.asm["ttir"]))


@dataclass
class _Region:
    """One block between braces of Triton's representation."""

    load_bytes: int = 0
    has_product: bool = False

    def ahead(self, asked: int, default: int) -> int:
        """Bytes of its loads, times the iterations fetched ahead; without being asked, Triton does so for products."""
        stages = asked or (default if self.has_product else 2)
        return self.load_bytes * max(1, stages - 1)
