"""Noisy pictures that are mirrored in their diagonal or turned by a quarter, and small nets that tell which: for
training/train_turns.py."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence import HyperZZW

WEIGHTS = Path(__file__).parent / "weights"
SIZE, AGAIN = 12, 0.2  # cells drawn anew
# Channels: a net without kernels gets more, and has then more parameters than the one with them.
CHANNELS = {"all": 16, "plain": 32, "fixed": 16}


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures `[count, 1, SIZE, SIZE]` of -1 and 1, and whether each was turned (1) or mirrored (0).

    A mirrored one is its own transpose, a turned one itself after a quarter of a turn; then a fifth of the cells
    are drawn anew. Each cell alone, each row and each column look alike in both: only far cells, compared, tell.
    """
    gen = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return torch.randint(2, (count, SIZE, SIZE), generator=gen).float() * 2 - 1

    first, half = drawn(), SIZE // 2
    mirrored = first.triu() + first.triu(1).mT
    turned = torch.zeros_like(first)
    for _ in range(4):
        turned[:, :half, :half] = first[:, :half, :half]
        turned = turned.rot90(1, (1, 2))
    label = torch.randint(2, (count,), generator=gen)
    images = torch.where(label.view(-1, 1, 1) == 1, turned, mirrored)
    again = torch.rand(images.shape, generator=gen) < AGAIN
    return torch.where(again, drawn(), images).unsqueeze(1), label


class Layer(nn.Module):
    """The operator on two views of the channels, beside them; mixed, standardised and bent."""

    def __init__(self, channels: int, reach: str) -> None:
        super().__init__()
        self.views, self.mix = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, channels, 1)
        self.operator = HyperZZW(channels, SIZE, reach, hidden=16)
        self.standard, self.last = (nn.BatchNorm2d(channels, affine=False) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        seen = self.standard(self.operator(*self.views(h).chunk(2, 1)))
        return F.gelu(
            self.last(self.mix(torch.cat((h, seen), 1)))
        ).mT  # so that the next mixes along the other axis


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
    """The net that training/train_turns.py made: a reach and a seed, such as "all-0"."""
    net, found = Net(name.partition("-")[0]), load_file(WEIGHTS / f"turns-{name}.safetensors")
    net.load_state_dict({n: p.float() if p.is_floating_point() else p for n, p in found.items()})
    return net.eval()


@torch.no_grad()
def right(net: nn.Module, count: int = 2000, seed: int = 10**6) -> float:
    """The share of fresh pictures told rightly."""
    images, label = pictures(count, seed)
    return (net(images).argmax(1) == label).double().mean().item()
