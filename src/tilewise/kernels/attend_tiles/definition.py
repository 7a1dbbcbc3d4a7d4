"""The meaning of tile attention: the whole score matrix in plain PyTorch, any dtype up to float64.

No tricks and no care for memory or time. Every engine is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles.call import Call
from tilewise.tiles import Partial, TileMap
from tilewise.tiles.visibility import to_heads


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Partial:
    """Attention over the kept tiles of `call`, by its formula."""
    heads = call.q.shape[1]
    wide = call.q.dtype if call.q.dtype == torch.float64 else torch.float32
    k = to_heads(call.k, heads).to(wide)
    v = to_heads(call.v, heads).to(wide)
    scores = call.scale * call.q.to(wide) @ k.mT  # [b, h, q, k]
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + call.bias.to(wide)
    seen = to_heads(call.view.tokens(), heads)
    if call.tiles is not None:
        seen = seen & kept_tokens(call.tiles, *call.q.shape[:3], call.k.shape[2], call.q_order, call.k_order)
    scores = scores.masked_fill(~seen, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)  # rows that see nothing: out 0, lse -inf, gradient 0
    lse = torch.logsumexp(scores.masked_fill(empty, 0), -1).masked_fill(empty[..., 0], -torch.inf)
    weights = torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    return Partial((weights @ v).to(call.q.dtype), lse)


def kept_tokens(
    tiles: TileMap, b: int, heads: int, n_q: int, n_k: int, q_order: Tensor | None, k_order: Tensor | None
) -> Tensor:
    """The tile map spread to tokens in their own order: bool `[B, H, N_q, N_k]`."""
    keep = to_heads(tiles.keep, heads).expand(b, heads, -1, -1)
    q_ids = tiles.q_tiling.ids(n_q, keep.device)
    k_ids = tiles.k_tiling.ids(n_k, keep.device)
    if q_order is not None:
        q_ids = q_ids.expand(b, heads, -1).gather(2, inverse(q_order, b, heads))
    if k_order is not None:
        k_ids = to_heads(k_ids, heads).expand(b, heads, -1).gather(2, inverse(k_order, b, heads))
    rows = keep.gather(2, to_heads(q_ids, heads).expand(b, heads, -1)[..., None].expand(-1, -1, -1, keep.shape[3]))
    return rows.gather(3, to_heads(k_ids, heads).expand(b, heads, -1)[:, :, None].expand(-1, -1, n_q, -1))


def inverse(order: Tensor, b: int, heads: int) -> Tensor:
    """Where each token stands in `order`, expanded to `[B, heads, N]`."""
    return to_heads(order, heads).argsort(-1).expand(b, heads, -1)
