"""The Triton kernel of the long convolution: two windows through a Monarch transform, a product, and back.

The numbers of a window are a matrix `[A, B]` in registers, and its transform three steps: a product with the
DFT of length A from the left, factors, a product with that of length B from the right. Frequency `r + A c`
comes to stand in row r and column c, where the kernel's own is as well, so nothing is put in order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pair(re, im, size, A: tl.constexpr, B: tl.constexpr):
    """Where the numbers of a complex matrix `[2, A, B]` are, and these numbers."""
    at = tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
    return tl.load(re + at), tl.load(im + size + at)


@triton.jit
def multiplied(xr, xi, yr, yi, PRECISION: tl.constexpr):
    """Product of complex matrices."""
    re = tl.dot(xr, yr, input_precision=PRECISION) - tl.dot(xi, yi, input_precision=PRECISION)
    return re, tl.dot(xr, yi, input_precision=PRECISION) + tl.dot(xi, yr, input_precision=PRECISION)


@triton.jit
def row(ptr, b, channel, t, inside, at_b, at_c, at_n):
    """Numbers of a row of `[B, C, N]` in float32, 0 where not inside."""
    return tl.load(ptr + b * at_b + channel * at_c + t * at_n, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def convolve(
    x, gate_in, gate_out, skip, before, spectrum, first, between, second, out,
    x_b, x_c, x_n, in_b, in_c, in_n, out_b, out_c, out_n, before_b, before_c, before_n,
    n, windows, units, lead, step, earlier, channels,
    CIRCULAR: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs `[B, C, N]`, contiguous, of windows `2 i` and `2 i + 1` of a channel, counted through the batch.

    `spectrum` is `[C, 2, A, B]`, that of the kernel over A B; `first [2, A, A]`, `between [2, A, B]` and
    `second [2, B, B]` are the transform's. The two windows are the real and imaginary parts of one; the second
    is scaled by a power of 2 to the first's size, so that neither drowns in the other's rounding, and where one
    holds an infinity or no number both go alone.
    """
    channel = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0).to(tl.int64) * 2
    place = tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
    fr, fi = pair(first, first, A * A, A, A)
    wr, wi = pair(between, between, A * B, A, B)
    sr, si = pair(second, second, B * B, B, B)
    own = spectrum + channel * (2 * A * B)
    hr, hi = pair(own, own, A * B, A, B)
    re = window(
        x, gate_in, before, channel, unit, units, place, x_b, x_c, x_n, in_b, in_c, in_n,
        before_b, before_c, before_n, n, windows, lead, step, earlier, CIRCULAR,
    )  # fmt: skip
    im = window(
        x, gate_in, before, channel, unit + 1, units, place, x_b, x_c, x_n, in_b, in_c, in_n,
        before_b, before_c, before_n, n, windows, lead, step, earlier, CIRCULAR,
    )  # fmt: skip
    size_re, size_im = tl.max(tl.abs(re)), tl.max(tl.abs(im))
    # A sum sees what a maximum may pass over.
    finite = (tl.sum(re * 0.0) + tl.sum(im * 0.0)) == 0.0
    apart = tl.where(finite & (size_re > 0) & (size_im > 0), tl.log2(size_re) - tl.log2(size_im), 0.0)
    scale = tl.exp2(tl.floor(tl.minimum(tl.maximum(apart, -100.0), 100.0)))
    passes = tl.where(finite, 1, 2)
    for number in range(passes):
        xr = tl.where(finite | (number == 0), re, im)
        xi = tl.where(finite, im * scale, 0.0)
        yr, yi = multiplied(fr, fi, xr, xi, PRECISION)
        zr, zi = multiplied(yr * wr - yi * wi, yr * wi + yi * wr, sr, si, PRECISION)
        zr, zi = zr * hr - zi * hi, zr * hi + zi * hr
        yr, yi = multiplied(zr, zi, sr, -si, PRECISION)
        xr, xi = multiplied(fr, -fi, yr * wr + yi * wi, yi * wr - yr * wi, PRECISION)
        # Nothing comes of nothing, whatever the other's rounding left.
        xr = tl.where(finite & (size_re == 0), 0.0, xr)
        xi = tl.where(finite & (size_im == 0), 0.0, xi / scale)
        write(
            xr, x, gate_in, gate_out, skip, out, channel, unit + number, units, place, x_b, x_c, x_n,
            in_b, in_c, in_n, out_b, out_c, out_n, n, windows, lead, step, channels,
        )  # fmt: skip
        write(
            xi, x, gate_in, gate_out, skip, out, channel, tl.where(finite, unit + 1, units), units, place,
            x_b, x_c, x_n, in_b, in_c, in_n, out_b, out_c, out_n, n, windows, lead, step, channels,
        )  # fmt: skip


@triton.jit
def window(
    x, gate_in, before, channel, unit, units, place, x_b, x_c, x_n, in_b, in_c, in_n, before_b, before_c, before_n,
    n, windows, lead, step, earlier, CIRCULAR: tl.constexpr,
):  # fmt: skip
    """Gated inputs that a window covers: what was before or the end of a circular row, the row, then 0."""
    b, t = unit // windows, unit % windows * step - lead + place
    if CIRCULAR:
        t = tl.where(t < 0, t + n, t)
    start, end = tl.where(unit < units, -lead, 0), tl.where(unit < units, n, 0)
    inside = (t >= 0) & (t < end)
    u = row(x, b, channel, t, inside, x_b, x_c, x_n)
    if gate_in is not None:
        u *= row(gate_in, b, channel, t, inside, in_b, in_c, in_n)
    if before is not None:
        u += row(before, b, channel, earlier + t, (t < 0) & (t >= start), before_b, before_c, before_n)
    return u


@triton.jit
def write(
    z, x, gate_in, gate_out, skip, out, channel, unit, units, place, x_b, x_c, x_n, in_b, in_c, in_n,
    out_b, out_c, out_n, n, windows, lead, step, channels,
):  # fmt: skip
    """What a window gives, with skip and gate."""
    b, t = unit // windows, unit % windows * step - lead + place
    inside = (place >= lead) & (place < lead + step) & (t < tl.where(unit < units, n, 0))
    if skip is not None:
        u = row(x, b, channel, t, inside, x_b, x_c, x_n)
        if gate_in is not None:
            u *= row(gate_in, b, channel, t, inside, in_b, in_c, in_n)
        z += tl.load(skip + channel) * u
    if gate_out is not None:
        z *= row(gate_out, b, channel, t, inside, out_b, out_c, out_n)
    tl.store(out + (b * channels + channel) * n + t, z.to(out.dtype.element_ty), mask=inside)
