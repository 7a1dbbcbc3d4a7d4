"""The Triton kernel of the scan for few tokens: one after the other, the state in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.kernels.scan.triton_chunks import bounds, matrix


@triton.jit
def read(x, b, head, token, channels, inside, at_b, at_h, at_n, at_d):
    """A token's vector in float32, 0 beyond its channels."""
    place = x + b * at_b + head * at_h + token * at_n + channels * at_d
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def steps(
    q, k, v, decay, beta, state, out, offsets, n, heads, group, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DECAY: tl.constexpr,
    DELTA: tl.constexpr,
):  # fmt: skip
    """Outputs `[B, H_q, N, D_v]` and, where the first states were found, the last ones `[S, H, D_k, D_v]`.

    A program has one head of one sequence and a block of the values' channels; nothing it does depends on the other
    blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    s, head = program // heads, program % heads
    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = rows < D_K, columns < D_V
    cells, inside = matrix(state, s, heads, head, rows, columns, D_K, D_V)
    here = tl.load(cells, mask=inside, other=0.0)
    b, start, end = bounds(s, offsets, n, 0, n)
    for token in range(start, end):
        row = (b * heads + head) * n + token
        if DECAY == "channel":
            here *= tl.exp(tl.load(decay + row * D_K + rows, mask=in_k, other=0.0))[:, None]
        elif DECAY == "scalar":
            here *= tl.exp(tl.load(decay + row))
        key = read(k, b, head, token, rows, in_k, k_b, k_h, k_n, k_d)[:, None]
        value = read(v, b, head, token, columns, in_v, v_b, v_h, v_n, v_d)
        if DELTA:
            value -= tl.sum(here * key, 0)
        if beta is not None:
            value *= tl.load(beta + row)
        here += key * value[None, :]
        for member in range(0, group):
            reader = head * group + member
            query = read(q, b, reader, token, rows, in_k, q_b, q_h, q_n, q_d)[:, None]
            place = out + ((b * heads * group + reader) * n + token) * D_V + columns
            tl.store(place, scale * tl.sum(here * query, 0), mask=in_v)
    tl.store(cells, here, mask=inside)
