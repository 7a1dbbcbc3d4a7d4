"""HCFSSNet: an image codec whose blocks see near places by convolution and far ones by scans and frequencies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.images.frequency_windows import AFMM, FSTAM
from tilewise.convolution.images.vonss import VONSS

LEAST = 1e-9  # likelihood, so that no symbol costs more than 30 bits
SCALE = 0.11  # smallest deviation of the model of latents


class VFSS(nn.Module):
    """Scans in all directions, then modulation of frequencies, then a perceptron, each added to what it reads.

    `forward` takes `[B, H, W, width]` to its shape. The vision frequency state space block of HCFSSNet (Pan et
    al., 2025, arXiv 2511.20151); settings are those of `VONSS`, `window` is that of `AFMM`.
    """

    def __init__(self, width: int, window: int = 8, hidden: int = 2, **scan: Any) -> None:
        super().__init__()
        self.scan, self.frequencies = VONSS(width, **scan), AFMM(width, window)
        self.perceptron = nn.Sequential(
            nn.Linear(width, hidden * width), nn.GELU(), nn.Linear(hidden * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, (self.scan, self.frequencies, self.perceptron)):
            x = x + part(norm(x))
        return x


class Hybrid(nn.Module):
    """Half of the channels by convolution, half by `far`, then all together; `[B, C, H, W]` to its shape."""

    def __init__(self, width: int, far: Callable[[int], nn.Module]) -> None:
        super().__init__()
        half = width // 2
        self.near = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1), nn.GELU(), nn.Conv2d(half, half, 3, padding=1)
        )
        self.far = far(half)
        self.first, self.last = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.first(x).chunk(2, 1)
        seen = self.far(far.movedim(1, 3)).movedim(3, 1)
        return x + self.last(torch.cat((near + self.near(near), seen), 1))


@dataclass(frozen=True, eq=False)
class Coded:
    """What a codec makes of images: the images again, `[B, 3, H, W]`, and bits of each, `[B]`."""

    images: Tensor
    bits: Tensor


class HCFSS(nn.Module):
    """A small learned image codec with a hyper-prior (Pan et al., 2025, arXiv 2511.20151).

    Images `[B, 3, H, W]` from -0.5 to 0.5 become latents of an eighth of their sides by two `Hybrid` blocks
    between strided convolutions. Side information of a sixteenth gives every latent a mean and a deviation, and a
    latent costs what the normal distribution says of its step; the side information costs what a logistic
    distribution for each of its channels says. In training both get uniform noise, otherwise they are rounded.

    Args:
        width: channels within, even. latent, side: channels of latents and of side information.
        far: makes the branch for what is far, of `[B, H, W, width / 2]`, given its width; None is `VFSS`.
        heads: of attention in the hyper-prior. settings: of `VFSS`.

    Raises ValueError for sizes that do not fit; images' sides are multiples of 16. Differs from the paper: far
    smaller, one step of entropy coding for all channels instead of slices, and bits are what the likelihoods
    say, as in the paper's own training, without an arithmetic coder.
    """

    def __init__(
        self,
        width: int = 24,
        latent: int = 24,
        side: int = 12,
        *,
        far: Callable[[int], nn.Module] | None = None,
        heads: int = 2,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not isinstance(width, int) or width < 2 or width % 2:
            raise ValueError(f"width must be an even integer >= 2, got {width!r}")
        if far is not None and settings:
            raise ValueError(f"settings are of VFSS and far is given; got {', '.join(sorted(settings))}")
        made = far or (lambda half: VFSS(half, **settings))
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, 2), nn.GELU(), nn.Conv2d(width, width, 3, 2, 1), Hybrid(width, made),
            nn.Conv2d(width, width, 3, 2, 1), Hybrid(width, made), nn.Conv2d(width, latent, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, width, 1), Hybrid(width, made), *_doubled(width, width), Hybrid(width, made),
            *_doubled(width, width), nn.GELU(), nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
        self.to_side = nn.Sequential(nn.Conv2d(latent, side, 3, 2, 1), _Tokens(FSTAM(side, heads)))
        self.from_side = nn.Sequential(
            _Tokens(FSTAM(side, heads, shifted=True)),
            *_doubled(side, latent),
            nn.Conv2d(latent, 2 * latent, 1),
        )
        self.prior = nn.Parameter(torch.zeros(2, side))

    def forward(self, images: Tensor) -> Coded:
        if images.ndim != 4 or images.shape[1] != 3 or any(size % 16 for size in images.shape[2:]):
            raise ValueError(f"images must be [B, 3, H, W], sides multiples of 16, got {list(images.shape)}")
        latent = self.encoder(images)
        side = self._stepped(self.to_side(latent), 0.0)
        mean, spread = self.from_side(side).chunk(2, 1)
        latent = self._stepped(latent, mean)
        bits = _bits(_normal, latent - mean, F.softplus(spread) + SCALE)
        shift, scale = self.prior.view(2, 1, -1, 1, 1)
        bits = bits + _bits(torch.sigmoid, side - shift, scale.exp())
        return Coded(self.decoder(latent), bits)

    def _stepped(self, x: Tensor, around: Tensor | float) -> Tensor:
        """Whole steps around a value, or noise of a step's width in training."""
        return x + torch.rand_like(x) - 0.5 if self.training else (x - around).round() + around


def _normal(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-(2**-0.5) * x)


def _bits(distribution: Callable[[Tensor], Tensor], x: Tensor, scale: Tensor) -> Tensor:
    """Of steps around `x`, `[B]`; the distribution is symmetric, and the left tail has more digits."""
    x = -x.abs()
    likely = distribution((x + 0.5) / scale) - distribution((x - 0.5) / scale)
    return -likely.clamp(min=LEAST).log2().flatten(1).sum(1)


def _doubled(width: int, out: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(width, 4 * out, 1), nn.PixelShuffle(2)


class _Tokens(nn.Module):
    """A module of `[B, H, W, C]` for `[B, C, H, W]`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, 3)).movedim(3, 1)


def rate_distortion(coded: Coded, images: Tensor, weight: float = 0.0067) -> Tensor:
    """Bits per pixel and `weight` times the squared error of values from 0 to 255, the usual loss of codecs."""
    pixels = images.shape[0] * images.shape[2] * images.shape[3]
    return coded.bits.sum() / pixels + weight * 255**2 * F.mse_loss(coded.images, images)
