"""fuse and unfuse."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from torch import nn

from fusedres.fusion.derived import original_class
from fusedres.fusion.foreign import TakenNorm, is_timms, take
from fusedres.fusion.install import install_all
from fusedres.fusion.options import make_options
from fusedres.fusion.refusals import Filter, sealed, swap_refusal, walk
from fusedres.nn import OWN_NORMS, SyncBatchNormAct, as_batch_norm_act

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_TAKEN = "_fusedres_taken"


def fuse(
    model: ModuleT,
    filter_fn: Filter | None = None,
    *,
    disable: Collection[str] = (),
    save: str = "activations",
) -> ModuleT:
    """Fuse BatchNorm, or LayerNorm and Linear, with residual additions and ReLU all over ``model``, in place.

    Each ``nn.BatchNorm2d`` becomes a :class:`fusedres.nn.BatchNormAct2d`, the same object with the same tensors and
    hooks; timm's BatchNormAct2d keeps its class and gets a fused forward; ``nn.Linear`` and ``nn.LayerNorm`` stay what
    they are. The largest modules whose forwards torch.fx traces get a forward rewritten from that graph, and stay
    instances of their classes; :func:`explain` says why others are left alone. Parameters, buffers and ``state_dict``
    are unchanged, results up to rounding. Fusing a fused model again, with the same arguments, changes nothing.

    A call in which modules were replaced, patched, hooked or switched to another mode, or with other arguments than
    tensors, is traced anew, up to a number of times, or runs the original forward. What a forward reads beside its
    arguments and modules (attributes, globals, the clock) is as it was when it was traced: call ``fuse`` again after a
    change. Other threads may run other models meanwhile, but not this one.

    Args:
        model: any module.
        filter_fn: called with each module and its qualified name; where it returns ``False``, that BatchNorm, Linear
            or LayerNorm, or that module's own forward, is left alone.
        disable: fusions to leave out: ``"stem"`` (the first BatchNorm and ReLU with max pooling), ``"join"`` (both
            BatchNorms of a projection), ``"fork"`` (two gradients that meet, added in a reduction), ``"head"`` (the
            last activation with global average pooling), ``"preact"`` (the sums of pre-activation networks) and
            ``"linear"`` (LayerNorm and Linear).
        save: ``"recompute"`` keeps the input of a BatchNorm, not the output of its ReLU, where that feeds one
            convolution, whose backward computes it again: less memory for one more read and write of it.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an unknown name in ``disable``, or an unknown ``save``.
    """
    options = make_options(disable, save)
    for _, module in walk(model):
        if sealed(module) is None and original_class(module) is not None:  # what was wrapped since stays
            _restore(module)
    refused = set() if filter_fn is None else {part for name, part in walk(model) if not filter_fn(part, name)}
    for _, norm in list(walk(model)):
        if _may_be_taken(norm) and swap_refusal(norm) is None and norm not in refused:
            _take(norm)
    install_all(model, refused, options)
    return model


def unfuse(model: ModuleT) -> ModuleT:
    """Undo :func:`fuse` in place, over the same tensors, and return ``model``; modules of ours from elsewhere stay."""
    for module in model.modules():
        _restore(module)
        if is_taken(module):
            delattr(module, _TAKEN)
            if not isinstance(module, SyncBatchNormAct):
                del module.act
                module.__class__ = nn.BatchNorm2d
    return model


def is_taken(module: nn.Module) -> bool:
    """Whether ``fuse`` made this a BatchNormAct2d, or may call it as one, or gave timm's its forward."""
    return isinstance(module, TakenNorm) or (type(module) in OWN_NORMS and _TAKEN in vars(module))


def _may_be_taken(module: nn.Module) -> bool:
    """A plain BatchNorm, also as ``convert_sync_batchnorm`` leaves it, or timm's."""
    converted = isinstance(module, SyncBatchNormAct) and module.act is None
    return type(module) is nn.BatchNorm2d or converted or is_timms(module)


def _take(norm: nn.Module) -> None:
    if is_timms(norm):
        take(norm)
    else:
        as_batch_norm_act(norm, act=None)
        setattr(norm, _TAKEN, True)


def _restore(block: nn.Module) -> None:
    original = original_class(block)
    if original is not None:
        block.__class__ = original
    vars(block).pop("_fusedres_region", None)
