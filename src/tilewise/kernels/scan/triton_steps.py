"""The Triton kernels of the scan: token after token, the state in registers, forward and backward.

A program has one head of one sequence and a block of the values' channels; nothing it does depends on the other
blocks, so that many programs share a head. All rules and kinds of decays are the same loop.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span(offsets, s, n):
    """Batch entry, first token and last token + 1 of a sequence."""
    b, start, end = s, s * 0, s * 0 + n
    if offsets is not None:
        b, start, end = s * 0, tl.load(offsets + s), tl.load(offsets + s + 1)
    return b, start, end


@triton.jit
def decayed(state, decay, row, rows, inside, CHANNELS: tl.constexpr, D_K: tl.constexpr):
    """The state times the factors of one token, and these factors `[BLOCK_K, 1]`."""
    factor = tl.full([state.shape[0], 1], 1.0, tl.float32)
    if decay is not None:
        if CHANNELS:
            factor = tl.exp(tl.load(decay + row * D_K + rows, mask=inside, other=0.0))[:, None]
        else:
            factor = tl.exp(tl.load(decay + row)) + tl.zeros([state.shape[0], 1], tl.float32)
    return state * factor, factor


@triton.jit
def read(ptr, b, head, token, channels, inside, at_b, at_h, at_n, at_d):
    """A token's vector in float32, 0 beyond its channels."""
    place = ptr + b * at_b + head * at_h + token * at_n + channels * at_d
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def written(state, key, value, strength, DELTA: tl.constexpr):
    """What the token leaves under its key: `value`, or for the delta rule what the key does not find; and the state
    after it."""
    if DELTA:
        value = value - tl.sum(state * key[:, None], 0)
    return value, state + key[:, None] * (strength * value)[None, :]


@triton.jit
def forward(
    q, k, v, decay, beta, first, offsets, out, last, kept, n, heads, group, every, slots, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHANNELS: tl.constexpr,
    DELTA: tl.constexpr,
):  # fmt: skip
    """Outputs `[B, H_q, N, D_v]`, final states `[S, H, D_k, D_v]`, and with `kept` the states before every
    `every`-th token of each sequence, `[slots, H, D_k, D_v]`; both contiguous float32."""
    program = tl.program_id(0).to(tl.int64)
    s, head = program // heads, program % heads
    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = rows < D_K, columns < D_V
    in_state = in_k[:, None] & in_v[None, :]
    cell = rows[:, None] * D_V + columns[None, :]
    own = (s * heads + head) * D_K * D_V
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first is not None:
        state = tl.load(first + own + cell, mask=in_state, other=0.0)
    b, start, end = span(offsets, s, n)
    slot = start // every + s if offsets is not None else s * slots
    for token in range(start, end):
        if kept is not None:
            if (token - start) % every == 0:
                at = ((slot + (token - start) // every) * heads + head) * D_K * D_V
                tl.store(kept + at + cell, state, mask=in_state)
        row = (b * heads + head) * n + token
        state, _ = decayed(state, decay, row, rows, in_k, CHANNELS, D_K)
        key = read(k, b, head, token, rows, in_k, k_b, k_h, k_n, k_d)
        value = read(v, b, head, token, columns, in_v, v_b, v_h, v_n, v_d)
        strength = 1.0
        if beta is not None:
            strength = tl.load(beta + row)
        _, state = written(state, key, value, strength, DELTA)
        for member in range(0, group):
            query = read(q, b, head * group + member, token, rows, in_k, q_b, q_h, q_n, q_d)
            found = scale * tl.sum(state * query[:, None], 0)
            place = ((b * heads + head) * group + member) * n + token
            tl.store(out + place * D_V + columns, found, mask=in_v)
    tl.store(last + own + cell, state, mask=in_state)


@triton.jit
def backward(
    q, k, v, decay, beta, offsets, kept, d_out, d_last, d_q, d_k, d_v, d_decay, d_beta, d_first, scratch,
    n, heads, group, every, slots, tokens, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHANNELS: tl.constexpr,
    DELTA: tl.constexpr,
):  # fmt: skip
    """Gradients, from the last token to the first, between the states that `forward` kept.

    A program works through its tokens again from each kept state, with the states before them in `scratch`. What
    sums over the values' channels (`d_q`, `d_k`, `d_decay`, `d_beta`) has a part from each block of them, one
    behind the other; `tokens` is how many rows of all heads a part has.
    """
    program = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    s, head = program // heads, program % heads
    rows, columns = tl.arange(0, BLOCK_K), block * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = rows < D_K, columns < D_V
    in_state = in_k[:, None] & in_v[None, :]
    cell = rows[:, None] * D_V + columns[None, :]
    own = (s * heads + head) * D_K * D_V
    area = scratch + (program * tl.num_programs(1) + block) * every * BLOCK_K * BLOCK_V
    inner = rows[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    d_state = tl.load(d_last + own + cell, mask=in_state, other=0.0)
    b, start, end = span(offsets, s, n)
    slot = start // every + s if offsets is not None else s * slots
    chunks = tl.cdiv(end - start, every)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        begin = start + chunk * every
        size = tl.minimum(every, end - begin)
        at = ((slot + chunk) * heads + head) * D_K * D_V
        state = tl.load(kept + at + cell, mask=in_state, other=0.0)
        for i in range(0, size):
            tl.store(area + i * BLOCK_K * BLOCK_V + inner, state)
            token = begin + i
            row = (b * heads + head) * n + token
            state, _ = decayed(state, decay, row, rows, in_k, CHANNELS, D_K)
            key = read(k, b, head, token, rows, in_k, k_b, k_h, k_n, k_d)
            value = read(v, b, head, token, columns, in_v, v_b, v_h, v_n, v_d)
            strength = 1.0
            if beta is not None:
                strength = tl.load(beta + row)
            _, state = written(state, key, value, strength, DELTA)
        tl.debug_barrier()
        for j in range(0, size):
            i = size - 1 - j
            token = begin + i
            row = (b * heads + head) * n + token
            before = tl.load(area + i * BLOCK_K * BLOCK_V + inner)
            faded, factor = decayed(before, decay, row, rows, in_k, CHANNELS, D_K)
            key = read(k, b, head, token, rows, in_k, k_b, k_h, k_n, k_d)
            value = read(v, b, head, token, columns, in_v, v_b, v_h, v_n, v_d)
            strength = 1.0
            if beta is not None:
                strength = tl.load(beta + row)
            rest, state = written(faded, key, value, strength, DELTA)
            for member in range(0, group):
                query = read(q, b, head * group + member, token, rows, in_k, q_b, q_h, q_n, q_d)
                place = ((b * heads + head) * group + member) * n + token
                given = tl.load(d_out + place * D_V + columns, mask=in_v, other=0.0) * scale
                d_query = tl.sum(state * given[None, :], 1)
                tl.store(d_q + (block * tokens * group + place) * D_K + rows, d_query, mask=in_k)
                d_state += query[:, None] * given[None, :]
            reached = tl.sum(
                d_state * key[:, None], 0
            )  # [BLOCK_V], what reaches the value times 1 / strength
            if beta is not None:
                tl.store(d_beta + block * tokens + row, tl.sum(reached * rest, 0))
            d_value = strength * reached
            tl.store(d_v + row * D_V + columns, d_value, mask=in_v)
            d_key = tl.sum(d_state * (strength * rest)[None, :], 1)
            if DELTA:
                d_key -= tl.sum(faded * d_value[None, :], 1)
                d_state -= key[:, None] * d_value[None, :]
            tl.store(d_k + (block * tokens + row) * D_K + rows, d_key, mask=in_k)
            if decay is not None:
                d_factor = tl.sum(d_state * faded, 1)
                if CHANNELS:
                    tl.store(d_decay + (block * tokens + row) * D_K + rows, d_factor, mask=in_k)
                else:
                    tl.store(d_decay + block * tokens + row, tl.sum(d_factor, 0))
            d_state = d_state * factor
        tl.debug_barrier()
    tl.store(d_first + own + cell, d_state, mask=in_state)
