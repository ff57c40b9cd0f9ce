"""What a call costs the host, without a GPU: everything up to the driver's launch runs, on CPU tensors.

Triton binds arguments, computes its cache key and finds the kernel, compiled for an H100, as it would there; only the
launch itself, a C function that calls the driver, is left out, and so is what the GPU does. The caching allocator of a
GPU is replaced by the CPU's, and three functions of ``torch.cuda`` that say which stream and device are current by
Python functions that return 0. Kernels must not be interpreted here (``TRITON_INTERPRET`` unset).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fusedres.functional.checks import check_batch_norm
from fusedres.kernels import workspace
from fusedres.nn.batch_norm import batch_norm_state
from fusedres.ops import dispatch, use_kernels

GPU = torch.device("cuda", 0)
LAUNCHERS = {
    "forward": "batch_norm_forward.batch_norm_act_forward",
    "backward": "batch_norm_backward.batch_norm_act_backward",
    "inference": "batch_norm_forward.batch_norm_act_inference_forward",
}
Timed = tuple[AbstractContextManager[object], Callable[[], object]]  # what is patched meanwhile
CALLS, ROUNDS = 10, 150  # the least of so many rounds of so few calls, which end before the scheduler steps in


class _Utils:
    """Of a GPU that loads every kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and the most threads."""
        return 1, 1, 32, 0, 1024


class _Launcher:
    """In place of the C function."""

    def __init__(self, source: object, metadata: object) -> None: ...

    def __call__(self, *_: object) -> None: ...


class _Driver:
    """What Triton asks for between a call and its launch."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def stub_gpu() -> Iterator[None]:
    """Kernels are launched for CPU tensors, on a GPU that is not there; outputs are not written."""
    before = driver._active
    slab = torch.zeros((workspace.STREAMS, workspace.COUNTERS), dtype=torch.int32).unbind()
    counters, on_device = workspace.counters, workspace.on_device
    with ExitStack() as stack:
        stack.callback(driver.set_active, before)  # pyright: ignore[reportArgumentType]
        driver.set_active(_Driver())  # pyright: ignore[reportArgumentType]
        enter = stack.enter_context
        enter(mock.patch.object(dispatch, "_triton", lambda: (True, True)))
        enter(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        enter(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        enter(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True))
        enter(mock.patch.object(workspace, "reserve", lambda device: slab))
        for module in ("batch_norm_forward", "batch_norm_statistics", "batch_norm_backward"):
            enter(mock.patch(f"fusedres.kernels.{module}.counters", lambda device: counters(GPU)))
            enter(mock.patch(f"fusedres.kernels.{module}.on_device", lambda device: on_device(GPU)))
        yield


def microseconds(calls: Mapping[str, Timed]) -> dict[str, float]:
    """The least time of a call of each, in µs; rounds take turns, as a shared machine is slow for a while."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, (patch, call) in calls.items():
            with patch:
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / CALLS)
    return {name: 1e6 * seconds for name, seconds in best.items()}


def step(mode: str, ours: Callable[..., Tensor], norm: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A call of ``ours`` on ``inputs``, or its backward alone, to the inputs and the parameters of ``norm``."""
    if mode != "backward":
        return lambda: ours(*inputs)
    out = ours(*inputs)
    leaves, grad = [*inputs, *norm.parameters()], torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def parts(mode: str, ours: Callable[..., Tensor], norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Microseconds of a :func:`step` under :func:`stub_gpu`, and of its parts; the second input is a residual.

    ``host_us`` is made of ``validation_us`` (arguments), ``dispatch_us`` (kernels or reference), ``launcher_us``
    (outputs, scratch, tiling), ``triton_us`` (``JITFunction.run``), and ``operator_us``, the rest: the module,
    PyTorch's dispatcher and autograd. What is not measured by itself is what a call is faster by without it.
    """
    x, residual = inputs[0], inputs[1] if len(inputs) > 1 else None
    state = batch_norm_state(norm, x)
    call = step(mode, ours, norm, inputs)
    call()  # compiles

    def outputs(*_: object, **__: object) -> tuple[Tensor, ...]:
        return torch.empty_like(x), torch.empty((4, x.shape[1])), torch.empty(0)

    calls: dict[str, Timed] = {
        "host": (nullcontext(), call),
        "no triton": (mock.patch.object(JITFunction, "run", lambda *args, **kwargs: None), call),
        "no launcher": (mock.patch(f"fusedres.kernels.{LAUNCHERS[mode]}", outputs), call),
        "outputs": (nullcontext(), outputs),
        "validation": (nullcontext(), lambda: check_batch_norm(x, state, residual, "relu")),
        "dispatch": (nullcontext(), lambda: use_kernels(x, residual, *state.tensors)),
    }
    t = microseconds(calls)
    outside = t["no launcher"] - t["outputs"]
    before = {"validation_us": 0.0, "dispatch_us": 0.0}
    if mode != "backward":
        before = {"validation_us": t["validation"], "dispatch_us": t["dispatch"]}
    return {
        "host_us": t["host"], **before, "operator_us": outside - sum(before.values()),
        "launcher_us": t["no triton"] - outside, "triton_us": t["host"] - t["no triton"],
    }  # fmt: skip
