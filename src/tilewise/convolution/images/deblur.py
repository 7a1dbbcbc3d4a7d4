"""DeepRFTv2: deblurring by nets on several scales that can be run backwards, and a kernel they learn to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.images.fourier_kernel import FourierKernelEstimator, convolve
from tilewise.convolution.images.reversible import Coupling, ReversibleSequence
from tilewise.recurrence.mixer import check_width

FLOOR = 0.05  # of magnitudes of a unitary transform, below which `deblur_loss` lets a frequency count less


class SubUNet(nn.Module):
    """A small U-net over a pyramid: down from fine to coarse, adding what each level brings, and up again.

    `forward` takes a tensor for each level, `[B, width, H / 2 ** level, W / 2 ** level]`, fine first, and gives
    as many of the same shapes.
    """

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        check_width(width, 1)
        check_width(levels, 1, "levels")
        self.encode, self.decode = (
            nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(levels)) for _ in range(2)
        )
        self.down = nn.ModuleList(nn.Conv2d(width, width, 2, 2) for _ in range(levels - 1))
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2)) for _ in range(levels - 1)
        )

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        seen = [F.gelu(self.encode[0](levels[0]))]
        for level, encode, down in zip(levels[1:], self.encode[1:], self.down):
            seen.append(F.gelu(encode(level + down(seen[-1]))))
        made = [self.decode[-1](seen[-1])]
        for x, decode, up in zip(reversed(seen[:-1]), reversed(self.decode[:-1]), reversed(self.up)):
            made.append(decode(x + up(F.gelu(made[-1]))))
        return tuple(reversed(made))


@dataclass(frozen=True, eq=False)
class Deblurred:
    """A sharp image `[B, C, H, W]`, and the kernel that blurred it as the net sees it, `[B, H, W]` with its
    origin in the upper left corner; None from a net without an estimator."""

    image: Tensor
    kernel: Tensor | None


class DeepRFT(nn.Module):
    """A deblurring net with a Fourier kernel estimator (Mao et al., 2025, arXiv 2511.21132).

    Every scale of the blurred image has a layer of its own (the decoupled pyramid). Two halves of the features of
    all scales are changed in turn by sub-U-nets, reversibly. What blurred the image is then told by
    `FourierKernelEstimator` from the finest features, and the image less that is the answer.

    Args:
        width: channels of each half. levels: scales. units: couplings of two sub-U-nets. channels: of images.
        hidden, blocks, support: as of the estimator. head: makes another last part, given its channels and those
            of the image: the control. keeps: as of `ReversibleSequence`.

    `forward` takes `[B, channels, H, W]`, sides multiples of 2 ** (levels - 1), and gives a `Deblurred`, whose
    kernel is that of the first channel convolved. Raises ValueError for what does not fit. Differs from the
    paper: far smaller, plain convolutions, one estimator and not one for every scale and stage; and training may
    ask that the sharp image and the kernel make the blurred one (`deblur_loss`), which the paper's loss does not.
    Without it kernels help less, and were not those that blurred. Kernels themselves are never shown.
    """

    def __init__(
        self,
        width: int = 12,
        levels: int = 3,
        units: int = 2,
        *,
        channels: int = 3,
        hidden: int = 24,
        blocks: int = 2,
        support: int | None = None,
        head: Callable[[int, int], nn.Module] | None = None,
        keeps: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("levels", levels), ("units", units), ("channels", channels)):
            check_width(value, 1, name)
        self.channels, self.multiple = channels, 2 ** (levels - 1)
        self.stems = nn.ModuleList(nn.Conv2d(channels, 2 * width, 3, padding=1) for _ in range(levels))
        self.units = ReversibleSequence(
            (Coupling(SubUNet(width, levels), SubUNet(width, levels)) for _ in range(units)), keeps
        )
        self.head = (
            FourierKernelEstimator(2 * width, channels, hidden, blocks, support, keeps=keeps)
            if head is None
            else head(2 * width, channels)
        )

    def features(self, image: Tensor) -> Tensor:
        """What the last part reads, `[B, 2 * width, H, W]`."""
        sides = image.shape[2:]
        if image.ndim != 4 or image.shape[1] != self.channels or any(side % self.multiple for side in sides):
            raise ValueError(
                f"image must be [B, {self.channels}, H, W], sides multiples of {self.multiple}, got"
                f" {list(image.shape)}"
            )
        scales = [image]
        for _ in self.stems[1:]:
            scales.append(F.avg_pool2d(scales[-1], 2))
        halves = [stem(scale).chunk(2, 1) for stem, scale in zip(self.stems, scales)]
        a, b = self.units(*(tuple(part) for part in zip(*halves)))
        return torch.cat((a[0], b[0]), 1)

    def forward(self, image: Tensor) -> Deblurred:
        features = self.features(image)
        if not isinstance(self.head, FourierKernelEstimator):
            return Deblurred(image - self.head(features), None)
        kernels = self.head.kernels(features)
        return Deblurred(image - self.head.finish(features, kernels), kernels[:, 0])


def deblur_loss(
    out: Deblurred, sharp: Tensor, blurred: Tensor, reblur: float = 1.0, margin: int = 8
) -> Tensor:
    """Mean absolute error, and `reblur` times how far sharp images, convolved with kernels, are from blurred ones.

    That is told `margin` pixels from the border, beyond which a circular convolution sees another scene (0 if the
    blur is circular), and in frequencies, each relative to its magnitude in the sharp image plus `FLOOR`: fine
    detail of the kernel, where images have little, counts as much as coarse.
    """
    loss = F.l1_loss(out.image, sharp)
    if out.kernel is None or not reblur:
        return loss
    again = convolve(sharp, out.kernel.unsqueeze(1))
    inner = (..., slice(margin, -margin or None), slice(margin, -margin or None))
    missed, size = (torch.fft.rfft2(x[inner], norm="ortho").abs() for x in (again - blurred, sharp))
    return loss + reblur * (missed / (size + FLOOR)).mean()
