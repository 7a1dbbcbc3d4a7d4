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
from tilewise.kernels.attend_tiles.blocks import Block, Prepared, column_blocks, given, row_blocks
from tilewise.kernels.attend_tiles.call import Call, rounded
from tilewise.kernels.attend_tiles.torch_lists import attend_lists
from tilewise.tiles import Partial, merge


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Partial:
    """Attention over the kept tiles of `call`."""
    return op.run(call, "torch")


def forward(call: Call) -> Partial:
    """The operator's forward on this engine."""
    call = call.gathered().dequantised()
    if call.lists is not None:
        return attend_lists(call, call.lists)
    p = Prepared.of(call)
    out = p.q.new_empty(p.units, p.height, p.v.shape[2])
    lse = p.q.new_full((p.units, p.height), -torch.inf)
    out[~p.live.any(1)] = 0
    if p.by_rows:
        for block in row_blocks(p):
            out[block.units[:, 0]], lse[block.units[:, 0]] = _attend_rows(p, block)
    else:
        for first, last, width, blocks in column_blocks(p):
            _attend_columns(p, first, last, width, blocks, out, lse)
    return Partial(p.restore(out).to(call.v.dtype), p.restore(lse.unsqueeze(-1)).squeeze(-1))


def _attend_rows(p: Prepared, block: Block) -> Partial:
    """One batch of units, streamed in pieces when a row of tiles, or one tile, is too large for one block."""
    rows = [merge([_softmax(p, piece) for piece in some.split(p)]) for some in block.split_rows(p)]
    return rows[0] if len(rows) == 1 else Partial(*(torch.cat(x, 1) for x in zip(*rows)))


def _softmax(p: Prepared, block: Block) -> Partial:
    """Softmax over a block's keys: out `[r, m, D_v]`, lse `[r, m]`."""
    _, _, values, scores, _ = p.scores(block)
    top = scores.amax(-1)
    weights = torch.softmax(scores, -1, out=scores)
    # The largest weight is exp(top - lse), so the log of the sum costs no second pass over exponentials.
    largest = weights.amax(-1, keepdim=True)
    lse = top - largest.squeeze(-1).log()
    if p.call.weights is not None:
        weights = rounded(weights / largest, p.call.weights) * largest
    out = torch.bmm(weights, values)
    if block.partial or p.call.bias is not None:  # elsewhere every row sees something
        empty = top == -torch.inf
        lse.masked_fill_(empty, -torch.inf)
        out.masked_fill_(empty.unsqueeze(-1), 0)
    return Partial(out, lse)


def _attend_columns(
    p: Prepared, first: int, last: int, width: int, blocks: list[Block], out: Tensor, lse: Tensor
) -> None:
    """Units `first` to `last`, each attending to at most `width` key tiles; merges the parts into out and lse."""
    slots = (last - first) * width + 1
    part_lse = p.q.new_full((slots, p.height), -torch.inf)
    part_out = p.scratch("parts", slots, p.height, out.shape[2]).zero_()
    for block in blocks:
        part = _softmax(p, block)
        at = given(block.slots).flatten()
        part_lse[at] = part.lse.view(-1, p.height)
        part_out[at] = part.out.view(-1, *part_out.shape[1:])
    part_lse = part_lse[:-1].unflatten(0, (last - first, width))  # [units, width, height]
    top = part_lse.amax(1)
    top.masked_fill_(top == -torch.inf, 0)
    weights = (part_lse - top.unsqueeze(1)).exp_()
    total = weights.sum(1)
    weights /= total.masked_fill(total == 0, 1).unsqueeze(1)
    parts = part_out[:-1].unflatten(0, (last - first, width)).transpose(1, 2)  # [units, height, width, d]
    out[first:last] = (weights.transpose(1, 2).unsqueeze(2) @ parts).squeeze(2)
    lse[first:last] = top + total.log()


def backward(
    call: Call, result: Partial, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, where there is one, the bias."""
    call.refuse_gradients()
    p = Prepared.of(call)
    d_out = d_out.to(p.q.dtype)
    delta = (d_out * result.out).sum(-1) - d_lse  # [b, h, n]
    lse = result.lse.masked_fill(result.lse == -torch.inf, torch.inf)  # so that empty rows weigh nothing
    grads = _Gradients(p, p.cut_queries(d_out), p.cut_rows(delta, 0), p.cut_rows(lse, torch.inf))
    if p.by_rows:
        for block in row_blocks(p):
            for rows in block.split_rows(p):
                for piece in rows.split(p):
                    d_q = grads.add(piece)
                    grads.d_q[:, rows.rows].index_add_(0, piece.units[:, 0], d_q)
    else:
        for first, last, width, blocks in column_blocks(p):
            parts = p.q.new_zeros((last - first) * width + 1, *p.q.shape[1:])
            for block in blocks:
                parts[given(block.slots).flatten()] = grads.add(block).view(-1, *p.q.shape[1:])
            grads.d_q[first:last] = parts[:-1].unflatten(0, (last - first, width)).sum(1)
    return grads.result(call)


class _Gradients:
    """Accumulates the gradients of one call, block by block, from recomputed weights."""

    def __init__(self, p: Prepared, d_out: Tensor, delta: Tensor, lse: Tensor) -> None:
        self.p, self.d_out, self.delta, self.lse = p, d_out, delta, lse
        self.d_q = torch.zeros_like(p.q)
        self.d_k, self.d_v = torch.zeros_like(p.k), torch.zeros_like(p.v)
        self.d_bias = (
            None if p.call.bias is None else p.call.bias.new_zeros(p.call.bias.numel(), dtype=p.q.dtype)
        )

    def add(self, block: Block) -> Tensor:
        """Add this block to the gradients of k, v and bias; return its share of d_q, `[r, m, D]`."""
        p = self.p
        queries, keys, values, scores, slope = p.scores(block, slope=True)
        r, m, _ = scores.shape
        lse, d_out, delta = (x[block.units][:, :, block.rows] for x in (self.lse, self.d_out, self.delta))
        weights = scores.sub_(lse.reshape(r, m, 1)).exp_()
        d_out = d_out.reshape(r, m, -1)
        d_scores = torch.bmm(d_out, values.mT).sub_(delta.reshape(r, m, 1)).mul_(weights)
        tiles = block.key_tiles(p).flatten()
        self.d_v.index_add_(0, tiles, torch.bmm(weights.mT, d_out).view(-1, *p.v.shape[1:]))
        if self.d_bias is not None:
            self.d_bias.index_add_(0, p.bias_index(block).flatten(), d_scores.flatten())
        if slope is not None:
            d_scores.mul_(slope)
        self.d_k.index_add_(0, tiles, torch.bmm(d_scores.mT, queries).view(-1, *p.k.shape[1:]))
        return torch.bmm(d_scores, keys)

    def result(self, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        p = self.p
        d_q = p.restore(self.d_q[:-1]).mul_(call.scale).to(call.q.dtype)
        d_k, d_v = (p.restore_keys(x).to(call.k.dtype) for x in (self.d_k, self.d_v))
        d_bias = (
            None
            if self.d_bias is None
            else self.d_bias.view(given(call.bias).shape).to(given(call.bias).dtype)
        )
        return d_q, d_k, d_v, d_bias


op.IMPLEMENTATIONS["torch"] = op.Implementation(forward, backward)
