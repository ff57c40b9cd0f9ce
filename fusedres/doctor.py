"""What a bug report needs: versions, devices, the backend and why, and every function checked against float64.

A check runs one function forward and backward on random tensors with a ReLU, in a dtype, and compares outputs, running
statistics and all gradients with float64 on the CPU. An error is ‖a − r‖₂ / ‖r‖₂, the largest over the tensors; a check
fails where that of a tensor is more than twice eager PyTorch's in the same dtype plus 4 eps.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import __version__, functional, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = {"torch": (2, 11), "triton": (3, 6)}
VARIABLES = (
    "FUSEDRES_BACKEND", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS",
)  # fmt: skip
_BATCH_NORM = {"input": (8, 20, 7, 9), "weight": (20,), "bias": (20,), "running_mean": (20,), "running_var": (20,)}
_OTHER_NORM = {f"other_{name}": shape for name, shape in _BATCH_NORM.items() if name != "input"}
_LINEAR = {"input": (48, 40), "weight": (24, 40), "bias": (24,)}
# function -> shapes of its tensors
FUNCTIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "batch_norm_act": _BATCH_NORM,
    "batch_norm_act + residual": _BATCH_NORM | {"residual": (8, 20, 7, 9)},
    "add_batch_norm_act": _BATCH_NORM | {"residual": (8, 20, 7, 9)},
    "batch_norm_act_conv2d": _BATCH_NORM | {"conv_weight": (12, 20, 3, 3), "conv_bias": (12,)},
    "add_batch_norm_act_conv2d": _BATCH_NORM
    | {"residual": (8, 20, 7, 9), "conv_weight": (12, 20, 3, 3), "conv_bias": (12,)},
    "batch_norm_act_max_pool2d": _BATCH_NORM,
    "batch_norm_add_batch_norm_act": _BATCH_NORM | {"other": (8, 20, 7, 9)} | _OTHER_NORM,
    "batch_norm_act_global_avg_pool2d": _BATCH_NORM,
    "batch_norm_act_global_avg_pool2d + residual": _BATCH_NORM | {"residual": (8, 20, 7, 9)},
    "layer_norm_linear_act": _LINEAR | {"ln_weight": (40,), "ln_bias": (40,)},
    "linear_layer_norm_act": _LINEAR | {"ln_weight": (24,), "ln_bias": (24,)},
    "linear_layer_norm_act + residual": _LINEAR | {"ln_weight": (24,), "ln_bias": (24,), "residual": (48, 24)},
}


@dataclass(frozen=True)
class Check:
    """One function in one dtype; ``errors`` are ours and eager's, forward, then ours and eager's, backward."""

    function: str
    dtype: torch.dtype
    path: str
    errors: tuple[float, float, float, float] | None
    problem: str | None

    def __str__(self) -> str:
        figures = "".join(f"{error:10.1e}" for error in self.errors or ())
        name = str(self.dtype).removeprefix("torch.")
        return f"  {self.function:44}{name:9} {self.path:9} {figures or ' ' * 40}  {self.problem or 'ok'}"


def diagnose() -> tuple[list[str], list[str]]:
    """The lines of the report, and what is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [*_section("versions", _versions()), *_section("devices", _devices())]
    problems = list(_outdated())
    try:
        refused = functional.refusal(device, torch.float32)
    except ValueError as error:
        refused = str(error)
        problems.append(refused)
    if device.type == "cuda" and refused and "FUSEDRES_BACKEND" not in refused:
        problems.append(f"the kernels are not used: {refused}")
    backend = f"{functional.path_for(refused)}: {refused}" if refused else f"triton, on {device}"
    lines += _section("backend", [backend])
    lines += _section("environment", [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ])
    header = f"{'':54}{'path':10}{'forward':>10}{'eager':>10}{'backward':>10}{'eager':>10}"
    checks = [check(function, dtype, device) for function in FUNCTIONS for dtype in DTYPES]
    lines += ["", "checks: error against float64, and eager PyTorch's", f"  {header}", *map(str, checks)]
    problems += [f"{item.function} in {item.dtype}: {item.problem}" for item in checks if item.problem]
    return lines, problems


def check(function: str, dtype: torch.dtype, device: torch.device) -> Check:
    """Run ``function``, a key of :data:`FUNCTIONS`, in ``dtype`` on ``device``; it may raise anything."""
    path = "?"
    try:
        path = functional.path_for(functional.refusal(device, dtype))
        tensors = _tensors(function, dtype)
        cotangents = _cotangents(function, tensors, dtype)
        exact = _run(reference, function, tensors, cotangents, torch.device("cpu"), torch.float64)
        ours = _run(functional, function, tensors, cotangents, device, None)
        eager = _run(reference, function, tensors, cotangents, device, None)
    except Exception as error:  # whatever it is belongs into the report
        first_line = (str(error).strip().splitlines() or [""])[0]
        return Check(function, dtype, path, None, f"{type(error).__name__}: {first_line}")
    errors = {name: (_error(ours[name], exact[name]), _error(eager[name], exact[name])) for name in exact}
    slack = 4 * torch.finfo(dtype).eps
    wrong = [name for name, (our, its) in errors.items() if not our <= 2 * its + slack]
    forward = [pair for name, pair in errors.items() if not name.startswith("grad")]
    backward = [pair for name, pair in errors.items() if name.startswith("grad")]
    worst = (*map(max, zip(*forward, strict=True)), *map(max, zip(*backward, strict=True)))
    return Check(function, dtype, path, worst, f"too far off: {', '.join(wrong)}" if wrong else None)


def _tensors(function: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random, the same in each call; activations and products of ``dtype``, BatchNorm's vectors in float32."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in FUNCTIONS[function].items()}
    if "conv_weight" in tensors:
        # No cotangent is 0 for one value of what a convolution reads: all of them are away from the ReLU's kink.
        tensors["input"] += (tensors["input"] + tensors.get("residual", 0)).sign()
        tensors["weight"].abs_().add_(0.5)
        tensors["bias"].clamp_(-0.1, 0.1)
    if "running_var" in tensors:
        for name in tensors.keys() & {"running_var", "other_running_var"}:
            tensors[name].abs_()
        return {name: t.to(dtype) if t.dim() > 1 or name == "conv_bias" else t for name, t in tensors.items()}
    return {name: t.to(dtype) for name, t in tensors.items()}


def _cotangents(function: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Random; 0 where rounding could decide on which side of the ReLU a value falls, or on which is the maximum."""
    given = {name: t.double() for name, t in tensors.items()}
    if function.startswith("linear"):
        given.pop("residual", None)  # it is added behind the ReLU
    *sums, out = _call(reference, function, given, act=None)
    slack = 32 * torch.finfo(dtype).eps
    near = out.abs() <= slack
    if "max_pool2d" in function:
        near |= _margin(given) <= slack
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator).masked_fill(near, 0)
    return [*(torch.randn(s.shape, generator=generator) for s in sums), cotangent]


def _margin(tensors: dict[str, Tensor]) -> Tensor:
    """By how much the largest value of a pooling window, of 3 by 3 at a stride of 2, leads the second."""
    (z,) = _call(reference, "batch_norm_act", tensors, act=None)
    windows = F.pad(z, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
    first, second = windows.topk(2).values.unbind(-1)
    return first - second


def _call(library: Any, function: str, tensors: dict[str, Tensor], act: str | None) -> tuple[Tensor, ...]:
    training = {"training": True} if "running_var" in tensors else {}
    if "other" in tensors:
        norms = [
            functional.Norm(
                *(tensors[prefix + name] for name in ("running_mean", "running_var", "weight", "bias")), training=True
            )
            for prefix in ("", "other_")
        ]
        outputs = getattr(library, function)(tensors["input"], tensors["other"], *norms, act=act)
    else:
        outputs = getattr(library, function.split()[0])(**tensors, **training, act=act)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _run(
    library: Any,
    function: str,
    tensors: dict[str, Tensor],
    cotangents: list[Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics by name, of copies of ``tensors``."""
    given = {name: t.to(device, dtype, copy=True).requires_grad_("running" not in name) for name, t in tensors.items()}
    outputs = _call(library, function, given, act="relu")
    grads = [grad.to(out.device, out.dtype) for grad, out in zip(cotangents, outputs, strict=True)]
    torch.autograd.backward(outputs, grads)
    results = {f"output {place}": out.detach() for place, out in enumerate(outputs)}
    for name, t in given.items():
        results[f"grad of {name}" if t.requires_grad else name] = t if t.grad is None else t.grad
    return results


def _error(actual: Tensor, exact: Tensor) -> float:
    """‖a − r‖₂ / ‖r‖₂; NaN where ``actual`` has one."""
    return float((actual.double().cpu() - exact).norm() / exact.norm())


def _versions() -> Iterator[str]:
    yield f"fusedres {__version__}, Python {platform.python_version()}, {platform.platform()}"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    yield f"torch {torch.__version__}, {built if torch.version.cuda or torch.version.hip else 'for CPU'}"
    yield f"triton {_triton() or 'not installed'}"
    if torch.version.cuda and torch.cuda.is_available():
        version = torch._C._cuda_getDriverVersion()  # pyright: ignore[reportAttributeAccessIssue]
        yield f"driver for CUDA {version // 1000}.{version % 1000 // 10}"


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # under another name, such as ROCm's
        return str(getattr(importlib.import_module("triton"), "__version__", "?"))


def _outdated() -> Iterator[str]:
    for name, version in (("torch", torch.__version__), ("triton", _triton() or "")):
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers and numbers < OLDEST[name]:
            yield f"{name} {version} is older than {'.'.join(map(str, OLDEST[name]))}"


def _devices() -> Iterator[str]:
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    yield f"cpu: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{memory}"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        yield (
            f"cuda:{index}: {gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} "
            f"multiprocessors, {free:.1f} of {total:.1f} GiB free"
        )


def _section(title: str, lines: Any) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)]
