"""The meaning of tile attention: the whole score matrix in plain PyTorch, any dtype up to float64.

No tricks and no care for memory or time. Every engine is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles.call import Call, rounded
from tilewise.tiles import Partial, TileMap, Tiling
from tilewise.tiles.visibility import to_heads


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Partial:
    """Attention over the kept tiles of `call`, by its formula."""
    call = call.gathered().dequantised()
    heads = call.q.shape[1]
    wide = call.q.dtype if call.q.dtype == torch.float64 else torch.float32
    k = to_heads(call.k, heads).to(wide)
    v = to_heads(call.v, heads).to(wide)
    scores = call.scale * call.q.to(wide) @ k.mT  # [b, h, q, k]
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        rows = call.bias.repeat_interleave(call.bias_rows, 2)
        scores = scores + rows[:, :, : call.q.shape[2]].to(wide)
    seen = to_heads(call.view.tokens(), heads)
    if call.tiles is not None:
        seen = seen & kept_tokens(call, call.tiles)
    if call.lists is not None:
        seen = seen & listed_tokens(call, call.lists)
    scores = scores.masked_fill(~seen, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)  # rows that see nothing: out 0, lse -inf, gradient 0
    lse = torch.logsumexp(scores.masked_fill(empty, 0), -1).masked_fill(empty[..., 0], -torch.inf)
    weights = torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    if call.weights is not None and weights.shape[3]:
        top = weights.amax(-1, keepdim=True).masked_fill(empty, 1)
        weights = rounded(weights / top, call.weights) * top
    return Partial((weights @ v).to(call.v.dtype), lse)


def kept_tokens(call: Call, tiles: TileMap) -> Tensor:
    """The tile map spread to tokens in their own order: bool `[B, H, N_q, N_k]`."""
    b, heads, n_q = call.q.shape[:3]
    keep = to_heads(tiles.keep, heads).expand(b, heads, -1, -1)
    rows = _ids(tiles.q_tiling, n_q, call.q_order, call.q)
    columns = _ids(tiles.k_tiling, call.k.shape[2], call.k_order, call.q)
    rows = keep.gather(2, rows.unsqueeze(3).expand(-1, -1, -1, keep.shape[3]))
    return rows.gather(3, columns.unsqueeze(2).expand(-1, -1, n_q, -1))


def listed_tokens(call: Call, lists: Tensor) -> Tensor:
    """The keys that lists name: bool `[B|1, H, N_q, N_k]`."""
    n_k = call.k.shape[2]
    named = torch.zeros(*lists.shape[:3], n_k + 1, dtype=torch.bool, device=lists.device)
    named.scatter_(3, torch.where(lists < 0, n_k, lists).long(), True)
    return to_heads(named[..., :n_k], call.q.shape[1])


def _ids(tiling: Tiling, n: int, order: Tensor | None, like: Tensor) -> Tensor:
    """The tile that each token lies in once `order` has moved it, `[B, H, n]`; batch and heads of `like`."""
    b, heads = like.shape[:2]
    ids = to_heads(tiling.ids(n, like.device), heads).expand(b, heads, n)
    return ids if order is None else ids.gather(2, to_heads(order, heads).argsort(-1).expand(b, heads, n))
