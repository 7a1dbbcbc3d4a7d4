"""Real photographs, those that come with scikit-image, as crops to train on and others to be tested on."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHTS = Path(__file__).parent / "weights"
TRAINED = ("astronaut", "motorcycle", "coffee", "hubble_deep_field", "immunohistochemistry")
HELD_OUT = ("chelsea", "rocket")


@lru_cache
def photograph(name: str) -> Tensor:
    """float32 `[3, H, W]` from -0.5 to 0.5."""
    from skimage import data

    made = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return torch.tensor(made).permute(2, 0, 1).float() / 255 - 0.5


@lru_cache
def _sizes(name: str) -> tuple[Tensor, ...]:
    """A photograph as it is, and at half its size, where edges are sharper."""
    full = photograph(name)
    return full, F.avg_pool2d(full[None], 2)[0]


def crops(count: int, side: int, seed: int) -> Tensor:
    """`[count, 3, side, side]` of the photographs to train on, turned and mirrored."""
    gen = torch.Generator().manual_seed(seed)
    made = []
    for name, size, turns, mirrored, y, x in torch.rand(count, 6, generator=gen).tolist():
        whole = _sizes(TRAINED[int(name * len(TRAINED))])[int(size * 2)]
        top, left = int(y * (whole.shape[1] - side + 1)), int(x * (whole.shape[2] - side + 1))
        crop = torch.rot90(whole[:, top : top + side, left : left + side], int(turns * 4), (1, 2))
        made.append(crop.flip(2) if mirrored < 0.5 else crop)
    return torch.stack(made)


@lru_cache
def held_out(side: int, each: int = 12) -> Tensor:
    """`[2 * each, 3, side, side]` of the photographs that nothing was trained on, evenly spread."""
    made = []
    for name in HELD_OUT:
        whole = photograph(name)
        gen = torch.Generator().manual_seed(7)
        for y, x in torch.rand(each, 2, generator=gen).tolist():
            top, left = int(y * (whole.shape[1] - side + 1)), int(x * (whole.shape[2] - side + 1))
            made.append(whole[:, top : top + side, left : left + side])
    return torch.stack(made)


def whole_held_out(multiple: int) -> list[Tensor]:
    """The held-out photographs `[1, 3, H, W]`, cut to multiples."""
    made = []
    for name in HELD_OUT:
        image = photograph(name)[None]
        h, w = (size // multiple * multiple for size in image.shape[2:])
        made.append(image[:, :, :h, :w])
    return made


def psnr(a: Tensor, b: Tensor) -> float:
    """Of two pictures whose values span 1, in dB; of a batch, that of the mean error."""
    return -10 * (a.double() - b.double()).square().mean().log10().item()
