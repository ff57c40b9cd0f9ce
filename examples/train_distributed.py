"""Train a fused ResNet on scikit-learn's digits, one process a device, with BatchNorm over all of them.

    torchrun --nproc-per-node 2 examples/train_distributed.py

uses NCCL where there are GPUs, one for each process, and gloo on the CPU elsewhere. ``--fsdp`` shards the parameters
instead of keeping a copy on every rank, ``--compile`` compiles the network.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from train_digits import accuracy, load

import fusedres

BATCH = 128  # images a step, over all ranks
RATE = 0.1


def start() -> torch.device:
    """Join the other processes; the device of this one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def build(device: torch.device, *, shard: bool, compiled: bool) -> nn.Module:
    """A ResNet with 9 convolutions, fused, its BatchNorms synchronised, then distributed."""
    torch.manual_seed(0)  # FSDP does not copy the weights of rank 0 to the others
    block = fusedres.models.BasicBlock
    model: nn.Module = fusedres.models.ResNet(block, [1, 1, 1, 1], 10, in_channels=1, width=16, small_input=True)
    model = fusedres.convert_sync_batchnorm(fusedres.fuse(model.to(device)))
    if compiled:
        model.compile()
    if shard:
        fully_shard(model)
        return model
    model = model.to(memory_format=torch.channels_last)  # FSDP refuses such parameters  # pyright: ignore[reportCallIssue]
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device.index])


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Every rank takes its share of each batch; the last of an epoch is smaller, and uneven."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * -(-len(y) // BATCH))
    generator = torch.Generator().manual_seed(0)  # the same order everywhere
    model.train()
    for epoch in range(epochs):
        total = torch.zeros((), device=x.device)
        for batch in torch.randperm(len(y), generator=generator).to(x.device).split(BATCH):
            mine = batch[rank::ranks]
            # DDP and FSDP average gradients over the ranks: a sum over the whole batch, divided by its size.
            loss = F.cross_entropy(model(x[mine]), y[mine], reduction="sum") * ranks / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() / ranks * len(batch) / len(y)
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters over the ranks")
    parser.add_argument("--compile", action="store_true", help="compile the network")
    options = parser.parse_args()
    device = start()
    x, x_held, y, y_held = load(device)
    model = build(device, shard=options.fsdp, compiled=options.compile)
    train(model, x, y, options.epochs)
    share = accuracy(model, x_held, y_held)
    if dist.get_rank() == 0:
        print(f"held-out accuracy: {share:.1%}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
