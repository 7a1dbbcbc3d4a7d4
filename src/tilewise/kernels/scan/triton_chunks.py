"""The Triton kernels of the scan over chunks of C tokens: products of matrices, and what the backward ones share.

With A the scores of queries and earlier keys and S the state before the chunk, its outputs are
`A u + (q before) S`, and the state after it is `total S + (k after)^T u`; `u` is `beta v`, and for the delta rule
`X beta (v - (k before) S)` with X the inverse of I + beta B, B being scores of keys and earlier keys (Yang et al.,
2024). `before`, `after` and `total` are factors of decay. Only the states depend on each other: `states` goes
from chunk to chunk, the other kernels do every chunk at once.

A slot is a chunk of a sequence. Of each sequence the tokens from `skip` on are worked on, `part` at most, so that
what is kept of each slot is bounded. Sequences have `per` slots each; packed ones begin at slot `firsts`, and
`owners` says whose a slot is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.kernels.scan.triton_pairs import before_and_after, faded, inverse, scores


@triton.jit
def bounds(s, offsets, n, skip, part):
    """Batch entry, first token and last token + 1 of what is worked on of a sequence."""
    b, start, end = s, s * 0 + skip, s * 0 + n
    if offsets is not None:
        b, start, end = s * 0, tl.load(offsets + s) + skip, tl.load(offsets + s + 1)
    return b, start, tl.minimum(end, start + part)


@triton.jit
def placed(slot, offsets, owners, firsts, n, per, skip, part, C: tl.constexpr):
    """Batch entry, first token and number of tokens of a slot, which has none if that is not positive."""
    s, chunk = slot // per, slot % per
    if offsets is not None:
        s = tl.load(owners + slot)
        chunk = slot - tl.load(firsts + s)
    b, start, end = bounds(s, offsets, n, skip, part)
    begin = start + chunk * C
    return b, begin, tl.minimum(end - begin, C)


@triton.jit
def rows_of(x, b, head, begin, size, columns, WIDTH: tl.constexpr, at_b, at_h, at_n, at_d, C: tl.constexpr):
    """A chunk `[C, columns]` of `[B, H, N, WIDTH]` in float32, 0 where there is none."""
    rows = tl.arange(0, C)
    inside = (rows < size)[:, None] & (columns < WIDTH)[None, :]
    place = x + b * at_b + head * at_h + (begin + rows)[:, None] * at_n + columns[None, :] * at_d
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def flat(x, at, columns, WIDTH: tl.constexpr, C: tl.constexpr):
    """Places `[C, columns]` from row `at` of a contiguous `[rows, WIDTH]`."""
    return x + (at + tl.arange(0, C))[:, None] * WIDTH + columns[None, :]


@triton.jit
def within(size, columns, WIDTH: tl.constexpr, C: tl.constexpr):
    """Which of `[C, columns]` there are."""
    return (tl.arange(0, C) < size)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def decays(decay, at, size, channels, D_K: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr):
    """`steps` of the chunk whose tokens are rows `at` and following. -200 and less are one: exp(-200) is 0."""
    rows = tl.arange(0, C)
    if DECAY == "channel":
        steps = tl.load(flat(decay, at, channels, D_K, C), mask=within(size, channels, D_K, C), other=0.0)
    elif DECAY == "scalar":
        steps = tl.load(decay + at + rows, mask=rows < size, other=0.0)
    else:
        steps = tl.zeros([C], tl.float32)
    return tl.maximum(steps, -200.0)


@triton.jit
def strengths(beta, at, size, C: tl.constexpr):
    """`[C]`, 1 without `beta`, 0 where there is no token."""
    rows = tl.arange(0, C)
    found = tl.where(rows < size, 1.0, 0.0)
    if beta is not None:
        found = tl.load(beta + at + rows, mask=rows < size, other=0.0)
    return found


@triton.jit
def matrix(x, slot, heads, head, rows, columns, D_K: tl.constexpr, D_V: tl.constexpr):
    """Places of a slot's state `[D_k, D_v]`, and which of them there are."""
    cells = rows[:, None] * D_V + columns[None, :]
    return x + (slot * heads + head) * D_K * D_V + cells, (rows < D_K)[:, None] & (columns < D_V)[None, :]


@triton.jit
def opened(
    k, decay, slot, head, offsets, owners, firsts, n, heads, per, skip, part, k_b, k_h, k_n, k_d,
    D_K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Of a slot and head: batch entry, first token, number of tokens, first row, keys and decays."""
    b, begin, size = placed(slot, offsets, owners, firsts, n, per, skip, part, C)
    at, channels = (b * heads + head) * n + begin, tl.arange(0, BLOCK_K)
    key = rows_of(k, b, head, begin, size, channels, D_K, k_b, k_h, k_n, k_d, C)
    return b, begin, size, at, key, decays(decay, at, size, channels, D_K, C, DECAY)


@triton.jit
def of_chunk(x, slot, heads, head, columns, D_V: tl.constexpr, C: tl.constexpr):
    """Places `[C, columns]` of a slot in `[slots, H, C, D_v]`, and which of the columns there are."""
    return flat(x, (slot * heads + head) * C, columns, D_V, C), (columns < D_V)[None, :]


@triton.jit
def of_state(x, slot, heads, head, channels, columns, D_K: tl.constexpr, D_V: tl.constexpr):
    """A slot's `[D_k, columns]` in `[slots, H, D_k, D_v]`."""
    place, inside = matrix(x, slot, heads, head, channels, columns, D_K, D_V)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def written(
    v, values, beta, b, slot, heads, head, at, begin, size, columns, v_b, v_h, v_n, v_d,
    D_V: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """`u` of a chunk `[C, columns]`."""
    if DELTA:
        place, known = of_chunk(values, slot, heads, head, columns, D_V, C)
        own = tl.load(place, mask=known, other=0.0)
    else:
        own = rows_of(v, b, head, begin, size, columns, D_V, v_b, v_h, v_n, v_d, C)
        own *= strengths(beta, at, size, C)[:, None]
    return own


@triton.jit
def invert(
    k, decay, beta, inverses, offsets, owners, firsts, n, heads, per, skip, part, k_b, k_h, k_n, k_d,
    D_K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """X of every slot and head, `[slots, H, C, C]`, for the delta rule."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, begin, size, at, key, steps = opened(
        k, decay, slot, head, offsets, owners, firsts, n, heads, per, skip, part, k_b, k_h, k_n, k_d, D_K, BLOCK_K,
        C, DECAY,
    )  # fmt: skip
    if size <= 0:
        return
    rows = tl.arange(0, C)
    found = scores(key, key, steps, LEVELS, DECAY, PRECISION)
    found = tl.where(rows[:, None] > rows[None, :], found, 0.0) * strengths(beta, at, size, C)[:, None]
    found = inverse(found, LEVELS, PRECISION)
    tl.store(flat(inverses, (slot * heads + head) * C, rows, C, C), found)


@triton.jit
def states(
    k, v, decay, beta, inverses, state, kept, values, offsets, firsts, n, heads, per, skip, part,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before each slot to `kept [slots, H, D_k, D_v]`; those after all of them replace the first ones in
    `state [S, H, D_k, D_v]`; for the delta rule `u` to `values [slots, H, C, D_v]`."""
    program = tl.program_id(0).to(tl.int64)
    s, head = program // heads, program % heads
    rows, channels = tl.arange(0, C), tl.arange(0, BLOCK_K)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    place, inside = matrix(state, s, heads, head, channels, columns, D_K, D_V)
    here = tl.load(place, mask=inside, other=0.0)
    b, start, end = bounds(s, offsets, n, skip, part)
    slot = s * per
    if offsets is not None:
        slot = tl.load(firsts + s)
    for begin in range(start, end, C):
        size, at = tl.minimum(end - begin, C), (b * heads + head) * n + begin
        kept_place, _ = matrix(kept, slot, heads, head, channels, columns, D_K, D_V)
        tl.store(kept_place, here, mask=inside)
        key = rows_of(k, b, head, begin, size, channels, D_K, k_b, k_h, k_n, k_d, C)
        own = rows_of(v, b, head, begin, size, columns, D_V, v_b, v_h, v_n, v_d, C)
        steps = decays(decay, at, size, channels, D_K, C, DECAY)
        before, after = before_and_after(steps, DECAY, PRECISION)
        strength = strengths(beta, at, size, C)[:, None]
        if DELTA:
            own = strength * (own - tl.dot(key * before, here, input_precision=PRECISION))
            solved = tl.load(flat(inverses, (slot * heads + head) * C, rows, C, C))
            own = tl.dot(solved, own, input_precision=PRECISION)
            value_place, known = of_chunk(values, slot, heads, head, columns, D_V, C)
            tl.store(value_place, own, mask=known)
        else:
            own = strength * own
        here = faded(here, steps, DECAY) + tl.dot(tl.trans(key * after), own, input_precision=PRECISION)
        slot += 1
    tl.store(place, here, mask=inside)


@triton.jit
def outputs(
    q, k, v, decay, beta, kept, values, out, offsets, owners, firsts, n, heads, group, per, skip, part, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs `[B, H_q, N, D_v]`, a program for each slot and query head."""
    slot, reader = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, channels = reader // group, tl.arange(0, BLOCK_K)
    b, begin, size, at, key, steps = opened(
        k, decay, slot, head, offsets, owners, firsts, n, heads, per, skip, part, k_b, k_h, k_n, k_d, D_K, BLOCK_K,
        C, DECAY,
    )  # fmt: skip
    if size <= 0:
        return
    query = scale * rows_of(q, b, reader, begin, size, channels, D_K, q_b, q_h, q_n, q_d, C)
    weights = scores(query, key, steps, LEVELS, DECAY, PRECISION)
    before, _ = before_and_after(steps, DECAY, PRECISION)
    query *= before
    for first in range(0, D_V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        state = of_state(kept, slot, heads, head, channels, columns, D_K, D_V)
        own = written(
            v, values, beta, b, slot, heads, head, at, begin, size, columns, v_b, v_h, v_n, v_d, D_V, C, DELTA
        )
        found = tl.dot(query, state, input_precision=PRECISION)
        found = tl.dot(weights, own, found, input_precision=PRECISION)
        place = flat(out, (b * heads * group + reader) * n + begin, columns, D_V, C)
        tl.store(place, found, mask=within(size, columns, D_V, C))
