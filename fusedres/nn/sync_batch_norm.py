"""BatchNorm over the batches of all ranks, and the conversion of a model to it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.nn.batch_norm import BatchNormAct2d

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class SyncBatchNormAct(BatchNormAct2d):
    """:class:`BatchNormAct2d` with, in training, the statistics of the batches of all ranks.

    Input is ``(N, C, *)``, and N may differ between ranks or be 0. In evaluation, in a group of one rank or outside of
    the group, and where :mod:`torch.distributed` is not initialised, it is a BatchNormAct2d. Else a layer takes one
    all-gather in the forward and one all-reduce in the backward, see ``group`` of
    :func:`fusedres.functional.batch_norm_act`. A module that holds a process group cannot be copied or pickled, as in
    :class:`torch.nn.SyncBatchNorm`.

    Args:
        process_group: the ranks to normalise with; ``None`` is all of them. Keyword only; the other arguments are
            those of :class:`BatchNormAct2d`.

    Raises:
        ValueError: an unknown ``act``.
    """

    process_group: Any

    def __init__(self, num_features: int, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must have at least 2 dimensions (N, C, *), got shape {tuple(input.shape)}")

    def _group(self) -> Any:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return None if group == dist.GroupMember.NON_GROUP_MEMBER else group


OWN_NORMS = (BatchNormAct2d, SyncBatchNormAct)
_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *OWN_NORMS)


def convert_sync_batchnorm(model: ModuleT, process_group: Any = None) -> ModuleT:
    """Turn every BatchNorm of ``model``, in place, into a :class:`fusedres.nn.SyncBatchNormAct`.

    The modules stay the same objects, with their tensors, hooks and activations, so that optimizers and what
    :func:`fusedres.fuse` has rewritten stay valid; it may be called before or after. Wrap the model in DDP or FSDP
    later. The counterpart of ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``.

    Args:
        model: any module.
        process_group: the ranks to normalise with; ``None`` is all of them.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: it has a BatchNorm of another class, of which more than the statistics might be lost. Nothing has
            been converted then.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in norms.items():
        if type(norm) not in _CONVERTED:
            raise TypeError(f"{name or 'the model'} is a {type(norm).__name__}, which cannot be converted")
    for norm in norms.values():
        if not isinstance(norm, BatchNormAct2d):
            norm.act = None  # pyright: ignore[reportArgumentType]
        norm.__class__ = SyncBatchNormAct
        norm.process_group = process_group
    return model
