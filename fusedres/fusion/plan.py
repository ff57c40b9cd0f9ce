"""What can be fused in a model, without changing it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.blocks import Code, FusedBlock, check_source, generate, merge_calls, merge_given
from fusedres.fusion.chains import NATIVE, Chain
from fusedres.fusion.derived import original_class
from fusedres.fusion.foreign import is_foreign, is_timms
from fusedres.fusion.joins import Forms, Joined, join
from fusedres.fusion.pairs import is_native
from fusedres.fusion.patterns import rewrite
from fusedres.fusion.reads import UntraceableError, mentions
from fusedres.fusion.rewriting import Call
from fusedres.fusion.runtime import is_hooked, is_plain
from fusedres.fusion.tracing import parameters, trace
from fusedres.nn import OWN_NORMS, LayerNormLinear, LinearLayerNorm, ResidualMLPBlock

Filter = Callable[[nn.Module, str], bool]
# Fused by those who built them; the pattern is reported under their LayerNorm.
OWN_BLOCKS: dict[type[nn.Module], Call] = {
    LayerNormLinear: Call("norm", "ln_linear_act"),
    LinearLayerNorm: Call("norm", "linear_ln_act"),
    ResidualMLPBlock: Call("norm", "linear_ln_act", "with the addition", adds=True),
}


@dataclass(frozen=True)
class Plan:
    """A block: the calls of normalisations in its forward, the code if anything can be folded, and its chain."""

    name: str
    block: nn.Module
    calls: tuple[Call, ...] = ()
    code: Code | None = None
    reason: str = ""
    chain: Chain | None = None


def make_plans(model: nn.Module, filter_fn: Filter | None = None) -> list[Plan]:
    """A plan for each module of ``model`` that has a forward of its own and a pattern's layers in or below it."""
    refused = set()
    if filter_fn is not None:
        refused = {module for name, module in walk(model) if not filter_fn(module, name)}
    names = {block: name for name, block in walk(model) if _has_forward(block) and _has_layers(block)}
    plans: dict[nn.Module, Plan] = {}
    chains: dict[nn.Module, Chain] = {}
    visited = {model}

    def visit(block: nn.Module) -> None:
        """Children first, for their parents pass pairs on between them."""
        for part in block.children():
            if part not in visited:
                visited.add(part)
                visit(part)
        if block in names:
            plan = plans[block] = _make_plan(names[block], block, refused, chains)
            if plan.chain is not None:
                chains[block] = plan.chain

    with original_classes(model):
        visit(model)
    return [plans[block] for block in names]


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
        if sealed(module) is None:
            children = [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]
            pending += reversed(children)


def swap_refusal(norm: nn.Module) -> str | None:
    """Why ``norm`` cannot become one of :mod:`fusedres.nn`, or timm's get our forward."""
    if type(norm) not in (nn.BatchNorm2d, *OWN_NORMS) and not is_timms(norm):
        return f"{type(norm).__name__} is not nn.BatchNorm2d"
    if "forward" in vars(norm):
        return "its forward was replaced on the instance"
    return sealed(norm)


def layer_refusal(layer: nn.Module) -> str | None:
    """Why a fused forward cannot stand for the call of ``layer``, a Linear or a LayerNorm."""
    kind = nn.LayerNorm if isinstance(layer, nn.LayerNorm) else nn.Linear
    if type(layer) is not kind:
        return f"{type(layer).__name__} is not nn.{kind.__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
        return "it normalises over more than the last dimension"
    for name, tensor in layer.named_parameters():
        if not is_plain(tensor):
            return f"its {name} is a {type(tensor).__name__}"
    return sealed(layer)


def own_layers(block: nn.Module) -> Iterator[nn.Module]:
    """The children that the forward of ``block`` itself may call: those in containers without a forward too."""
    for child in block.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and not _has_forward(child):
            yield from own_layers(child)
        else:
            yield child


def _make_plan(name: str, block: nn.Module, refused: set[nn.Module], chains: dict[nn.Module, Chain]) -> Plan:
    def refusal(module: nn.Module) -> str | None:
        if module in refused:
            return "filter_fn"
        reason = swap_refusal(module) if isinstance(module, _BatchNorm) else layer_refusal(module)
        return reason or ("it has hooks" if is_hooked(module) else None)

    def fusable(norm: nn.Module) -> bool:
        return refusal(norm) is None and (is_foreign(norm) or not is_timms(norm))

    def forms(graph: fx.Graph) -> Forms:
        folded = rewrite(block, graph, refusal)
        if not _has_batch_norm(block):
            return Forms(folded, Joined(graph), None)
        return join(block, graph, folded, chains, fusable)

    if type(block) in OWN_BLOCKS:
        return Plan(name, block, (replace(OWN_BLOCKS[type(block)], acts=getattr(block, "act", None) is not None),))
    reason = "filter_fn" if block in refused else _block_refusal(block)
    if reason is not None:
        return Plan(name, block, reason=reason)
    try:
        (training, *reads), (evaluation, *others) = (trace(block, mode) for mode in (True, False))
        both = forms(training), forms(evaluation)
        native = is_native(block)  # knows what a second forward would
        if any(form.is_rewritten(native) for form in both):
            code = generate(block, both, (*reads, *others))
            check_source(code)
            code = _with_optional(block, code, forms)
            return Plan(name, block, code.calls, code, chain=code.chain)
        calls = merge_calls(both[0].folded.calls, both[1].folded.calls)
        return Plan(name, block, calls, chain=NATIVE if native else None)
    except UntraceableError as error:
        return Plan(name, block, reason=str(error))


def _with_optional(block: nn.Module, code: Code, forms: Callable[[fx.Graph], Forms]) -> Code:
    """``code``, with another one for calls that give the first optional argument; its rows say what is for which."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    required, some = (parameters(type(block).forward, given)[0] for given in (0, 1))
    if len(some) > len(required):
        with contextlib.suppress(UntraceableError):
            (training, *reads), (evaluation, *others) = (trace(block, mode, given=1) for mode in (True, False))
            given = generate(block, (forms(training), forms(evaluation)), (*reads, *others), optional=1)
            check_source(given)
            calls = merge_given(code.calls, given.calls, some[-1], names[len(some) :])
            return replace(code, given=given, attributes=code.attributes | given.attributes, calls=calls)
    return replace(code, calls=merge_given(code.calls, code.calls, "", names[len(required) :]))


def _has_forward(block: nn.Module) -> bool:
    """Whether ``block`` has one to rewrite; containers may, such as torchvision's IntermediateLayerGetter."""
    if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        return type(block).forward is not nn.Module.forward
    return not isinstance(block, (_BatchNorm, nn.LayerNorm))


def _has_layers(block: nn.Module) -> bool:
    """Whether the forward of ``block`` is worth a trace: no pattern is without a normalisation."""
    parts = list(block.modules())
    if _has_batch_norm(block):
        return True
    return all(
        any(isinstance(part, kind) for part in parts) or mentions(type(block), function)
        for kind, function in ((nn.LayerNorm, "layer_norm"), (nn.Linear, "linear"))
    )


def _has_batch_norm(block: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in block.modules())


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
    return sealed(block)


def sealed(module: nn.Module) -> str | None:
    """Why nothing below ``module`` may change."""
    if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
        return "it is compiled already; call fuse before compiling"
    return "it is a ScriptModule" if isinstance(module, torch.jit.ScriptModule) else None


@contextlib.contextmanager
def original_classes(model: nn.Module) -> Iterator[None]:
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
