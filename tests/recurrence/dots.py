"""Pictures whose rows must be compared from end to end, for training/train_terminator.py and its tests."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tilewise.recurrence import Terminator

WEIGHTS = Path(__file__).parent / "weights"
SIZE, MARKS, APART = 16, 3, 6


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures `[count, SIZE, SIZE, 2]` with three red and three blue dots, and whether two stand in one row.

    Dots of one row are at least APART columns from each other; there is one such pair of a red and a blue
    one, or none.
    """
    g = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(count, SIZE, SIZE, 2, generator=g)
    label = torch.randint(2, (count,), generator=g)
    rows = torch.rand(count, SIZE, generator=g).argsort(1)[:, : 2 * MARKS]
    columns = torch.randint(SIZE, (count, 2 * MARKS), generator=g)
    gap = torch.randint(APART, SIZE - APART + 1, (count,), generator=g)
    rows[:, MARKS] = torch.where(label == 1, rows[:, 0], rows[:, MARKS])
    columns[:, MARKS] = torch.where(label == 1, (columns[:, 0] + gap) % SIZE, columns[:, MARKS])
    for dot in range(2 * MARKS):
        images[torch.arange(count), rows[:, dot], columns[:, dot], dot // MARKS] += 3
    return images, label


def network(reach: str) -> Terminator:
    """Two blocks whose local branches see 3 x 3 places; `reach` is of the global ones."""
    return Terminator(2, SIZE, 2, factors=(6, 2), kernels=(3, 3, 3, 3), reach=reach)


def trained(reach: str) -> Terminator:
    """The network that training/train_terminator.py made."""
    net, found = network(reach), load_file(WEIGHTS / f"terminator-{reach}.safetensors")
    net.load_state_dict({n: p.float() if p.is_floating_point() else p for n, p in found.items()})
    return net.eval()


@torch.no_grad()
def right(net: Terminator, count: int = 2000, seed: int = 10**6) -> float:
    """The share of fresh pictures told rightly."""
    images, label = pictures(count, seed)
    return (net(images).argmax(1) == label).float().mean().item()
