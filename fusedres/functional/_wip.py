from __future__ import annotations
from typing import Any
import torch, torch.nn.functional as F
from torch import Tensor
from fusedres.functional.batch_norm import batch_norm_act


def _bn(input, norm, residual=None, act=None):
    return batch_norm_act(input, *norm[:7], residual=residual, act=act, num_batches_tracked=norm[7])


def forked_batch_norm_act(input, norm, *, residual=None, act=None):
    o = _bn(input, norm, residual, act)
    return o, o


def batch_norm_act_global_avg_pool2d(input, *a, residual=None, act=None, num_batches_tracked=None):
    return F.adaptive_avg_pool2d(
        batch_norm_act(input, *a, residual=residual, act=act, num_batches_tracked=num_batches_tracked), 1
    )


def batch_norm_act_max_pool2d(input, *a, act="relu", num_batches_tracked=None, **w):
    return F.max_pool2d(batch_norm_act(input, *a, act=act, num_batches_tracked=num_batches_tracked), **w)


def forked_batch_norm_act_max_pool2d(input, norm, *, act="relu", **w):
    o = F.max_pool2d(_bn(input, norm, None, act), **w)
    return o, o


def batch_norm_add_batch_norm_act(input, other, norm, other_norm, *, act=None):
    return _bn(input, norm, _bn(other, other_norm), act)


def forked_batch_norm_add_batch_norm_act(input, other, norm, other_norm, *, act=None):
    o = batch_norm_add_batch_norm_act(input, other, norm, other_norm, act=act)
    return o, o


def batch_norm_act_conv2d(
    input,
    *a,
    act="relu",
    conv_weight,
    conv_bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    num_batches_tracked=None,
):
    return F.conv2d(
        batch_norm_act(input, *a, act=act, num_batches_tracked=num_batches_tracked),
        conv_weight,
        conv_bias,
        stride,
        padding,
        dilation,
        groups,
    )
