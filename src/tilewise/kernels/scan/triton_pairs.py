"""Within a chunk, for the Triton kernels: decays, scores of queries and earlier keys under them, their gradients.

`steps` are the log decays of a chunk's C tokens: `[C, D_k]` for DECAY "channel", `[C]` for "scalar" and for "none",
where all are 0. Sums of them are products with matrices of zeros and ones and run over the very tokens between two:
no exponent is a difference of sums, or positive. With decays by channel a block of scores is split in halves again
and again, as in the torch engine: each pair is scored relative to the border between the halves that separate it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def total_of(ones, x, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """`ones @ x` in float32's digits, of `[C, D_k]` or `[C]`; channels that share a decay are summed."""
    if DECAY == "channel":
        if PRECISION == "ieee":
            found = tl.dot(ones, x, input_precision="ieee")
        else:
            found = tl.dot(ones, x, input_precision="tf32x3")
    else:
        if len(x.shape) == 2:
            x = tl.sum(x, 1)
        found = tl.sum(ones * x[None, :], 1)
    return found


@triton.jit
def up_to(C: tl.constexpr):
    """Ones `[C, C]` from the chunk's begin to each row's token, it included."""
    rows = tl.arange(0, C)
    return tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0)


@triton.jit
def to_middle(C: tl.constexpr, half):
    """Ones `[C, C]` between each row's token and the middle of its block of 2 `half` tokens.

    In first halves from behind it up to there, in second ones from there up to it. With `half` = C the middle is
    the chunk's end.
    """
    rows, columns = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    within = rows // half == columns // half
    behind = rows // half % 2 == 0
    return tl.where(within & ((behind & (columns > rows)) | (~behind & (columns <= rows))), 1.0, 0.0)


@triton.jit
def across(C: tl.constexpr, half):
    """Whether `[C, C]` the row is in the second and the column in the first half of a block of 2 `half` tokens."""
    rows, columns = tl.arange(0, C)[:, None] // half, tl.arange(0, C)[None, :] // half
    return (rows == columns + 1) & (rows % 2 == 1)


@triton.jit
def before_and_after(steps, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """Factors from the chunk's begin to each token, it included, and from each to the end, it excluded.

    `[C, D_k]` with decays by channel, else `[C, 1]`.
    """
    C: tl.constexpr = steps.shape[0]
    before = tl.exp(total_of(up_to(C), steps, DECAY, PRECISION))
    after = tl.exp(total_of(to_middle(C, C), steps, DECAY, PRECISION))
    if DECAY != "channel":
        before, after = before[:, None], after[:, None]
    return before, after


@triton.jit
def faded(state, steps, DECAY: tl.constexpr):
    """The state `[D_k, D_v]` after all decays of a chunk."""
    factor = tl.exp(tl.sum(steps, 0))
    if DECAY == "channel":
        factor = factor[:, None]
    return state * factor


@triton.jit
def between(steps):
    """Factors `[C, C]` from the column's token to the row's, 1 where that is not later."""
    rows = tl.arange(0, steps.shape[0])
    later = rows[:, None] > rows[None, :]
    return tl.exp(tl.cumsum(tl.where(later, steps[:, None], 0.0), 0))


@triton.jit
def scores(q, k, steps, LEVELS: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """`sum_d q_td k_sd exp(decay_d from s to t)` as `[C, C]`, 0 where s > t; C is 2^LEVELS."""
    C: tl.constexpr = q.shape[0]
    rows = tl.arange(0, C)
    if DECAY == "channel":
        found = tl.where(rows[:, None] == rows[None, :], tl.sum(q * k, 1)[:, None], 0.0)
        for level in range(0, LEVELS):
            factor = tl.exp(total_of(to_middle(C, 1 << level), steps, DECAY, PRECISION))
            pairs = tl.dot(q * factor, tl.trans(k * factor), input_precision=PRECISION)
            found += tl.where(across(C, 1 << level), pairs, 0.0)
    else:
        found = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if DECAY == "scalar":
            found *= between(steps)
        found = tl.where(rows[:, None] >= rows[None, :], found, 0.0)
    return found


@triton.jit
def gradients(d_scores, q, k, steps, LEVELS: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """Those of q, of k and of the log decays by way of `scores`, whose gradient is 0 where s > t."""
    C: tl.constexpr = q.shape[0]
    rows = tl.arange(0, C)
    if DECAY == "channel":
        own = tl.sum(tl.where(rows[:, None] == rows[None, :], d_scores, 0.0), 1)[:, None]
        d_q, d_k, d_decay = own * k, own * q, tl.zeros_like(q)
        for level in range(0, LEVELS):
            ones = to_middle(C, 1 << level)
            factor = tl.exp(total_of(ones, steps, DECAY, PRECISION))
            pairs = tl.where(across(C, 1 << level), d_scores, 0.0)
            right = tl.dot(pairs, k * factor, input_precision=PRECISION) * factor
            left = tl.dot(tl.trans(pairs), q * factor, input_precision=PRECISION) * factor
            d_q += right
            d_k += left
            d_decay += total_of(tl.trans(ones), right * q + left * k, DECAY, PRECISION)
    else:
        d_decay = tl.zeros([C], tl.float32)
        if DECAY == "scalar":
            d_scores *= between(steps)
            pairs = d_scores * tl.dot(q, tl.trans(k), input_precision=PRECISION)
            later = tl.cumsum(pairs, 0, reverse=True)  # over the rows that a decay reaches
            d_decay = tl.sum(tl.where(rows[:, None] > rows[None, :], later, 0.0), 1)
        d_q = tl.dot(d_scores, k, input_precision=PRECISION)
        d_k = tl.dot(tl.trans(d_scores), q, input_precision=PRECISION)
    return d_q, d_k, d_decay


@triton.jit
def inverse(system, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Of I + `system`, which is 0 on and above its diagonal: blocks twice as large at each level."""
    C: tl.constexpr = system.shape[0]
    rows = tl.arange(0, C)
    found = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for level in range(0, LEVELS):
        lower = tl.where(across(C, 1 << level), system, 0.0)
        reached = tl.dot(found, lower, input_precision=PRECISION)
        found -= tl.dot(reached, found, input_precision=PRECISION)
    return found
