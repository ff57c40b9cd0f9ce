"""What a training step of a convolutional network moves beside its convolutions, by kind of operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.instruments.meter import ACTIVATION, MASK, VECTOR, Launch, TrafficMeter

KINDS: tuple[str, ...] = ("norm", "relu", "add", "accumulation", "pool", "other", "kernel")
# By ATen's name; what is not here is "other": casts, copies, fills. The last two are the average pool's.
OPERATIONS = {
    "native_batch_norm": "norm", "native_batch_norm_backward": "norm",
    "relu": "relu", "relu_": "relu", "threshold_backward": "relu",
    "add": "add", "add_": "add",
    "max_pool2d_with_indices": "pool", "max_pool2d_with_indices_backward": "pool", "mean": "pool", "div": "pool",
}  # fmt: skip
PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm"}
MASKS = (torch.uint8, torch.int8, torch.bool)
Moved = dict[str, tuple[int, int]]  # name -> how often it ran, bytes


def is_activation(shape: Sequence[int], batch: int) -> bool:
    """Whether a tensor of a network that runs on so many images holds values of each of them: (N, C, H, W)."""
    return len(shape) == 4 and shape[0] == batch


class NetworkMeter(TrafficMeter):
    """Counts activations of every size: 4-dimensional tensors of as many images as the input, and masks.

    Vectors of channels, labels and logits are none; no weight may have ``len(images)`` for its first extent.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.batch = len(images)

    def kind(self, tensor: Tensor) -> str:
        """Masks are also the places that a pooling kept, of one byte an element or as ATen's integers."""
        if tensor.dtype in MASKS:
            return MASK
        if not is_activation(tensor.shape, self.batch):
            return VECTOR
        return ACTIVATION if tensor.is_floating_point() else MASK

    @property
    def kernels(self) -> Moved:
        """Launches and elementwise bytes of the package's kernels, products left out."""
        return _summed((launch.kernel, elementwise_bytes(launch)) for launch in self.launches if not launch.product)

    @property
    def operators(self) -> Moved:
        """Calls and bytes of ATen's operators beside the kernels, products left out."""
        return _summed((name, call.bytes) for call in self.aten if (name := _short(call.op)) not in PRODUCTS)

    @property
    def product_bytes(self) -> int:
        """Activations that products read and write, each once: ATen's convolutions, and kernels that multiply."""
        own = sum(launch.bytes(ACTIVATION, MASK, distinct=True) for launch in self.launches if launch.product)
        return own + sum(call.bytes for call in self.aten if _short(call.op) in PRODUCTS)

    def moved(self, *, backward: bool) -> dict[str, int]:
        """Elementwise bytes by ``KINDS``; additions in the backward are autograd's, where two gradients meet."""
        found = dict.fromkeys(KINDS, 0)
        found["kernel"] = sum(size for _, size in self.kernels.values())
        for name, (_, size) in self.operators.items():
            kind = OPERATIONS.get(name, "other")
            found["accumulation" if backward and kind == "add" else kind] += size
        return found


def elementwise_bytes(launch: Launch) -> int:
    """Issued bytes of activations and masks; of pooling, whose windows overlap in the cache, distinct ones."""
    return launch.bytes(ACTIVATION, MASK, distinct="pool" in launch.kernel)


def figures(meters: Mapping[str, NetworkMeter]) -> dict[str, float | None]:
    """Of the meters of a step's ``forward`` and ``backward``."""
    forward, backward = (meters[phase].moved(backward=phase == "backward") for phase in ("forward", "backward"))
    both = meters.values()
    sizes = {
        "moved": sum(forward.values()) + sum(backward.values()),
        "forward": sum(forward.values()),
        "backward": sum(backward.values()),
        **{kind: forward[kind] + backward[kind] for kind in KINDS},
        "product": sum(meter.product_bytes for meter in both),
        "vector": sum(meter.vector_bytes for meter in both),
    }
    return in_mib(sizes) | {
        "launches": float(sum(len(meter.launches) for meter in both)),
        "operators": float(sum(calls for meter in both for calls, _ in meter.operators.values())),
    }


def in_mib(sizes: Mapping[str, int]) -> dict[str, float | None]:
    """Bytes as figures that are named after their unit."""
    return {f"{name}_mib": round(size / 2**20, 4) for name, size in sizes.items()}


def _short(op: str) -> str:
    """``relu_`` of ``aten.relu_.default``."""
    return op.split(".")[1]


def _summed(pairs: Iterable[tuple[str, int]]) -> Moved:
    found: Moved = {}
    for name, size in pairs:
        calls, total = found.get(name, (0, 0))
        found[name] = calls + 1, total + size
    return found
