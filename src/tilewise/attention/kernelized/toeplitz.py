"""Sums weighted by distance, of features against features: by FFT, with a bound on its rounding, and directly.

All of them compute, for every query i and channel c,

    out[c, i] = sum over j of exp(bias[j - i]) (queries[:, i] . keys[:, j]) values[c, j].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

NUMBERS = 1 << 20  # numbers transformed at once: 8 MiB, of which about four copies exist at a time
# Transforms are done in float64 whatever the inputs. In float32, 4,096 keys under a bias that looks at three
# neighbours lost 2.7e-6 of the answer and under a flat one 2.5e-7, where plain sums lost 1.3e-7 and 1.6e-8.
WIDE = torch.float64
PER_BIT = 8 * torch.finfo(WIDE).eps / 2  # relative 2-norm error of a transform per bit of its length


def fast_length(n: int) -> int:
    """The smallest even length >= 2n with no prime factor above 5: room for a product of n without wrapping."""
    length = max(2, 2 * n)
    while _rest(length) != 1:
        length += 2
    return length


def _rest(length: int) -> int:
    for prime in (2, 3, 5):
        while length % prime == 0:
            length //= prime
    return length


def chunks(rows: int, features: int, channels: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Cut features x channels so that `rows` times a cut's sequences hold at most NUMBERS numbers, or one each."""
    at_once = max(1, NUMBERS // max(1, rows * length))
    wide, deep = min(channels, at_once), max(1, at_once // max(1, channels))
    for first in range(0, features, deep):
        for channel in range(0, channels, wide):
            yield slice(first, first + deep), slice(channel, channel + wide)


class Mix(torch.autograd.Function):
    """The sum above by FFT, for `weights = exp(bias)`; forward and backward hold one cut of its channels at a time.

    queries, keys `[B, H, R, N]`, values `[B, H, C, N]`, weights float64 `[H, 2N - 1]` (entry N - 1 + k for
    j - i = k); the result is float64 `[B, H, C, N]`. Kept for the backward pass are the arguments, nothing else:
    2 R C transforms forward and 4 R C backward for each of B H rows, instead of R C N numbers held.
    """

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys, values, weights)
        n, length = keys.shape[3], fast_length(keys.shape[3])
        spectrum = _spectrum(weights, length)
        out = values.new_zeros(values.shape, dtype=WIDE)
        for some, channels in chunks(keys.shape[0] * keys.shape[1], keys.shape[2], values.shape[2], length):
            mixed = _transform(keys[:, :, some], values[:, :, channels], length) * spectrum
            mixed = torch.fft.irfft(mixed, n=length)[..., :n]
            out[:, :, channels] += (queries[:, :, some].unsqueeze(3) * mixed).sum(2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        queries, keys, values, weights = ctx.saved_tensors
        n, length = keys.shape[3], fast_length(keys.shape[3])
        spectrum = _spectrum(weights, length)
        d_queries, d_keys, d_values = (x.new_zeros(x.shape, dtype=WIDE) for x in (queries, keys, values))
        d_spectrum = torch.zeros_like(spectrum)
        for some, channels in chunks(keys.shape[0] * keys.shape[1], keys.shape[2], values.shape[2], length):
            ahead = _transform(keys[:, :, some], values[:, :, channels], length)
            back = _transform(queries[:, :, some], grad[:, :, channels], length)
            d_spectrum += (back.conj() * ahead).sum((0, 2, 3)).view_as(spectrum)
            ahead = torch.fft.irfft(ahead * spectrum, n=length)[..., :n]
            back = torch.fft.irfft(back * spectrum.conj(), n=length)[..., :n]
            d_queries[:, :, some] += (ahead * grad[:, :, channels].unsqueeze(2)).sum(3)
            d_keys[:, :, some] += (back * values[:, :, channels].unsqueeze(2)).sum(3)
            d_values[:, :, channels] += (back * keys[:, :, some].unsqueeze(3)).sum(2)
        lags = torch.fft.irfft(d_spectrum, n=length).flatten(1)  # [H, length], lag k at place k mod length
        d_weights = torch.cat([lags[:, length - n + 1 :], lags[:, :n]], 1)
        return d_queries.to(queries.dtype), d_keys.to(keys.dtype), d_values.to(values.dtype), d_weights


def _transform(features: Tensor, channels: Tensor, length: int) -> Tensor:
    """Spectra of every feature times every channel, `[B, H, r, c, length / 2 + 1]`."""
    return torch.fft.rfft(features.unsqueeze(3).to(WIDE) * channels.unsqueeze(2), n=length)


def _spectrum(weights: Tensor, length: int) -> Tensor:
    """Spectrum `[H, 1, 1, *]` of the circulant whose product with a padded sequence is the sum over j."""
    n = (weights.shape[1] + 1) // 2
    ring = weights.new_zeros(weights.shape[0], length)
    ring[:, :n] = weights[:, :n].flip(1)  # j - i = 0, -1, ...: at lag i - j
    ring[:, length - n + 1 :] = weights[:, n:].flip(1)
    return torch.fft.rfft(ring, n=length).view(weights.shape[0], 1, 1, -1)


def rounding(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """What `Mix` may round away of a channel of values no larger than 1, for every query: `[B, H, N]`.

    A transform of length L errs by at most 8 u log2 L of its 2-norm (Higham, 2002, theorem 24.2, has 6.7 for
    radix 2). Two transforms and their product then err by 2 x that of |w|_2 |x|_2 in every element
    (Cauchy-Schwarz), the inverse by that of |w * x|_2 <= |w|_1 |x|_2 (Young). Rounding is usually
    sqrt(N) below it; no proof says so.
    """
    bits = PER_BIT * math.log2(fast_length(keys.shape[3]))
    largest = (2 * bits + PER_BIT) * weights.norm(dim=1) + bits * weights.sum(1)  # [H]
    norms = keys.to(WIDE).norm(dim=3) * largest.unsqueeze(1)  # [B, H, R]
    return (norms.unsqueeze(2) @ queries.to(WIDE).abs()).squeeze(2)


def direct_rows(
    rows: Tensor, queries: Tensor, keys: Tensor, log_keys: Tensor, v: Tensor, bias: Tensor, seen: Tensor
) -> Tensor:
    """Rows of the quotient by the quadratic form, a few at a time: `[B, H, len(rows), C]`.

    queries, keys `[B, H, R, N]`, log_keys `[B, H, N]` (log factors of the keys), v `[B, H, N, C]`, bias
    `[H, 2N - 1]`, -inf where a distance is hidden, seen bool `[B|1, 1, 1, N]`, keys that may be seen. Each row
    takes its own maximum out of the exponents, so no span is too large. Costs len(rows) N (R + C) operations.
    """
    b, heads, _, n = keys.shape
    most = max(1, NUMBERS // max(1, b * heads * n))
    arguments = queries, keys, log_keys, v, bias, seen
    parts = [checkpoint(_some_rows, some, *arguments, use_reentrant=False) for some in rows.split(most)]
    return torch.cat(parts, 2)


def _some_rows(
    rows: Tensor, queries: Tensor, keys: Tensor, log_keys: Tensor, v: Tensor, bias: Tensor, seen: Tensor
) -> Tensor:
    n = keys.shape[3]
    offsets = torch.arange(n, device=rows.device) - rows.unsqueeze(1) + n - 1
    logs = (bias[:, offsets] + log_keys.unsqueeze(2)).masked_fill(~seen, -torch.inf)  # [b, h, m, n]
    top = logs.detach().amax(3, keepdim=True)
    shares = (logs - top.masked_fill(top == -torch.inf, 0)).exp() * (queries[..., rows].mT @ keys)
    total = shares.sum(3, keepdim=True)
    return shares @ v / total.masked_fill(top == -torch.inf, 1)
