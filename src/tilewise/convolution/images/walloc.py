"""WaLLoC: a linear encoder and a deeper decoder between a wavelet packet transform and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.images.wavelets import inverse_wavelet_packet, wavelet_packet

TRANSFORMS = ("wavelet", "patches")


class WaLLoC(nn.Module):
    """A codec that also makes its signal small (Jacobellis and Yadwadkar, 2024, arXiv 2412.09405).

    The signal passes `levels` of a wavelet packet transform, one linear layer over all bands of a place, and a
    companding curve that keeps latents below `limit`. In training they get uniform noise of one step's width, so
    that the decoder, a net of residual convolutions, learns to stand what rounding does to them; otherwise they
    are rounded. What remains of a signal is `latent` integers for every 2 ** levels samples along each axis.

    Args:
        channels: of the signal. latent: numbers kept for each place. levels: of the transform. dims: 1 for
            signals `[B, channels, N]`, 2 for images `[B, channels, H, W]`; sizes multiples of 2 ** levels.
        width, blocks: channels and residual blocks of the decoder. bits: a latent takes at most 2 ** bits - 1
            values. noise: False trains on latents as they are: the control.
        transform: "wavelet", or "patches", which only cuts the signal into as many channels: the control.
        extension: at the borders, as of `wavelet_packet`.

    Raises ValueError for settings that do not fit. Differs from the paper: the companding curve is the error
    function, the decoder is narrower, and codes are given as they are rather than packed into a file; their
    cost is their entropy (`entropy`).
    """

    def __init__(
        self,
        channels: int = 3,
        latent: int = 12,
        levels: int = 3,
        *,
        dims: int = 2,
        width: int = 40,
        blocks: int = 2,
        bits: int = 5,
        noise: bool = True,
        transform: str = "wavelet",
        extension: str = "symmetric",
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("latent", latent), ("levels", levels), ("width", width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not isinstance(blocks, int) or blocks < 0:
            raise ValueError(f"blocks must be an integer >= 0, got {blocks!r}")
        if dims not in (1, 2):
            raise ValueError(f"dims must be 1 or 2, got {dims!r}")
        if not isinstance(bits, int) or not 2 <= bits <= 16:
            raise ValueError(f"bits must be an integer from 2 to 16, got {bits!r}")
        if transform not in TRANSFORMS:
            raise ValueError(
                f"transform must be one of {', '.join(map(repr, TRANSFORMS))}, got {transform!r}"
            )
        self.channels, self.latent, self.levels, self.dims = channels, latent, levels, dims
        self.noise, self.transform, self.extension = noise, transform, extension
        self.limit = 2.0 ** (bits - 1) - 0.501  # rounds to one less
        conv = nn.Conv1d if dims == 1 else nn.Conv2d
        bands = channels * 2 ** (dims * levels)
        self.encoder = conv(bands, latent, 1)
        layers: list[nn.Module] = [conv(latent, width, 3, padding=1)]
        layers += [_Residual(conv, width) for _ in range(blocks)]
        self.decoder = nn.Sequential(*layers, conv(width, bands, 1))

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x`, `[B, latent, N / 2 ** levels, ...]` in its dtype: with noise in training, else whole
        numbers (as they are, if the module was made without noise and is in training)."""
        found = self.limit * torch.erf(self.encoder(self._analysed(x)))
        if not self.training:
            return found.round()
        return found + torch.rand_like(found) - 0.5 if self.noise else found

    def decode(self, latents: Tensor) -> Tensor:
        """The signal of `latents`."""
        if latents.ndim != 2 + self.dims or latents.shape[1] != self.latent:
            raise ValueError(f"latents must be [B, {self.latent}, ...], got shape {list(latents.shape)}")
        bands = self.decoder(latents / self.limit)
        if self.transform == "wavelet":
            return inverse_wavelet_packet(bands, self.levels, dims=self.dims, extension=self.extension)
        return _uncut(bands, self.levels, self.dims)

    def forward(self, x: Tensor) -> Tensor:
        """`x` after encoding and decoding."""
        return self.decode(self.encode(x))

    def _analysed(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 2 + self.dims or x.shape[1] != self.channels:
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"x must be [B, {self.channels}, {'N' if self.dims == 1 else 'H, W'}], got {given}"
            )
        if self.transform == "wavelet":
            return wavelet_packet(x, self.levels, dims=self.dims, extension=self.extension)
        return _cut(x, self.levels, self.dims)


class _Residual(nn.Module):
    def __init__(self, conv: type[nn.Conv1d] | type[nn.Conv2d], width: int) -> None:
        super().__init__()
        self.inner, self.outer = (conv(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.silu(self.inner(F.silu(x))))


def _cut(x: Tensor, levels: int, dims: int) -> Tensor:
    """The samples of a patch as channels, without any transform."""
    side = 2**levels
    if any(size % side for size in x.shape[2:]):
        raise ValueError(f"sizes of x must be multiples of 2 ** levels = {side}, got {list(x.shape[2:])}")
    if dims == 2:
        return F.pixel_unshuffle(x, side)
    return x.unflatten(2, (x.shape[2] // side, side)).transpose(2, 3).flatten(1, 2)


def _uncut(bands: Tensor, levels: int, dims: int) -> Tensor:
    side = 2**levels
    if dims == 2:
        return F.pixel_shuffle(bands, side)
    return bands.unflatten(1, (bands.shape[1] // side, side)).transpose(2, 3).flatten(2)


def entropy(codes: Tensor) -> Tensor:
    """Bits that an ideal coder with a table for each channel takes for `codes [B, C, ...]`, a float64 number.

    The sum over channels of the empirical entropy of their rounded values, times how many there are; the tables
    themselves are not counted. Raises ValueError for codes without channels.
    """
    if codes.ndim < 2:
        raise ValueError(f"codes must be [B, C, ...], got shape {list(codes.shape)}")
    bits = torch.zeros((), dtype=torch.float64)
    for channel in codes.detach().round().transpose(0, 1).flatten(1):
        counts = channel.unique(return_counts=True)[1].double()
        bits = bits - (counts * (counts / counts.sum()).log2()).sum()
    return bits
