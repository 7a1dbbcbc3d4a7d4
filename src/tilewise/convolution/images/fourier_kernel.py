"""A blur kernel found in Fourier space, where it multiplies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.images.reversible import Coupling, ReversibleSequence
from tilewise.recurrence.mixer import check_width


class FourierKernelEstimator(nn.Module):
    """The Fourier kernel estimator of DeepRFTv2 (Mao et al., 2025, arXiv 2511.21132).

    A few channels made of the features are transformed; a small net of reversible residual blocks, with
    activations in Fourier space, reads their spectrum and gives for each frequency a factor for every channel; the
    product, transformed back, is the channel convolved (circularly) with the kernel that the factors are the
    transform of. That and the features, side by side, pass one convolution.

    `forward` takes features `[B, width, H, W]` to `[B, out, H, W]`.

    Args:
        width: channels of features. out: of what is given. hidden: channels within, even. blocks: reversible
            blocks. support: side of the largest kernel, odd; factors that would need more are cut to it. None: as
            large as the features. channels: how many are made of the features and convolved. keeps: as of
            `ReversibleSequence`.

    Raises ValueError for settings that do not fit. Differs from the paper: its blocks scan the plane of
    frequencies, ours see all of it through lags; the net reads log magnitudes beside phases, as spectra of images
    span five decades, and where in the plane a frequency lies; one linear map, not two, makes what is read and what
    is convolved; features are not padded; the last layer starts at the kernel that changes nothing.
    """

    def __init__(
        self,
        width: int,
        out: int,
        hidden: int = 16,
        blocks: int = 2,
        support: int | None = None,
        channels: int = 8,
        keeps: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("width", width),
            ("out", out),
            ("hidden", hidden),
            ("blocks", blocks),
            ("channels", channels),
        ):
            check_width(value, 1, name)
        if hidden % 2:
            raise ValueError(f"hidden must be even, got {hidden}: the reversible blocks halve it")
        if support is not None and (not isinstance(support, int) or support < 1 or support % 2 == 0):
            raise ValueError(f"support must be an odd integer >= 1 or None, got {support!r}")
        self.width, self.channels, self.support = width, channels, support
        self.narrow = nn.Conv2d(width, channels, 1)
        self.first = nn.Conv2d(3 * channels + 3, hidden, 1)
        half = hidden // 2
        self.blocks = ReversibleSequence(
            (Coupling(_SpectralNet(half), _SpectralNet(half)) for _ in range(blocks)), keeps
        )
        self.last = nn.Conv2d(hidden, 2 * channels, 1)
        for part in self.last.parameters():
            nn.init.zeros_(part)
        self.out = nn.Conv2d(channels + width, out, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.finish(features, self.kernels(features))

    def kernels(self, features: Tensor) -> Tensor:
        """The kernel of every channel, `[B, channels, H, W]`, its origin in the upper left corner."""
        if features.ndim != 4 or features.shape[1] != self.width or 0 in features.shape[2:]:
            raise ValueError(f"features must be [B, {self.width}, H, W], got shape {list(features.shape)}")
        if not len(features):
            return self.narrow(features)
        factors = self._factors(torch.fft.rfft2(self.narrow(features), norm="ortho"))
        made = torch.fft.irfft2(factors, features.shape[2:])
        return made if self.support is None else made * _supported(made, self.support)

    def finish(self, features: Tensor, kernels: Tensor) -> Tensor:
        """What `forward` gives, if the kernels are these."""
        return self.out(torch.cat((convolve(self.narrow(features), kernels), features), 1))

    def _factors(self, spectrum: Tensor) -> Tensor:
        """What each frequency is multiplied with, complex `[B, channels, H, W // 2 + 1]`."""
        size = spectrum.abs()
        height, columns = spectrum.shape[2:]
        down = torch.fft.fftfreq(height, device=size.device).abs().unsqueeze(1).expand(height, columns)
        right = torch.linspace(0, 0.5, columns, device=size.device).expand(height, columns)
        places = torch.stack((down, right, (down.square() + right.square()).sqrt())).to(size.dtype)
        # Where magnitudes are small phases mean little, and are read as small.
        phases = spectrum.real / (size + 0.1), spectrum.imag / (size + 0.1)
        read = torch.cat((*phases, (size + 1e-3).log(), places.expand(len(size), -1, -1, -1)), 1)
        half = self.first(read).chunk(2, 1)
        found = self.last(torch.cat([x for part in self.blocks(*half) for x in part], 1))
        return torch.complex(1 + found[:, : self.channels], found[:, self.channels :])


def _supported(kernels: Tensor, side: int) -> Tensor:
    """True where a kernel may be other than 0, `[H, W]`, around the upper left corner."""
    places = (torch.arange(n, device=kernels.device) for n in kernels.shape[2:])
    far = (torch.minimum(x, len(x) - x) <= side // 2 for x in places)
    return torch.logical_and(*torch.meshgrid(*far, indexing="ij"))


class _SpectralNet(nn.Module):
    """A residual branch over the half plane of frequencies: their neighbours, then lags, where each sees all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near, self.lags, self.outer = (nn.Conv2d(width, width, 3, padding=(0, 1)) for _ in range(3))
        self.there, self.back = (nn.Conv2d(width, width, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        seen = F.relu(_around(self.near, x))
        lags = F.relu(_around(self.lags, _even(self.there(seen))))
        return _around(self.outer, seen + self.back(_even(lags)))


def _around(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Half planes wrap around from the last row to the first."""
    return conv(torch.cat((x[:, :, -1:], x, x[:, :, :1]), 2))


def _even(x: Tensor) -> Tensor:
    """The transform of a half plane of numbers, taken as real and even: such a half plane; twice, the first."""
    height, columns = x.shape[2:]
    return torch.fft.irfft2(x, (height, max(1, 2 * (columns - 1))), norm="ortho")[..., :columns]


def convolve(features: Tensor, kernels: Tensor) -> Tensor:
    """Circular convolution of `features [B, C, H, W]` with kernels of its size, `[B, C|1, H, W]`, whose origin is
    the upper left corner."""
    if not features.numel():
        return features * kernels
    spectrum = torch.fft.rfft2(features) * torch.fft.rfft2(kernels)
    return torch.fft.irfft2(spectrum, features.shape[2:])
