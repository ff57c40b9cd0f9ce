"""Exact memory traffic of Triton kernels, counted in Triton's interpreter, and of the ATen operators beside them.

Every load, store and atomic of an interpreted kernel goes through four functions of one module; the meter wraps
them and adds up the bytes under the mask. Works with triton 3.6 and 3.7; ``TRITON_INTERPRET=1`` must be in the
environment before triton is imported, and tensors are on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.instruments.interpreter import fast_interpreter

SECTOR = 32  # bytes: the least that a GPU moves between device memory and its caches
ACTIVATION, MASK, VECTOR = "activation", "mask", "vector"
FREE = {  # they allocate, or change the shape
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_",
    "as_strided_",
}  # fmt: skip
OVERWRITES = {"copy_", "fill_", "zero_"}  # they write their first argument without reading it
# Operands that PyTorch's GPU kernels read once more, after a reduction over them, where statistics are the batch's.
REREAD = {"native_batch_norm": ("input",), "native_batch_norm_backward": ("grad_out", "input")}
# The gradient of max pooling is filled with zeros, and then written; of the input only the shape is used.
FILLED_FIRST, SHAPE_ALONE = {"max_pool2d_with_indices_backward"}, {"max_pool2d_with_indices_backward": ("self",)}


@dataclass
class TensorTraffic:
    """What one launch did with one tensor argument; bytes. ``issued`` counts a re-read again, ``distinct`` does not.

    ``sectors`` adds up, for every access of every program, the whole sectors it touches.
    """

    name: str
    kind: str
    start: int
    stop: int
    issued_read: int = 0
    issued_written: int = 0
    sectors: int = 0
    read: np.ndarray = field(init=False, repr=False)
    written: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.read = np.zeros(self.stop - self.start, dtype=bool)
        self.written = np.zeros(self.stop - self.start, dtype=bool)

    @property
    def issued(self) -> int:
        return self.issued_read + self.issued_written

    @property
    def distinct(self) -> int:
        return int(self.read.sum()) + int(self.written.sum())

    def touch(self, addresses: np.ndarray, width: int, *, write: bool) -> None:
        self.sectors += SECTOR * np.unique(addresses // SECTOR).size
        seen = self.written if write else self.read
        for byte in range(width):
            seen[addresses - self.start + byte] = True
        if write:
            self.issued_written += addresses.size * width
        else:
            self.issued_read += addresses.size * width


@dataclass
class Launch:
    """One kernel launch. ``stray`` are bytes outside of every tensor argument: a kernel that is out of bounds.

    ``product``: whether it multiplies matrices.
    """

    kernel: str
    tensors: list[TensorTraffic]
    stray: int = 0
    product: bool = False

    def bytes(self, *kinds: str, distinct: bool = False) -> int:
        return sum(t.distinct if distinct else t.issued for t in self.tensors if t.kind in kinds)

    def touch(self, addresses: np.ndarray, width: int, *, write: bool) -> None:
        if addresses.size == 0:
            return None
        low, high = int(addresses.min()), int(addresses.max()) + width
        for tensor in self.tensors:
            if tensor.start <= low and high <= tensor.stop:
                return tensor.touch(addresses, width, write=write)
        for tensor in self.tensors:  # a block of pointers that spans several tensors
            inside = (addresses >= tensor.start) & (addresses + width <= tensor.stop)
            tensor.touch(addresses[inside], width, write=write)
            addresses = addresses[~inside]
        self.stray += addresses.size * width
        return None


@dataclass(frozen=True)
class AtenCall:
    """One ATen operator outside of kernels and the activation-sized bytes it reads and writes at least once."""

    op: str
    bytes: int


class TrafficMeter:
    """Counts the traffic of what runs inside ``with meter:``, in passes over one activation-sized tensor.

    Args:
        activation: the tensor whose bytes are one pass. Floating tensors of at least half its elements count as
            activations, integer ones of at least one bit an element as masks, all others as per-channel vectors.
        sizes: numbers of elements; floating tensors that have one of them count as activations, all else as vectors.

    Raises:
        RuntimeError: on entry, when triton does not interpret.
    """

    def __init__(self, activation: Tensor, sizes: Collection[int] = ()) -> None:
        self.sizes = sizes
        self.numel = activation.numel()
        self.nbytes = activation.numel() * activation.element_size()
        self.launches: list[Launch] = []
        self.aten: list[AtenCall] = []
        self._launch: Launch | None = None
        self._stack = ExitStack()

    def __enter__(self) -> TrafficMeter:
        from triton import knobs
        from triton.runtime import interpreter

        if not knobs.runtime.interpret:
            raise RuntimeError("TrafficMeter needs TRITON_INTERPRET=1 in the environment before triton is imported")
        native = interpreter._interpreter
        patches = {
            "load": self._load, "store": self._store, "atomic_rmw": self._atomic_rmw, "atomic_cas": self._atomic_cas,
        }  # fmt: skip
        with ExitStack() as stack:
            for name, wrap in patches.items():
                stack.enter_context(mock.patch.object(native, name, wrap(getattr(native, name))))
            run = interpreter.GridExecutor.__call__
            stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", self._run(run)))
            builder = interpreter.interpreter_builder
            stack.enter_context(mock.patch.object(builder, "create_dot", self._dot(builder.create_dot)))
            stack.enter_context(fast_interpreter())
            stack.enter_context(_AtenCounter(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def issued_bytes(self) -> int:
        """Activation and mask bytes that kernels issue."""
        return sum(launch.bytes(ACTIVATION, MASK) for launch in self.launches)

    @property
    def distinct_bytes(self) -> int:
        """The same with every byte counted once a tensor, a launch and a direction."""
        return sum(launch.bytes(ACTIVATION, MASK, distinct=True) for launch in self.launches)

    @property
    def aten_bytes(self) -> int:
        """Activation-sized bytes read and written by ATen operators."""
        return sum(call.bytes for call in self.aten)

    @property
    def sector_bytes(self) -> int:
        """Bytes of the sectors that accesses to activations and masks touch, whole and again for every access."""
        return sum(t.sectors for launch in self.launches for t in launch.tensors if t.kind != VECTOR)

    @property
    def vector_bytes(self) -> int:
        """Bytes of per-channel vectors, partial sums and counters."""
        return sum(launch.bytes(VECTOR) for launch in self.launches)

    @property
    def stray_bytes(self) -> int:
        return sum(launch.stray for launch in self.launches)

    @property
    def passes(self) -> float:
        """``issued_bytes`` over the bytes of one activation, as are the next two."""
        return self.issued_bytes / self.nbytes

    @property
    def distinct_passes(self) -> float:
        return self.distinct_bytes / self.nbytes

    @property
    def aten_passes(self) -> float:
        return self.aten_bytes / self.nbytes

    def kind(self, tensor: Tensor) -> str:
        """``activation``, ``mask`` or ``vector``."""
        if self.sizes:
            return ACTIVATION if tensor.is_floating_point() and tensor.numel() in self.sizes else VECTOR
        if tensor.is_floating_point():
            return ACTIVATION if 2 * tensor.numel() >= self.numel else VECTOR
        return MASK if 8 * tensor.numel() * tensor.element_size() >= self.numel else VECTOR

    def _run(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            named = [*zip(executor.arg_names, args, strict=False), *kwargs.items()]
            tensors = [
                TensorTraffic(name, self.kind(tensor), *_extent(tensor))
                for name, value in named
                for tensor in _tensors(value)
            ]
            self._launch = Launch(executor.fn.__name__, tensors)
            self.launches.append(self._launch)
            try:
                return run(executor, *args, **kwargs)
            finally:
                self._launch = None

        return wrapper

    def _dot(self, dot: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._launch is not None:
                self._launch.product = True
            return dot(*args, **kwargs)

        return wrapper

    def _touch(self, pointers: np.ndarray, mask: np.ndarray | None, width: int, *, write: bool) -> None:
        if self._launch is None:
            return
        addresses = pointers if mask is None else pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        self._launch.touch(addresses.ravel().astype(np.int64), width, write=write)

    def _load(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
            self._touch(pointers, mask, np.dtype(dtype).itemsize, write=False)
            return load(pointers, mask, other, dtype)

        return wrapper

    def _store(self, store: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(pointers: Any, value: Any, mask: Any) -> Any:
            self._touch(pointers, mask, value.itemsize, write=True)
            return store(pointers, value, mask)

        return wrapper

    def _atomic_rmw(self, atomic: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(op: Any, pointers: Any, value: Any, mask: Any, sem: Any) -> Any:
            self._touch(pointers, mask, value.itemsize, write=False)
            self._touch(pointers, mask, value.itemsize, write=True)
            return atomic(op, pointers, value, mask, sem)

        return wrapper

    def _atomic_cas(self, atomic: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(pointers: Any, compare: Any, value: Any, sem: Any) -> Any:
            self._touch(pointers, None, value.itemsize, write=False)
            self._touch(pointers, None, value.itemsize, write=True)
            return atomic(pointers, compare, value, sem)

        return wrapper


class _AtenCounter(TorchDispatchMode):
    """Records ATen calls on activation-sized tensors, inside custom operators and in the backward pass too."""

    def __init__(self, meter: TrafficMeter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.meter._launch is not None:  # the interpreter's own bookkeeping
            return func(*args, **kwargs)
        if func.namespace not in ("aten", "prims"):
            with self:  # the mode is off in here; a custom operator's implementation must run under it
                return func._op_dk(_implementation(func), *args, **kwargs)
        result = func(*args, **kwargs)
        moved = _moved(func, args, kwargs, result, self.meter)
        if moved:
            self.meter.aten.append(AtenCall(str(func), moved))
        return result


def _implementation(func: Any) -> Any:
    keys = torch._C.DispatchKey
    for key in (keys.CPU, keys.CompositeExplicitAutograd, keys.CompositeImplicitAutograd):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
            return key
    raise RuntimeError(f"{func} has no implementation for CPU tensors")


def _moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, meter: TrafficMeter) -> int:
    """Activation-sized bytes an operator reads and writes; views and allocations move nothing."""
    name = func._schema.name.split("::")[1]
    if name in FREE:
        return 0
    schema = func._schema.arguments
    values = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
    again = REREAD.get(name, ()) if any(a.name in ("training", "train") and value for a, value in values) else ()
    template = name.endswith("_like") or name.startswith("new_")  # the argument gives a shape, no values
    shapes = SHAPE_ALONE.get(name, ())
    read = written = 0
    storages = set()
    mutates = False
    for argument, value in values:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        mutates |= writes
        for tensor in _tensors(value):
            storages.add(tensor.untyped_storage().data_ptr())
            size = _size(tensor, meter)
            written += size if writes else 0
            overwrites = writes and (name in OVERWRITES or argument.is_out)
            unread = overwrites or template or argument.name in shapes
            read += 0 if unread else size * (1 + (argument.name in again))
    fresh = [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in storages]
    if not fresh and not mutates:
        return 0
    return read + written + sum(_size(t, meter) for t in fresh) * (1 + (name in FILLED_FIRST))


def _size(tensor: Tensor, meter: TrafficMeter) -> int:
    """Bytes of the distinct elements of an activation-sized tensor (an expanded scalar has one), else 0."""
    if meter.kind(tensor) == VECTOR:
        return 0
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= size if stride else 1
    return distinct * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument: itself, those of a tuple or list, or a tensor descriptor's base."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(base := getattr(value, "base", None), Tensor):
        yield base


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last address of the elements."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
