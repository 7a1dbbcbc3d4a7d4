"""Noisy pictures that say the same or the opposite on both sides of their diagonal, and small nets that tell
which: for training/train_mirrored.py."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence import HyperZZW

WEIGHTS = Path(__file__).parent / "weights"
SIZE, AGAIN = 16, 0.5  # cells drawn anew
# Channels: nets without kernels, or without what the picture shows, get more, and have then more parameters.
CHANNELS = {"all": 8, "plain": 24, "fixed": 24, "own": 24}
# Where a picture is mirrored (1) and where inverted (-1), by blocks. Blocks taken in the order 1, 3, 0, 2, rows
# and columns alike, make the opposite pattern: who does not know where a cell stands cannot tell one from the
# other.
BLOCKS = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [-1, 1, -1, 1], [-1, -1, 1, 1]])
OTHER = (1, 3, 0, 2)


def pattern() -> Tensor:
    """`[SIZE, SIZE]` of -1 and 1."""
    part = SIZE // len(BLOCKS)
    return BLOCKS.repeat_interleave(part, 0).repeat_interleave(part, 1).float()


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures `[count, 1, SIZE, SIZE]` of -1 and 1, and whether each follows the pattern (1) or its opposite
    (0).

    A cell is its mirror cell across the diagonal times the sign of the place; then AGAIN of all cells are
    drawn anew. Each row and each column alone, and each pair of cells that are not each other's mirror, look
    alike in both.
    """
    gen = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return torch.randint(2, (count, SIZE, SIZE), generator=gen).float() * 2 - 1

    first, label = drawn(), torch.randint(2, (count,), generator=gen)
    signs = (2 * label - 1).view(-1, 1, 1) * pattern()
    images = first.triu() + (signs * first.triu(1).mT).tril(-1)
    again = torch.rand(images.shape, generator=gen) < AGAIN
    return torch.where(again, drawn(), images).unsqueeze(1), label


def best(images: Tensor) -> Tensor:
    """The likelier label of each picture, all that can be known."""
    cells = images[:, 0]
    return ((pattern() * cells * cells.mT).triu(1).sum((1, 2)) > 0).long()


class Layer(nn.Module):
    """The operator on two views of the channels, beside them; mixed, standardised and bent."""

    def __init__(self, channels: int, reach: str) -> None:
        super().__init__()
        self.views, self.mix = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, channels, 1)
        self.operator = HyperZZW(channels, SIZE, reach, hidden=16)
        self.standard, self.last = (nn.BatchNorm2d(channels, affine=False) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        seen = self.standard(self.operator(*self.views(h).chunk(2, 1)))
        made = F.gelu(self.last(self.mix(torch.cat((h, seen), 1))))
        return made.mT  # so that the next mixes along the other axis


class Net(nn.Module):
    """Two layers, and a linear reading of the mean over places; nothing else sees more than a place."""

    def __init__(self, reach: str) -> None:
        super().__init__()
        channels = CHANNELS[reach]
        self.lift, self.head = nn.Conv2d(1, channels, 1), nn.Linear(channels, 2)
        self.layers = nn.Sequential(*(Layer(channels, reach) for _ in range(2)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.lift(images)).mean((2, 3)))


def trained(name: str) -> Net:
    """The net that training/train_mirrored.py made: a reach and a seed, such as "all-0"."""
    net, found = Net(name.partition("-")[0]), load_file(WEIGHTS / f"mirrored-{name}.safetensors")
    net.load_state_dict({n: p.float() if p.is_floating_point() else p for n, p in found.items()})
    return net.eval()


@torch.no_grad()
def right(net: nn.Module, count: int = 2000, seed: int = 10**6) -> float:
    """The share of fresh pictures told rightly."""
    images, label = pictures(count, seed)
    return (net(images).argmax(1) == label).double().mean().item()
