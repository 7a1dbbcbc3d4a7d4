"""The Triton kernels of the scan over chunks of C tokens: products of matrices, forward and backward.

With A the scores of queries and earlier keys and S the state before the chunk, its outputs are
`A u + (q before) S`, and the state after it is `total S + (k after)^T u`; `u` is `beta v`, and for the delta rule
`X beta (v - (k before) S)` with X the inverse of I + beta B, B being scores of keys and earlier keys (Yang et al.,
2024). `before`, `after` and `total` are factors of decay. Only the states depend on each other: `states` and
`d_states` go from chunk to chunk, all other kernels do every chunk at once.

A slot is a chunk of a sequence. Of each sequence the tokens from `skip` on are worked on, `part` at most, so that
what is kept of each slot is bounded. Sequences have `per` slots each; packed ones begin at slot `firsts`, and
`owners` says whose a slot is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.kernels.scan.triton_pairs import (
    before_and_after,
    faded,
    gradients,
    inverse,
    scores,
    to_middle,
    total_of,
    up_to,
)


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
def written(
    v, values, beta, b, slot, heads, head, at, begin, size, columns, v_b, v_h, v_n, v_d,
    D_V: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """`u` of a chunk `[C, columns]`."""
    if DELTA:
        place = flat(values, (slot * heads + head) * C, columns, D_V, C)
        own = tl.load(place, mask=(columns < D_V)[None, :], other=0.0)
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
    b, begin, size = placed(slot, offsets, owners, firsts, n, per, skip, part, C)
    if size <= 0:
        return
    rows, channels = tl.arange(0, C), tl.arange(0, BLOCK_K)
    at = (b * heads + head) * n + begin
    key = rows_of(k, b, head, begin, size, channels, D_K, k_b, k_h, k_n, k_d, C)
    steps = decays(decay, at, size, channels, D_K, C, DECAY)
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
            value_place = flat(values, (slot * heads + head) * C, columns, D_V, C)
            tl.store(value_place, own, mask=(columns < D_V)[None, :])
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
    head = reader // group
    b, begin, size = placed(slot, offsets, owners, firsts, n, per, skip, part, C)
    if size <= 0:
        return
    channels, at = tl.arange(0, BLOCK_K), (b * heads + head) * n + begin
    query = scale * rows_of(q, b, reader, begin, size, channels, D_K, q_b, q_h, q_n, q_d, C)
    key = rows_of(k, b, head, begin, size, channels, D_K, k_b, k_h, k_n, k_d, C)
    steps = decays(decay, at, size, channels, D_K, C, DECAY)
    weights = scores(query, key, steps, LEVELS, DECAY, PRECISION)
    before, _ = before_and_after(steps, DECAY, PRECISION)
    query *= before
    for first in range(0, D_V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        place, inside = matrix(kept, slot, heads, head, channels, columns, D_K, D_V)
        state = tl.load(place, mask=inside, other=0.0)
        own = written(
            v, values, beta, b, slot, heads, head, at, begin, size, columns, v_b, v_h, v_n, v_d, D_V, C, DELTA
        )
        found = tl.dot(query, state, input_precision=PRECISION)
        found = tl.dot(weights, own, found, input_precision=PRECISION)
        place = flat(out, (b * heads * group + reader) * n + begin, columns, D_V, C)
        tl.store(place, found, mask=within(size, columns, D_V, C))


@triton.jit
def d_values(
    q, k, decay, d_out, d_own, offsets, owners, firsts, n, heads, group, per, skip, part, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What reaches `u` from the outputs of its own chunk, `[slots, H, C, D_v]`."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, begin, size = placed(slot, offsets, owners, firsts, n, per, skip, part, C)
    if size <= 0:
        return
    channels = tl.arange(0, BLOCK_K)
    columns = tl.program_id(2).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    key = rows_of(k, b, head, begin, size, channels, D_K, k_b, k_h, k_n, k_d, C)
    steps = decays(decay, (b * heads + head) * n + begin, size, channels, D_K, C, DECAY)
    found = tl.zeros([C, BLOCK_V], tl.float32)
    for member in range(0, group):
        reader = head * group + member
        query = scale * rows_of(q, b, reader, begin, size, channels, D_K, q_b, q_h, q_n, q_d, C)
        weights = scores(query, key, steps, LEVELS, DECAY, PRECISION)
        place = flat(d_out, (b * heads * group + reader) * n + begin, columns, D_V, C)
        given = tl.load(place, mask=within(size, columns, D_V, C), other=0.0)
        found = tl.dot(tl.trans(weights), given, found, input_precision=PRECISION)
    place = flat(d_own, (slot * heads + head) * C, columns, D_V, C)
    tl.store(place, found, mask=(columns < D_V)[None, :])


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
        own_place = flat(d_own, ((slot + chunk) * heads + head) * C, columns, D_V, C)
        own = tl.load(own_place, mask=(columns < D_V)[None, :], other=0.0)
        own = tl.dot(key * after, here, own, input_precision=PRECISION)
        here = faded(here, steps, DECAY)
        if DELTA:
            solved = tl.load(flat(inverses, ((slot + chunk) * heads + head) * C, rows, C, C))
            own = tl.dot(tl.trans(solved), own, input_precision=PRECISION)
            taken = strengths(beta, at, size, C)[:, None] * own
            here -= tl.dot(tl.trans(key * before), taken, input_precision=PRECISION)
        tl.store(own_place, own, mask=(columns < D_V)[None, :])
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
    b, begin, size = placed(slot, offsets, owners, firsts, n, per, skip, part, C)
    if size <= 0:
        return
    rows, channels, at = tl.arange(0, C), tl.arange(0, BLOCK_K), (b * heads + head) * n + begin
    key = rows_of(k, b, head, begin, size, channels, D_K, k_b, k_h, k_n, k_d, C)
    steps = decays(decay, at, size, channels, D_K, C, DECAY)
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
        known = (columns < D_V)[None, :]
        place, inside = matrix(kept, slot, heads, head, channels, columns, D_K, D_V)
        state = tl.load(place, mask=inside, other=0.0)
        place, inside = matrix(d_kept, slot, heads, head, channels, columns, D_K, D_V)
        d_after = tl.load(place, mask=inside, other=0.0)
        rest = rows_of(v, b, head, begin, size, columns, D_V, v_b, v_h, v_n, v_d, C)
        reached = tl.load(flat(d_own, (slot * heads + head) * C, columns, D_V, C), mask=known, other=0.0)
        d_value = strength[:, None] * reached
        if DELTA:
            own = tl.load(flat(values, (slot * heads + head) * C, columns, D_V, C), mask=known, other=0.0)
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
    b, begin, size = placed(slot, offsets, owners, firsts, n, per, skip, part, C)
    if size <= 0:
        return
    rows, channels, at = tl.arange(0, C), tl.arange(0, BLOCK_K), (b * heads + head) * n + begin
    key = rows_of(k, b, head, begin, size, channels, D_K, k_b, k_h, k_n, k_d, C)
    steps = decays(decay, at, size, channels, D_K, C, DECAY)
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
            place, inside = matrix(kept, slot, heads, head, channels, columns, D_K, D_V)
            state = tl.load(place, mask=inside, other=0.0)
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
