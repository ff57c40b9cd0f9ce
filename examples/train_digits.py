"""Train a small ResNet on scikit-learn's digits twice from one seed, as it is and fused, and print both losses.

    python examples/train_digits.py

On a GPU the fused network runs the kernels. Elsewhere it runs PyTorch's own operators (``FUSEDRES_BACKEND=reference``
or no kernel for the device), so that the two columns differ by rounding alone.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fusedres

BATCH = 128
RATE = 0.1


def load(device: torch.device) -> list[Tensor]:
    """Training and held-out images ``(N, 1, 8, 8)``, and the labels of both."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=450, random_state=0, stratify=labels)
    x, x_held, y, y_held = (torch.as_tensor(part, device=device) for part in split)
    return [*(part.float().view(-1, 1, 8, 8) for part in (x, x_held)), y, y_held]


def build(device: torch.device) -> nn.Module:
    """A ResNet with 9 convolutions, plain PyTorch; the same weights each time."""
    torch.manual_seed(0)
    block = fusedres.models.BasicBlock
    model = fusedres.models.ResNet(block, [1, 1, 1, 1], 10, in_channels=1, width=16, small_input=True)
    return model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> Iterator[float]:
    """The mean loss of each epoch; the batches come in the same order each time."""
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * -(-len(y) // BATCH))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        total = torch.zeros((), device=x.device)
        for batch in torch.randperm(len(y), generator=generator).to(x.device).split(BATCH):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(batch) / len(y)
        yield total.item()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images classified right."""
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    epochs = parser.parse_args().epochs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, x_held, y, y_held = load(device)
    eager, fused = build(device), fusedres.fuse(build(device))
    rows = fusedres.explain(fused).rows
    print("fused:", ", ".join(f"{count} {name}" for name, count in Counter(row["pattern"] for row in rows).items()))
    print("path:", ", ".join({row["path"]: "" for row in rows}))
    print("epoch  eager   fused")
    for epoch, losses in enumerate(zip(*(train(model, x, y, epochs) for model in (eager, fused)), strict=True)):
        print(f"{epoch + 1:5d}  {losses[0]:.4f}  {losses[1]:.4f}", flush=True)
    shares = (accuracy(model, x_held, y_held) for model in (eager, fused))
    print("right  " + "   ".join(f"{share:.1%}" for share in shares))


if __name__ == "__main__":
    main()
