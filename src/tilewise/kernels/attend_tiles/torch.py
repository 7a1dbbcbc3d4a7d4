"""The torch engine: vectorised PyTorch on any device, forward and backward, memory bounded.

Work is cut into batches of dense blocks for `torch.bmm`. Tall query tiles go row by row: a block is one query
tile against all of its key tiles. Flat ones (a query routed alone) go key tile by key tile: a block is one key
tile against some of the query tiles that chose it, and the parts are merged. Low precision is widened to
float32 tile by tile, because CPUs multiply float16 at a hundredth of the speed and round bfloat16 scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles import op
from tilewise.kernels.attend_tiles.blocks import Block, Prepared, column_blocks, row_blocks
from tilewise.kernels.attend_tiles.call import Call
from tilewise.tiles import Partial


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Partial:
    """Attention over the kept tiles of `call`."""
    return op.run(call, "torch")


def forward(call: Call) -> Partial:
    p = Prepared.of(call)
    out = p.q.new_zeros(p.units + 1, p.height, p.v.shape[2])  # the last unit takes what padding writes
    lse = p.q.new_full((p.units + 1, p.height), -torch.inf)
    if p.by_rows:
        for block in row_blocks(p):
            out[block.units[:, 0]], lse[block.units[:, 0]] = _attend_rows(p, block)
    else:
        for first, last, width, blocks in column_blocks(p):
            _attend_columns(p, first, last, width, blocks, out, lse)
    return Partial(p.restore(out[:-1]).to(call.q.dtype), p.restore(lse[:-1].unsqueeze(-1)).squeeze(-1))


def _attend_rows(p: Prepared, block: Block) -> tuple[Tensor, Tensor]:
    """Softmax over a row of tiles, streamed when the row is too long for one block."""
    parts = []
    for piece in block.split(p):
        scores, _, values = p.scores(piece)
        parts.append(_softmax(scores, values))
    if len(parts) == 1:
        top, total, out = parts[0]
    else:
        tops, totals, outs = (torch.stack(x) for x in zip(*parts))
        top = tops.amax(0)
        weights = (tops - top).exp()
        total, out = (totals * weights).sum(0), (outs * weights).sum(0)
    return out / total.masked_fill(total == 0, 1), (top + total.log()).squeeze(-1)


def _softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest score `[r, m, 1]` (0 where none is visible), sum of exponentials, weighted values; eats `scores`."""
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(-1, keepdim=True), torch.bmm(weights, values)


def _attend_columns(
    p: Prepared, first: int, last: int, width: int, blocks: list[Block], out: Tensor, lse: Tensor
) -> None:
    """Units `first` to `last`, each attending to at most `width` key tiles; merges the parts into out and lse."""
    slots = (last - first) * width + 1
    tops = p.q.new_full((slots, p.height), -torch.inf)
    totals = p.q.new_zeros(slots, p.height)
    outs = p.q.new_zeros(slots, p.height, out.shape[2])
    for block in blocks:
        scores, _, values = p.scores(block)
        may_be_empty = block.partial or p.call.bias is not None
        empty = ~(scores > -torch.inf).any(-1) if may_be_empty else None
        top, total, part = _softmax(scores, values)
        top = top.squeeze(-1)
        if empty is not None:
            top.masked_fill_(empty, -torch.inf)
        at = block.slots.flatten()
        tops[at] = top.view(-1, p.height)
        totals[at] = total.view(-1, p.height)
        outs[at] = part.view(-1, *outs.shape[1:])
    tops, totals, outs = (x[:-1].unflatten(0, (last - first, width)) for x in (tops, totals, outs))
    top = tops.amax(1)  # [units, height]
    safe = top.masked_fill(top == -torch.inf, 0)
    weights = (tops - safe.unsqueeze(1)).exp()
    total = (totals * weights).sum(1)
    merged = torch.einsum("uwh,uwhd->uhd", weights, outs)
    out[first:last] = merged / total.masked_fill(total == 0, 1).unsqueeze(-1)
    lse[first:last] = safe + total.log()


def backward(
    call: Call, result: Partial, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    p = Prepared.of(call)
    d_out = d_out.to(p.q.dtype)
    delta = (d_out * result.out).sum(-1) - d_lse  # [b, h, n]
    lse = result.lse.masked_fill(result.lse == -torch.inf, torch.inf)  # so that empty rows weigh nothing
    grads = _Gradients(p, p.cut_queries(d_out), p.cut_rows(delta, 0), p.cut_rows(lse, torch.inf))
    if p.by_rows:
        for block in row_blocks(p):
            for piece in block.split(p):
                d_q = grads.add(piece)
                grads.d_q.index_add_(0, piece.units[:, 0], d_q)
    else:
        for first, last, width, blocks in column_blocks(p):
            parts = p.q.new_zeros((last - first) * width + 1, *p.q.shape[1:])
            for block in blocks:
                parts[block.slots.flatten()] = grads.add(block).view(-1, *p.q.shape[1:])
            grads.d_q[first:last] = parts[:-1].unflatten(0, (last - first, width)).sum(1)
    return grads.result(call)


class _Gradients:
    """Accumulates the gradients of one call, block by block, from recomputed weights."""

    def __init__(self, p: Prepared, d_out: Tensor, delta: Tensor, lse: Tensor) -> None:
        self.p, self.d_out, self.delta, self.lse = p, d_out, delta, lse
        self.d_q = torch.zeros_like(p.q)
        self.d_k, self.d_v = torch.zeros_like(p.k), torch.zeros_like(p.v)
        self.d_bias = None if p.call.bias is None else p.call.bias.new_zeros(p.call.bias.numel(), dtype=p.q.dtype)

    def add(self, block: Block) -> Tensor:
        """Add this block to the gradients of k, v and bias; return its share of d_q, `[r, m, D]`."""
        p = self.p
        scores, slope, values = p.scores(block, slope=True)
        r, m, w = scores.shape
        weights = scores.sub_(self.lse[block.units].view(r, m, 1)).exp_()
        d_out = self.d_out[block.units].view(r, m, -1)
        d_scores = torch.bmm(d_out, values.mT).sub_(self.delta[block.units].view(r, m, 1)).mul_(weights)
        tiles = block.key_tiles(p).flatten()
        self.d_v.index_add_(0, tiles, torch.bmm(weights.mT, d_out).view(-1, *p.v.shape[1:]))
        if self.d_bias is not None:
            self.d_bias.index_add_(0, p.bias_index(block).flatten(), d_scores.flatten())
        if slope is not None:
            d_scores.mul_(slope)
        queries, keys = p.operands(block)
        self.d_k.index_add_(0, tiles, torch.bmm(d_scores.mT, queries).view(-1, *p.k.shape[1:]))
        return torch.bmm(d_scores, keys)

    def result(self, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        p = self.p
        d_q = p.restore(self.d_q[:-1]).mul_(call.scale).to(call.q.dtype)
        d_k, d_v = (p.restore_keys(x).to(call.k.dtype) for x in (self.d_k, self.d_v))
        d_bias = None if self.d_bias is None else self.d_bias.view(call.bias.shape).to(call.bias.dtype)
        return d_q, d_k, d_v, d_bias


op.IMPLEMENTATIONS["torch"] = op.Implementation(forward, backward)
