"""The backward kernels of the Triton engine: gradients of queries by unit, of keys, values and bias by key tile.

Weights are computed again from the scores and the lse. No two programs write one number, but for the gradient of
a bias that batch entries or heads share (see `add_d_bias`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.kernels.attend_tiles.triton_shared import (
    LOG2E,
    blocks,
    finish,
    keys_of,
    lanes,
    load,
    locate,
    store,
    tokens,
)


@triton.jit
def row_deltas(
    out, d_out, d_lse, delta, heads, n, total, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr
):
    """`delta = sum(out * d_out) - d_lse`, what every score of a row has in common; all `[B, H, N]`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < total
    b = row // n // heads
    h = row // n % heads
    one = load(out, b, h, row % n, inside, D, BLOCK_D, True).to(tl.float32)
    other = load(d_out, b, h, row % n, inside, D, BLOCK_D, True).to(tl.float32)
    lse = tl.load(d_lse + row, mask=inside, other=0.0)
    tl.store(delta + row, tl.sum(one * other, 1) - lse, mask=inside)


@triton.jit
def row_numbers(lse, delta, b, head, token, inside):
    """lse in powers of two and delta of queries; where there is none, such that all weights are 0."""
    at = b * lse.b + head * lse.h + token
    log = tl.load(lse.ptr + at, mask=inside, other=float("-inf"))
    log = tl.where(log == float("-inf"), float("inf"), log)
    return log * LOG2E, tl.load(delta + at, mask=inside, other=0.0)


@triton.jit
def d_queries_block(
    block, acc, queries, d_outs, log, delta, k, v, b, kv, head, q_token, q_inside, entries, length, columns, view,
    bias, scale, softcap, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, AXES: tl.constexpr, PACK: tl.constexpr, CHECK: tl.constexpr, FLAT: tl.constexpr,
    MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys added to the gradient of the queries."""
    token, inside = keys_of(block, entries, length, columns, b, kv, BLOCK_N, PACK, FLAT)
    keys = load(k, b, kv, token, inside, D, BLOCK_D, CHECK or MASKED).to(DOT)
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [queries, keys]
    s, slope = finish(
        s, b, head[:, None], kv, q_token[:, None], token[None, :], q_inside[:, None], inside[None, :], view, bias,
        scale, softcap, AXES, MASKED, CHECK,
    )  # fmt: skip
    weights = tl.exp2(s * LOG2E - log[:, None])
    values = load(v, b, kv, token, inside, D_V, BLOCK_V, CHECK or MASKED).to(DOT)
    d_s = weights * (tl.dot(d_outs, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    if softcap is not None:
        d_s *= slope
    return tl.dot(d_s.to(DOT), keys, acc, input_precision=PRECISION)


@triton.jit
def d_queries(
    q, k, v, d_out, lse, delta, out, rows, columns, work, view, bias, scale, softcap, factor, heads, group,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, AXES: tl.constexpr,
    FLAT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Gradient of some queries, times `factor`, to `out`; with FLAT the share of one key tile."""
    b, kv, head, q_token, q_inside, target, entries, length, masked, count = locate(
        rows, columns, work, heads, group, BLOCK_M, BLOCK_N, PACK, FLAT
    )
    queries = load(q, b, head, q_token, q_inside, D, BLOCK_D, True).to(DOT)  # [queries, D]
    d_outs = load(d_out, b, head, q_token, q_inside, D_V, BLOCK_V, True).to(DOT)  # [queries, D_V]
    log, deltas = row_numbers(lse, delta, b, head, q_token, q_inside)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(0, masked):
        acc = d_queries_block(
            block, acc, queries, d_outs, log, deltas, k, v, b, kv, head, q_token, q_inside, entries, length,
            columns, view, bias, scale, softcap, D, D_V, BLOCK_D, BLOCK_V, BLOCK_N, AXES, PACK, CHECK, FLAT, True,
            DOT, PRECISION,
        )  # fmt: skip
    for block in range(masked, count):
        acc = d_queries_block(
            block, acc, queries, d_outs, log, deltas, k, v, b, kv, head, q_token, q_inside, entries, length,
            columns, view, bias, scale, softcap, D, D_V, BLOCK_D, BLOCK_V, BLOCK_N, AXES, PACK, CHECK, FLAT, False,
            DOT, PRECISION,
        )  # fmt: skip
    store(out, b, head, target, q_inside, acc * factor, D, BLOCK_D)


@triton.jit
def add_d_bias(
    d_s,
    bias,
    b,
    kv,
    group,
    g,
    inside,
    head,
    q_token,
    k_token,
    k_inside,
    PACK: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Add the gradient of the scores, `[keys, queries]`, to that of the bias.

    BIAS "keys": one number a key and head. Only this program adds to it, each number by one thread, so that even
    atomics add in a fixed order. "grid": a number each, stored once; "shared": those of several heads, added.
    """
    if BIAS == "keys":
        at = bias.grad + b * bias.grad_b + k_token * bias.grad_k
        if PACK:  # rows of several heads
            first = tl.min(tl.where(inside, g, group), 0)
            last = tl.max(tl.where(inside, g, -1), 0)
            for one in range(first.to(tl.int32), last.to(tl.int32) + 1):
                share = tl.sum(tl.where((inside & (g == one))[None, :], d_s, 0.0), 1)
                tl.atomic_add(at + (kv * group + one) * bias.grad_h, share, mask=k_inside, sem="relaxed")
        else:
            tl.atomic_add(at + (kv * group + g) * bias.grad_h, tl.sum(d_s, 1), mask=k_inside, sem="relaxed")
    else:
        at = bias.grad + b * bias.grad_b + head[None, :] * bias.grad_h
        at += q_token[None, :] * bias.grad_q + k_token[:, None] * bias.grad_k
        mask = inside[None, :] & k_inside[:, None]
        if BIAS == "shared":
            tl.atomic_add(at, d_s, mask=mask, sem="relaxed")
        else:
            tl.store(at, d_s.to(bias.grad.dtype.element_ty), mask=mask)


@triton.jit
def d_keys_block(
    block, d_key, d_value, keys, values, q, d_out, lse, delta, b, kv, k_token, k_inside, entries, length, rows,
    view, bias, scale, softcap, group, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, AXES: tl.constexpr, PACK: tl.constexpr, MASKED: tl.constexpr,
    BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries added to the gradients of the keys and values."""
    which, place, inside = lanes(block, entries, length, rows.size, BLOCK_M, PACK)
    g = which // rows.tiles
    head = kv * group + g + tl.zeros([BLOCK_M], tl.int64)
    token, inside = tokens(which % rows.tiles, place, inside, rows, b, head)
    queries = load(q, b, head, token, inside, D, BLOCK_D, True).to(DOT)
    s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # [keys, queries]
    s, slope = finish(
        s, b, head[None, :], kv, token[None, :], k_token[:, None], inside[None, :], k_inside[:, None], view, bias,
        scale, softcap, AXES, MASKED, False,
    )  # fmt: skip
    log, deltas = row_numbers(lse, delta, b, head, token, inside)
    weights = tl.exp2(s * LOG2E - log[None, :])
    d_outs = load(d_out, b, head, token, inside, D_V, BLOCK_V, True).to(DOT)
    d_value = tl.dot(weights.to(DOT), d_outs, d_value, input_precision=PRECISION)
    d_s = weights * (tl.dot(values, tl.trans(d_outs), input_precision=PRECISION) - deltas[None, :])
    if BIAS is not None:
        add_d_bias(d_s, bias, b, kv, group, g, inside, head, token, k_token, k_inside, PACK, BIAS)
    if softcap is not None:
        d_s *= slope
    return tl.dot(d_s.to(DOT), queries, d_key, input_precision=PRECISION), d_value


@triton.jit
def d_keys(
    q, k, v, d_out, lse, delta, d_k, d_v, rows, columns, work, view, bias, scale, softcap, kv_heads, group,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, AXES: tl.constexpr,
    BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values from all queries of their kv head that meet their tile."""
    pid = tl.program_id(0).to(tl.int64)
    per_tile = (columns.size + BLOCK_N - 1) // BLOCK_N
    per_head = columns.tiles * per_tile
    b = pid // per_head // kv_heads
    kv = pid // per_head % kv_heads
    tile = pid % per_head // per_tile
    place = pid % per_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_token, k_inside = tokens(tile, place, place < columns.size, columns, b, kv)
    keys = load(k, b, kv, k_token, k_inside, D, BLOCK_D, True).to(DOT)  # [keys, D]
    values = load(v, b, kv, k_token, k_inside, D_V, BLOCK_V, True).to(DOT)  # [keys, D_V]
    d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    row = b * work.b + kv * work.h + tile
    entries = work.entries + tl.load(work.starts + row)
    length = tl.load(work.counts + 2 * row + 1)
    masked = blocks(tl.load(work.counts + 2 * row), rows.size, BLOCK_M, PACK)
    for block in range(0, masked):
        d_key, d_value = d_keys_block(
            block, d_key, d_value, keys, values, q, d_out, lse, delta, b, kv, k_token, k_inside, entries, length,
            rows, view, bias, scale, softcap, group, D, D_V, BLOCK_D, BLOCK_V, BLOCK_M, AXES, PACK, True, BIAS,
            DOT, PRECISION,
        )  # fmt: skip
    if BIAS == "keys":
        tl.debug_barrier()  # the next loop may give a number to another thread
    for block in range(masked, blocks(length, rows.size, BLOCK_M, PACK)):
        d_key, d_value = d_keys_block(
            block, d_key, d_value, keys, values, q, d_out, lse, delta, b, kv, k_token, k_inside, entries, length,
            rows, view, bias, scale, softcap, group, D, D_V, BLOCK_D, BLOCK_V, BLOCK_M, AXES, PACK, False, BIAS,
            DOT, PRECISION,
        )  # fmt: skip
    store(d_k, b, kv, k_token, k_inside, d_key * scale, D, BLOCK_D)
    store(d_v, b, kv, k_token, k_inside, d_value, D_V, BLOCK_V)
