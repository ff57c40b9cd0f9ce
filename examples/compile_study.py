"""What a training step of one residual block calls: eager, torch.compile, fusedres, and both together.

    python examples/compile_study.py

Calls are counted, not time: where there is no GPU the kernels run in Triton's interpreter, which takes a thousand times
as long, and Inductor writes C++. A call of fusedres is an operator of one to three launches. ``--backend aot_eager``
leaves Inductor out, which needs a C++ compiler on a CPU.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch._inductor.config as inductor
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fusedres

SHAPE = (4, 32, 8, 8)
# Who runs it, by the name that the profiler gives to a call; all else is views, allocations and bookkeeping.
KINDS = {
    "convolutions": r"aten::(conv2d|convolution|convolution_backward)",
    "PyTorch": r"aten::(\w*batch_norm\w*|relu_?|threshold_backward|add_?)",
    "Inductor": r"(graph_\d+_cpp|triton)_\w+",
    "fusedres": r"fusedres::\w+",
}


def variants(backend: str) -> dict[str, Callable[[nn.Module], Any]]:
    """What is done to the block before its step; ``backend`` is what torch.compile hands its graphs to."""
    stop: dict[str, Any] = {} if backend == "inductor" else {"options": {"stop": backend}}
    return {
        "eager": lambda block: block,
        "torch.compile": lambda block: torch.compile(block, backend=backend),
        "fusedres": fusedres.fuse,
        "fusedres, torch.compile": lambda block: torch.compile(fusedres.fuse(block), backend=backend),
        'backend="fusedres"': lambda block: torch.compile(block, backend="fusedres", **stop),
    }


def build(device: torch.device) -> nn.Module:
    """Two convolutions, two BatchNorms and a skip, plain PyTorch; the same weights each time."""
    torch.manual_seed(0)
    block = fusedres.models.BasicBlock(SHAPE[1], SHAPE[1])
    return block.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def step(block: Any, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients of a training step."""
    x = x.detach().requires_grad_()
    out = block(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], cotangent)]


def count(run: Callable[[], object]) -> Counter[str]:
    """Calls of ``run`` by kind; those that PyTorch or fusedres makes inside a call are part of it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    calls = [event for event in profiled.events() or () if not is_inside(event)]
    return Counter(kind for call in calls for kind, pattern in KINDS.items() if re.fullmatch(pattern, call.name))


def is_inside(event: Any) -> bool:
    """Whether ``event`` belongs to an operator that is counted itself."""
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith(("aten::", "fusedres::")) or is_inside(parent))


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative difference of a tensor."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", help="inductor (the default), aot_eager or eager")
    backend = parser.parse_args().backend
    inductor.cpp.enable_kernel_profile = True  # for the profiler to see its C++
    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, cotangent = (torch.randn(SHAPE, device=device).to(memory_format=torch.channels_last) for _ in range(2))
    exact = step(build(device).double(), x.double(), cotangent.double())
    print(f"{'':24}" + "".join(f"{kind:>14}" for kind in KINDS) + f"{'error':>12}")
    for name, prepare in variants(backend).items():
        torch.compiler.reset()
        block = prepare(build(device))
        wrong = error(step(block, x, cotangent), exact)
        calls = count(lambda block=block: step(block, x, cotangent))
        print(f"{name:24}" + "".join(f"{calls[kind]:14d}" for kind in KINDS) + f"{wrong:12.1e}", flush=True)


if __name__ == "__main__":
    main()
