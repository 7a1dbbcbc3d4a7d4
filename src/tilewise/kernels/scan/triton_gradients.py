"""The Triton kernels of the scan's backward pass over chunks, with the slots and the symbols of `triton_chunks`.

`d_values` tells what reaches `u` within a chunk, `d_states` goes from the last chunk to the first, and `d_keys` and
`d_queries` give the gradients of what was read; all but `d_states` do every chunk at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.kernels.scan.triton_chunks import (
    bounds,
    decays,
    flat,
    matrix,
    of_chunk,
    of_state,
    opened,
    rows_of,
    strengths,
    within,
    written,
)
from tilewise.kernels.scan.triton_pairs import (
    before_and_after,
    faded,
    gradients,
    scores,
    to_middle,
    total_of,
    up_to,
)


@triton.jit
def d_values(
    q, k, decay, d_out, d_own, offsets, owners, firsts, n, heads, group, per, skip, part, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What reaches `u` from the outputs of its own chunk, `[slots, H, C, D_v]`."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, begin, size, at, key, steps = opened(
        k, decay, slot, head, offsets, owners, firsts, n, heads, per, skip, part, k_b, k_h, k_n, k_d, D_K, BLOCK_K,
        C, DECAY,
    )  # fmt: skip
    if size <= 0:
        return
    channels = tl.arange(0, BLOCK_K)
    columns = tl.program_id(2).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    found = tl.zeros([C, BLOCK_V], tl.float32)
    for member in range(0, group):
        reader = head * group + member
        query = scale * rows_of(q, b, reader, begin, size, channels, D_K, q_b, q_h, q_n, q_d, C)
        weights = scores(query, key, steps, LEVELS, DECAY, PRECISION)
        place = flat(d_out, (b * heads * group + reader) * n + begin, columns, D_V, C)
        given = tl.load(place, mask=within(size, columns, D_V, C), other=0.0)
        found = tl.dot(tl.trans(weights), given, found, input_precision=PRECISION)
    place, known = of_chunk(d_own, slot, heads, head, columns, D_V, C)
    tl.store(place, found, mask=known)


@triton.jit
def d_states(
    q, k, decay, beta, inverses, d_out, d_state, d_kept, d_own, offsets, firsts,
    n, heads, group, per, skip, part, scale, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last slot to the first: gradients of the states after each to `d_kept`.

    Those of the first states replace those of the last in `d_state`. `d_own` gets what the states after a chunk
    pass on, and for the delta rule becomes the gradient of `beta (v - (k before) S)`.
    """
    program = tl.program_id(0).to(tl.int64)
    s, head = program // heads, program % heads
    rows, channels = tl.arange(0, C), tl.arange(0, BLOCK_K)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    place, inside = matrix(d_state, s, heads, head, channels, columns, D_K, D_V)
    here = tl.load(place, mask=inside, other=0.0)
    b, start, end = bounds(s, offsets, n, skip, part)
    slot = s * per
    if offsets is not None:
        slot = tl.load(firsts + s)
    chunks = tl.cdiv(end - start, C)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        begin = start + chunk * C
        size, at = tl.minimum(end - begin, C), (b * heads + head) * n + begin
        kept_place, _ = matrix(d_kept, slot + chunk, heads, head, channels, columns, D_K, D_V)
        tl.store(kept_place, here, mask=inside)
        key = rows_of(k, b, head, begin, size, channels, D_K, k_b, k_h, k_n, k_d, C)
        steps = decays(decay, at, size, channels, D_K, C, DECAY)
        before, after = before_and_after(steps, DECAY, PRECISION)
        own_place, known = of_chunk(d_own, slot + chunk, heads, head, columns, D_V, C)
        own = tl.load(own_place, mask=known, other=0.0)
        own = tl.dot(key * after, here, own, input_precision=PRECISION)
        here = faded(here, steps, DECAY)
        if DELTA:
            solved = tl.load(flat(inverses, ((slot + chunk) * heads + head) * C, rows, C, C))
            own = tl.dot(tl.trans(solved), own, input_precision=PRECISION)
            taken = strengths(beta, at, size, C)[:, None] * own
            here -= tl.dot(tl.trans(key * before), taken, input_precision=PRECISION)
        tl.store(own_place, own, mask=known)
        for member in range(0, group):
            reader = head * group + member
            query = scale * rows_of(q, b, reader, begin, size, channels, D_K, q_b, q_h, q_n, q_d, C)
            given_place = flat(d_out, (b * heads * group + reader) * n + begin, columns, D_V, C)
            given = tl.load(given_place, mask=within(size, columns, D_V, C), other=0.0)
            here = tl.dot(tl.trans(query * before), given, here, input_precision=PRECISION)
    tl.store(place, here, mask=inside)


@triton.jit
def d_keys(
    k, v, decay, beta, kept, values, d_kept, d_own, d_k, d_v, d_decay, d_beta,
    offsets, owners, firsts, n, heads, per, skip, part, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of v and beta, and those of k and decay but for what `d_queries` adds; float32 and contiguous."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, begin, size, at, key, steps = opened(
        k, decay, slot, head, offsets, owners, firsts, n, heads, per, skip, part, k_b, k_h, k_n, k_d, D_K, BLOCK_K,
        C, DECAY,
    )  # fmt: skip
    if size <= 0:
        return
    rows, channels = tl.arange(0, C), tl.arange(0, BLOCK_K)
    before, after = before_and_after(steps, DECAY, PRECISION)
    strength = strengths(beta, at, size, C)
    d_key, d_strength = tl.zeros([C, BLOCK_K], tl.float32), tl.zeros([C], tl.float32)
    through = tl.zeros([BLOCK_K], tl.float32)
    if DELTA:
        later = rows[:, None] > rows[None, :]
        earlier = tl.where(later, scores(key, key, steps, LEVELS, DECAY, PRECISION), 0.0)
        d_read, d_pairs = tl.zeros([C, BLOCK_K], tl.float32), tl.zeros([C, C], tl.float32)
    for first in range(0, D_V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        state = of_state(kept, slot, heads, head, channels, columns, D_K, D_V)
        d_after = of_state(d_kept, slot, heads, head, channels, columns, D_K, D_V)
        rest = rows_of(v, b, head, begin, size, columns, D_V, v_b, v_h, v_n, v_d, C)
        place, known = of_chunk(d_own, slot, heads, head, columns, D_V, C)
        reached = tl.load(place, mask=known, other=0.0)
        d_value = strength[:, None] * reached
        if DELTA:
            place, _ = of_chunk(values, slot, heads, head, columns, D_V, C)
            own = tl.load(place, mask=known, other=0.0)
            rest -= tl.dot(key * before, state, input_precision=PRECISION)
            rest -= tl.dot(earlier, own, input_precision=PRECISION)
            d_read -= tl.dot(d_value, tl.trans(state), input_precision=PRECISION)
            d_pairs -= tl.dot(d_value, tl.trans(own), input_precision=PRECISION)
        else:
            own = strength[:, None] * rest
        d_strength += tl.sum(reached * rest, 1)
        d_key = tl.dot(own, tl.trans(d_after), d_key, input_precision=PRECISION)
        through += tl.sum(state * d_after, 1)
        tl.store(flat(d_v, at, columns, D_V, C), d_value, mask=within(size, columns, D_V, C))
    if beta is not None:
        tl.store(d_beta + at + rows, d_strength, mask=rows < size)
    d_key *= after
    gate = total_of(tl.trans(to_middle(C, C)), key * d_key, DECAY, PRECISION)
    through *= tl.exp(tl.sum(steps, 0))
    if DECAY == "channel":
        gate += through[None, :]
    else:
        gate += tl.sum(through, 0)
    if DELTA:  # keys are queries as well, whose outputs are taken from the values
        d_read *= before
        gate += total_of(tl.trans(up_to(C)), key * d_read, DECAY, PRECISION)
        d_pairs = tl.where(later, d_pairs, 0.0)
        by_query, by_key, by_decay = gradients(d_pairs, key, key, steps, LEVELS, DECAY, PRECISION)
        d_key += d_read + by_query + by_key
        gate += by_decay
    tl.store(flat(d_k, at, channels, D_K, C), d_key, mask=within(size, channels, D_K, C))
    if DECAY == "channel":
        tl.store(flat(d_decay, at, channels, D_K, C), gate, mask=within(size, channels, D_K, C))
    elif DECAY == "scalar":
        tl.store(d_decay + at + rows, gate, mask=rows < size)


@triton.jit
def d_queries(
    q, k, v, decay, beta, kept, values, d_out, d_q, d_k, d_decay,
    offsets, owners, firsts, n, heads, group, per, skip, part, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q; what reaches k and decay by way of the outputs' own chunks is added to theirs."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, begin, size, at, key, steps = opened(
        k, decay, slot, head, offsets, owners, firsts, n, heads, per, skip, part, k_b, k_h, k_n, k_d, D_K, BLOCK_K,
        C, DECAY,
    )  # fmt: skip
    if size <= 0:
        return
    rows, channels = tl.arange(0, C), tl.arange(0, BLOCK_K)
    before, _ = before_and_after(steps, DECAY, PRECISION)
    there = within(size, channels, D_K, C)
    d_key, gate = tl.load(flat(d_k, at, channels, D_K, C), mask=there, other=0.0), tl.zeros_like(steps)
    for member in range(0, group):
        reader = head * group + member
        query = scale * rows_of(q, b, reader, begin, size, channels, D_K, q_b, q_h, q_n, q_d, C)
        row = (b * heads * group + reader) * n + begin
        d_query, d_weights = tl.zeros([C, BLOCK_K], tl.float32), tl.zeros([C, C], tl.float32)
        for first in range(0, D_V, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            given = tl.load(flat(d_out, row, columns, D_V, C), mask=within(size, columns, D_V, C), other=0.0)
            state = of_state(kept, slot, heads, head, channels, columns, D_K, D_V)
            own = written(
                v, values, beta, b, slot, heads, head, at, begin, size, columns, v_b, v_h, v_n, v_d, D_V, C,
                DELTA,
            )  # fmt: skip
            d_query = tl.dot(given, tl.trans(state), d_query, input_precision=PRECISION)
            d_weights = tl.dot(given, tl.trans(own), d_weights, input_precision=PRECISION)
        d_query *= before
        gate += total_of(tl.trans(up_to(C)), query * d_query, DECAY, PRECISION)
        d_weights = tl.where(rows[:, None] >= rows[None, :], d_weights, 0.0)
        by_query, by_key, by_decay = gradients(d_weights, query, key, steps, LEVELS, DECAY, PRECISION)
        d_key += by_key
        gate += by_decay
        tl.store(flat(d_q, row, channels, D_K, C), scale * (d_query + by_query), mask=there)
    tl.store(flat(d_k, at, channels, D_K, C), d_key, mask=there)
    if DECAY == "channel":
        place = flat(d_decay, at, channels, D_K, C)
        tl.store(place, tl.load(place, mask=there, other=0.0) + gate, mask=there)
    elif DECAY == "scalar":
        place = d_decay + at + rows
        tl.store(place, tl.load(place, mask=rows < size, other=0.0) + gate, mask=rows < size)
