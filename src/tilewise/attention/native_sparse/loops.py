"""The two loop orders of selected attention: what each computes and moves, and FSA's written out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LoopCosts(NamedTuple):
    """What the two loops of a selection cost.

    useful: products of a query and a key that the selection asks for (whole blocks).
    by_queries: those computed when each query in turn loops over its blocks, the query heads of its group padded to
        the rows of a matrix instruction. by_blocks: those when each block in turn takes the queries that chose it,
        padded once per block and head.
    moved_by_queries, moved_by_blocks: numbers read and written, without caches: keys and values of a block for each
        query that reads it and the answers; or, for each block, its keys and values and the queries once, and parts
        of answers with their maxima and sums, written and read again to be merged.
    """

    useful: int
    by_queries: int
    by_blocks: int
    moved_by_queries: int
    moved_by_blocks: int


def loop_costs(
    index: Tensor, heads: int, block: int, *, rows: int = 16, head_dim: int = 64, tile: int = 64
) -> LoopCosts:
    """What a selection costs in the loop order of NSA and in that of FSA (Yan et al., 2025, arXiv 2508.18224).

    NSA's kernel takes a query, stacks the heads of its group into one matrix and loops over the blocks that it
    chose. Matrix instructions have at least 16 rows, so a group of 4 heads computes four times what it needs. FSA
    takes a block and loops over the queries that chose it, gathered head by head into tiles of queries; only the
    last tile is padded.

    Args:
        index: int64 `[B, H_kv, N_q, W]`, the blocks each query reads, -1 for none. heads: H_q. block: keys a block.
        rows: rows of a matrix instruction. head_dim: D, for what is moved. tile: queries for which the keys and
            values of a block are loaded once, in the loop over blocks.

    Raises ValueError for sizes below 1 and heads that are no multiple of H_kv.
    """
    sizes = {"heads": heads, "block": block, "rows": rows, "head_dim": head_dim, "tile": tile}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if heads % index.shape[1]:
        raise ValueError(f"heads must be a multiple of the {index.shape[1]} kv heads, got {heads}")
    group, queries = heads // index.shape[1], index.shape[0] * heads * index.shape[2]
    counts = chosen_by(index)
    pairs = int(counts.sum())  # of a query of a kv head and a block
    padded = int(((counts + rows - 1) // rows * rows).sum()) * group
    loads = int(((counts + tile - 1) // tile).sum()) * group
    own = 2 * queries * head_dim  # a query read and an answer written
    return LoopCosts(
        useful=pairs * group * block,
        by_queries=pairs * -(-group // rows) * rows * block,
        by_blocks=padded * block,
        moved_by_queries=own + pairs * 2 * block * head_dim,
        moved_by_blocks=own + loads * 2 * block * head_dim + pairs * group * (3 * head_dim + 4),
    )


def chosen_by(index: Tensor) -> Tensor:
    """How many queries chose each block: int64 `[B, H_kv, blocks]`."""
    blocks = int(index.max()) + 1 if index.numel() else 0
    flat = index.masked_fill(index < 0, blocks).flatten(2)
    counts = torch.zeros(*index.shape[:2], blocks + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(2, flat, torch.ones_like(flat))[..., :blocks]


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, index: Tensor, block: int) -> Tensor:
    """Causal attention to chosen blocks in FSA's loop order, forward and backward: the order's definition.

    One block of keys after another, each with the queries that chose it, gathered: first their maxima and sums over
    all blocks, then the answers, added up; backward alike, where a block's gradients need no adding up. A Python
    loop, to show and to test the order by; `NativeSparseAttention` runs on the tile operator, whose torch engine
    takes flat tiles in this order as well, with many blocks at once.

    Args:
        q `[B, H_q, N_q, D]`, the last of N_k positions; k `[B, H_kv, N_k, D]`; v `[B, H_kv, N_k, D_v]`.
        index: int64 `[B, H_kv, N_q, W]`, -1 for none. block: keys per block.

    Returns `[B, H_q, N_q, D_v]` in q's dtype; float32 inside, or float64 for such inputs.
    """
    return _ByBlocks.apply(q, k, v, index, block)


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, block: int) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        heads, kv_heads = q.shape[1], k.shape[1]
        folded = q.to(wide).unflatten(1, (kv_heads, heads // kv_heads))  # [b, h_kv, group, n_q, d]
        out = folded.new_zeros(*folded.shape[:4], v.shape[3])
        lse = folded.new_full(folded.shape[:4], -torch.inf)
        for at, rows, keys in _blocks(index, k.shape[2], block):
            scores = _scores(folded, k, at, rows, keys)
            lse[at][:, rows] = torch.logaddexp(lse[at][:, rows], scores.logsumexp(-1))
        lse = lse.masked_fill(lse == -torch.inf, 0)  # of queries that see nothing, whose weights are 0
        for at, rows, keys in _blocks(index, k.shape[2], block):
            weights = (_scores(folded, k, at, rows, keys) - lse[at][:, rows].unsqueeze(-1)).exp()
            out[at][:, rows] += weights @ v[at][keys].to(wide)
        ctx.save_for_backward(q, k, v, index, out, lse)
        ctx.block = block
        return out.flatten(1, 2).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, index, out, lse = ctx.saved_tensors
        folded, d_out = (x.to(out.dtype).unflatten(1, out.shape[1:3]) for x in (q, d_outs[0]))
        scale = 1 / math.sqrt(q.shape[3])
        mean = (d_out * out).sum(-1, keepdim=True)
        dq, dk, dv = (torch.zeros_like(x, dtype=out.dtype) for x in (folded, k, v))
        for at, rows, keys in _blocks(index, k.shape[2], ctx.block):
            weights = (_scores(folded, k, at, rows, keys) - lse[at][:, rows].unsqueeze(-1)).exp()
            d_here = d_out[at][:, rows]
            dv[at][keys] = (weights.mT @ d_here).sum(0)
            d_scores = weights * (d_here @ v[at][keys].to(out.dtype).mT - mean[at][:, rows]) * scale
            dq[at][:, rows] += d_scores @ k[at][keys].to(out.dtype)
            dk[at][keys] = (d_scores.mT @ folded[at][:, rows]).sum(0)
        return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _blocks(index: Tensor, n_k: int, block: int):
    """Batch entry and kv head, the queries that chose a block, and its keys: for every block that was chosen."""
    for b in range(index.shape[0]):
        for head in range(index.shape[1]):
            for number in range(-(-n_k // block)):
                rows = (index[b, head] == number).any(-1).nonzero().squeeze(1)
                if len(rows):
                    yield (b, head), rows, slice(number * block, min((number + 1) * block, n_k))


def _scores(folded: Tensor, k: Tensor, at: tuple[int, int], rows: Tensor, keys: slice) -> Tensor:
    """Scaled scores of gathered queries of all heads of a group with the keys of a block: `[group, rows, keys]`."""
    some = k[at][keys].to(folded.dtype)
    scores = folded[at][:, rows] @ some.mT / math.sqrt(k.shape[3])
    place = rows.unsqueeze(1) + (k.shape[2] - folded.shape[3])
    return scores.masked_fill(torch.arange(keys.start, keys.stop, device=k.device) > place, -torch.inf)
