"""The forward kernel of the Triton engine, and the merge of what flat units have in their slots."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.kernels.attend_tiles.triton_shared import LOG2E, finish, keys_of, load, locate, store, tokens


@triton.jit
def attend_block(
    block, acc, total, top, queries, k, v, pages, b, kv, head, q_token, q_inside, entries, length, columns, view,
    bias, scale, softcap, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, AXES: tl.constexpr, PACK: tl.constexpr, CHECK: tl.constexpr, FLAT: tl.constexpr,
    MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys added to the running softmax: `acc`, its `total` weight, and the largest score, `top`."""
    token, inside = keys_of(block, entries, length, columns, b, kv, BLOCK_N, PACK, FLAT)
    own, at = b, token
    if pages.ptr is not None:
        own = tl.load(pages.ptr + b * pages.b + token // pages.size, mask=inside, other=0)
        at = token % pages.size
    keys = load(k, own, kv, at, inside, D, BLOCK_D, CHECK or MASKED).to(DOT)
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [queries, keys]
    s, _ = finish(
        s, b, head[:, None], kv, q_token[:, None], token[None, :], q_inside[:, None], inside[None, :], view, bias,
        scale, softcap, AXES, MASKED, CHECK,
    )  # fmt: skip
    higher = tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher) * LOG2E  # rows that have seen nothing yet
    weights = tl.exp2(s * LOG2E - base[:, None])
    shrink = tl.exp2(top * LOG2E - base)
    values = load(v, own, kv, at, inside, D_V, BLOCK_V, CHECK or MASKED).to(DOT)
    acc = tl.dot(weights.to(DOT), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total * shrink + tl.sum(weights, 1), higher


@triton.jit
def attend(
    q, k, v, pages, out, out_lse, rows, columns, work, view, bias, scale, softcap, heads, group,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, AXES: tl.constexpr,
    FLAT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Attention of some queries over their key tiles, or with FLAT over one key tile: `out` and `out_lse`."""
    b, kv, head, q_token, q_inside, target, entries, length, masked, count = locate(
        rows, columns, work, heads, group, BLOCK_M, BLOCK_N, PACK, FLAT
    )
    queries = load(q, b, head, q_token, q_inside, D, BLOCK_D, True).to(DOT)  # [queries, D]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for block in range(0, masked):
        acc, total, top = attend_block(
            block, acc, total, top, queries, k, v, pages, b, kv, head, q_token, q_inside, entries, length, columns,
            view, bias, scale, softcap, D, D_V, BLOCK_D, BLOCK_V, BLOCK_N, AXES, PACK, CHECK, FLAT, True, DOT,
            PRECISION,
        )  # fmt: skip
    for block in range(masked, count):
        acc, total, top = attend_block(
            block, acc, total, top, queries, k, v, pages, b, kv, head, q_token, q_inside, entries, length, columns,
            view, bias, scale, softcap, D, D_V, BLOCK_D, BLOCK_V, BLOCK_N, AXES, PACK, CHECK, FLAT, False, DOT,
            PRECISION,
        )  # fmt: skip
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    store(out, b, head, target, q_inside, acc / total[:, None], D_V, BLOCK_V)
    at = out_lse.ptr + b * out_lse.b + head * out_lse.h + target
    tl.store(at, tl.where(empty, float("-inf"), top + tl.log(total)), mask=q_inside)


@triton.jit
def merge_slots(
    parts, part_lse, out, out_lse, axis, starts, first, units, heads, factor, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Results of units `first` on from their slots: merged by `part_lse`, or without it added, times `factor`."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = lane // axis.size < units
    unit = tl.minimum(lane // axis.size, units - 1)
    row = (first + unit) // axis.tiles
    b = row // heads
    h = row % heads
    place = lane % axis.size
    token, inside = tokens((first + unit) % axis.tiles, place, inside, axis, b, h)
    start = tl.load(starts + unit)
    count = tl.where(inside, tl.load(starts + unit + 1) - start, 0)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for slot in range(0, tl.max(count, 0).to(tl.int32)):
        at = (start + slot) * axis.size + place
        have = slot < count
        part = tl.load(parts + at[:, None] * D + d[None, :], mask=have[:, None] & (d < D)[None, :], other=0.0)
        if part_lse is None:
            acc += part
        else:
            one = tl.load(part_lse + at, mask=have, other=float("-inf"))
            higher = tl.maximum(top, one)
            base = tl.where(higher == float("-inf"), 0.0, higher) * LOG2E
            weight = tl.exp2(one * LOG2E - base)
            shrink = tl.exp2(top * LOG2E - base)
            acc = acc * shrink[:, None] + part * weight[:, None]
            total = total * shrink + weight
            top = higher
    if part_lse is None:
        store(out, b, h, token, inside, acc * factor, D, BLOCK_D)
    else:
        empty = total == 0
        total = tl.where(empty, 1.0, total)
        store(out, b, h, token, inside, acc / total[:, None], D, BLOCK_D)
        at = out_lse.ptr + b * out_lse.b + h * out_lse.h + token
        tl.store(at, tl.where(empty, float("-inf"), top + tl.log(total)), mask=inside)
