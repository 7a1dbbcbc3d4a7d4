"""What the Triton kernels share: which tokens a program works on, loads and stores, and scores.

Query and key tokens are found lane by lane: a lane has an entry of a list (which tile) and a place within that
tile. Offsets are 64 bits wide. All arithmetic on scores is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2 ** (x * LOG2E)


@triton.jit
def lanes(chunk, entries, count, size, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """Tiles `entries [count]` of `size` tokens laid side by side and cut into blocks: lanes of block `chunk`.

    PACK: several whole tiles to a block, else blocks lie within tiles. Returns each lane's tile, its place in it,
    and whether there is one.
    """
    lane = tl.arange(0, BLOCK)
    if PACK:
        per = BLOCK // size
        which = lane // size
        inside = (which < per) & (chunk * per + which < count)
        tile = tl.load(entries + chunk * per + which, mask=inside, other=0).to(tl.int64)
        place = lane % size
    else:
        per = (size + BLOCK - 1) // BLOCK
        tile = tl.load(entries + chunk // per).to(tl.int64)
        place = (chunk % per) * BLOCK + lane
        inside = place < size
    return tile, place, inside


@triton.jit
def blocks(count, size, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """How many blocks `lanes` cuts `count` tiles into."""
    if PACK:
        per = BLOCK // size
        total = (count + per - 1) // per
    else:
        total = count * ((size + BLOCK - 1) // BLOCK)
    return total


@triton.jit
def tokens(tile, place, inside, axis, b, h):
    """Which token lies at `place` of `tile`, and whether there is one."""
    if axis.bounds is not None:
        bounds = axis.bounds + b * axis.bounds_b + h * axis.bounds_h + tile
        start = tl.load(bounds)
        stop = tl.load(bounds + 1)
    else:
        start = tile * axis.size
        stop = tl.minimum(start + axis.size, axis.n)
    token = start + place
    inside = inside & (token < stop)
    if axis.order is not None:
        token = tl.load(axis.order + b * axis.order_b + h * axis.order_h + token, mask=inside, other=0)
    return token, inside


@triton.jit
def load(x, b, h, token, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows `token` of a tensor `[B, H, N, D]`, `[lanes, BLOCK_D]`; 0 beyond D and, with CHECK, where not inside."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    at = x.ptr + (b * x.b + h * x.h + token * x.n)[:, None] + (d * x.d)[None, :]
    if D == BLOCK_D:
        if CHECK:
            found = tl.load(at, mask=inside[:, None], other=0.0)
        else:
            found = tl.load(at)
    else:
        if CHECK:
            found = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        else:
            found = tl.load(at, mask=(d < D)[None, :], other=0.0)
    return found


@triton.jit
def store(x, b, h, token, inside, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `values [lanes, BLOCK_D]` to rows `token`, rounded to the tensor's dtype."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    at = x.ptr + (b * x.b + h * x.h + token * x.n)[:, None] + (d * x.d)[None, :]
    tl.store(at, values.to(x.ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def tanh(x):
    """tanh to float32 rounding; Lambert's continued fraction where 1 - exp(-2 x) would cancel."""
    size = tl.abs(x)
    decay = tl.exp2(size * (-2 * 1.4426950408889634))
    square = tl.minimum(size * size, 1.0)
    near = size * (945 + square * (105 + square)) / (945 + square * (420 + square * 15))
    found = tl.where(size < 0.5, near, (1 - decay) / (1 + decay))
    return tl.where(x < 0, -found, found)


@triton.jit
def finish(
    s, b, head, kv, q_token, k_token, q_inside, k_inside, view, bias, scale, softcap,
    AXES: tl.constexpr, MASKED: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Scores from dot products `s`: scaled, capped, biased, -inf where hidden; and the slope of the cap.

    Works on `[queries, keys]` and `[keys, queries]`: what belongs to queries and to keys comes with an axis of 1
    in the other's place. MASKED: some may be hidden; CHECK: some key lanes are empty.
    """
    s = s * scale
    slope = s
    if softcap is not None:
        capped = tanh(s / softcap)
        slope = 1 - capped * capped
        s = capped * softcap
    if bias.ptr is not None:
        at = bias.ptr + b * bias.b + head * bias.h + q_token * bias.q + k_token * bias.k
        s += tl.load(at, mask=q_inside & k_inside, other=0.0).to(tl.float32)
    if MASKED:
        seen = q_inside & k_inside
        limits = view.limits + b * view.limits_b + head * view.limits_h + q_token * (2 * AXES)
        positions = view.pos + b * view.pos_b + kv * view.pos_h + k_token * AXES
        for axis in tl.static_range(AXES):
            low = tl.load(limits + axis, mask=q_inside, other=0)
            high = tl.load(limits + AXES + axis, mask=q_inside, other=0)
            pos = tl.load(positions + axis, mask=k_inside, other=0)
            seen = seen & (low <= pos) & (pos <= high)
        if view.dense is not None:
            at = view.dense + b * view.dense_b + head * view.dense_h
            at += q_token * view.dense_q + k_token * view.dense_k
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        s = tl.where(seen, s, float("-inf"))
    else:
        if CHECK:
            s = tl.where(k_inside, s, float("-inf"))
    return s, slope


@triton.jit
def locate(
    rows, columns, work, heads, group, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """This program's queries and the blocks of keys they meet.

    Returns batch entry, kv head, query heads, query tokens and whether they are there; where their results go;
    the key tiles as a list and its length (with FLAT, instead of a length, the one tile); the number of blocks
    that need a mask, which come first, and of all blocks.
    """
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    if FLAT:
        column = tl.load(work.columns + pid)
        first = tl.load(work.first + pid)
        count = tl.load(work.sizes + pid)
        tile = (column // 2) % columns.tiles
        row = column // 2 // columns.tiles
        b = row // (heads // group)
        kv = row % (heads // group)
        which, place, inside = lanes(0, work.entries + first, count, rows.size, BLOCK_M, True)
        head = kv * group + which // rows.tiles
        q_token, inside = tokens(which % rows.tiles, place, inside, rows, b, head)
        slot = tl.load(work.slots + first + lane // rows.size, mask=inside, other=0)
        target = slot * rows.size + place
        entries = work.entries
        length = tile
        total = (columns.size + BLOCK_N - 1) // BLOCK_N
        masked = tl.where(column % 2 == 0, total, 0)
    else:
        per_tile = (rows.size + BLOCK_M - 1) // BLOCK_M
        per_head = rows.tiles * per_tile
        b = pid // per_head // heads
        head = pid // per_head % heads
        kv = head // group
        back = per_head - 1 - pid % per_head  # the last queries of a causal mask see most: they go first
        place = back % per_tile * BLOCK_M + lane
        q_token, inside = tokens(back // per_tile, place, place < rows.size, rows, b, head)
        target = q_token
        row = b * work.b + head * work.h + back // per_tile
        entries = work.entries + tl.load(work.starts + row)
        length = tl.load(work.counts + 2 * row + 1)
        masked = blocks(tl.load(work.counts + 2 * row), columns.size, BLOCK_N, PACK)
        total = blocks(length, columns.size, BLOCK_N, PACK)
        head += tl.zeros([BLOCK_M], tl.int64)
    return b, kv, head, q_token, inside, target, entries, length, masked, total


@triton.jit
def keys_of(
    block, entries, length, columns, b, kv, BLOCK_N: tl.constexpr, PACK: tl.constexpr, FLAT: tl.constexpr
):
    """Tokens of one block of keys found by `locate`, and whether they are there."""
    if FLAT:
        tile = length
        place = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = place < columns.size
    else:
        tile, place, inside = lanes(block, entries, length, columns.size, BLOCK_N, PACK)
    return tokens(tile, place, inside, columns, b, kv)
