"""What can be fused in a model, without changing it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.blocks import Code, FusedBlock, generate, merge_calls, original_class
from fusedres.fusion.patterns import Call, rewrite
from fusedres.fusion.reads import UntraceableError
from fusedres.fusion.runtime import is_hooked
from fusedres.fusion.tracing import trace
from fusedres.nn import BatchNormAct2d

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Plan:
    """A block: the calls of BatchNorm in its forward, and the code to give it if anything can be folded."""

    name: str
    block: nn.Module
    calls: tuple[Call, ...] = ()
    code: Code | None = None
    reason: str = ""


def make_plans(model: nn.Module, filter_fn: Filter | None = None) -> list[Plan]:
    """A plan for each module of ``model`` that has a forward of its own and BatchNorms below it."""
    refused = set()
    if filter_fn is not None:
        refused = {module for name, module in walk(model) if not filter_fn(module, name)}
    with _original_classes(model):
        return [
            _make_plan(name, block, refused)
            for name, block in walk(model)
            if _has_forward(block) and any(isinstance(part, _BatchNorm) for part in block.modules())
        ]


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``named_modules``, without what is below compiled and scripted modules."""
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if _sealed(module) is None:
            children = [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]
            pending += reversed(children)


def swap_refusal(norm: nn.Module) -> str | None:
    """Why ``norm`` cannot become a :class:`BatchNormAct2d`."""
    if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
        return f"{type(norm).__name__} is not nn.BatchNorm2d"
    if "forward" in vars(norm):
        return "its forward was replaced on the instance"
    return _sealed(norm)


def _make_plan(name: str, block: nn.Module, refused: set[nn.Module]) -> Plan:
    def refusal(norm: nn.Module) -> str | None:
        if norm in refused:
            return "filter_fn"
        return swap_refusal(norm) or ("it has hooks" if is_hooked(norm) else None)

    reason = "filter_fn" if block in refused else _block_refusal(block)
    if reason is not None:
        return Plan(name, block, reason=reason)
    try:
        (training, *reads), (evaluation, *others) = (trace(block, mode) for mode in (True, False))
        folded = rewrite(block, training, refusal), rewrite(block, evaluation, refusal)
        if folded[0].norms or folded[1].norms:
            code = generate(block, (training, evaluation), folded, (*reads, *others))
            return Plan(name, block, code.calls, code)
        return Plan(name, block, merge_calls(folded[0].calls, folded[1].calls))
    except UntraceableError as error:
        return Plan(name, block, reason=str(error))


def _has_forward(block: nn.Module) -> bool:
    return not isinstance(block, (_BatchNorm, nn.ModuleList, nn.ModuleDict))


def _block_refusal(block: nn.Module) -> str | None:
    if isinstance(block, FusedBlock):
        return "it was wrapped after it was fused"
    if "forward" in vars(block):
        return "its forward was replaced on the instance"
    if isinstance(block, torch.fx.GraphModule):
        return "its forward is generated"
    forward = type(block).forward
    if forward is not nn.Sequential.forward and str(getattr(forward, "__module__", "")).startswith("torch."):
        return f"{type(block).__name__} is a wrapper of PyTorch's"
    return _sealed(block)


def _sealed(module: nn.Module) -> str | None:
    """Why nothing below ``module`` may change."""
    if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
        return "it is compiled already"
    return "it is a ScriptModule" if isinstance(module, torch.jit.ScriptModule) else None


@contextlib.contextmanager
def _original_classes(model: nn.Module) -> Iterator[None]:
    """Blocks that are fused already, as they were."""
    fused = [(module, type(module), original_class(module)) for module in model.modules()]
    for module, _, original in fused:
        if original is not None:
            module.__class__ = original
    try:
        yield
    finally:
        for module, current, original in fused:
            if original is not None:
                module.__class__ = current
