"""Calls with lists of keys as calls without: for engines that read no lists, and for gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles.call import Call
from tilewise.tiles import Partial, Visibility
from tilewise.tiles.visibility import HIDDEN


def by_rows(call: Call, gathered: bool = False) -> tuple[Call, Callable[[Partial], Partial]]:
    """`call`, which has lists, with every query a sequence of its own, and what restores the result.

    The sequences lie in a cache of pages of one token, or with `gathered` in copies of N_q x K keys and values,
    through which gradients flow.
    """
    if call.lists is None:
        raise ValueError("by_rows takes calls with lists of keys")
    (b, heads, n_q, d), d_v = call.q.shape, call.v.shape[3]
    kv_heads, n_k = call.k.shape[1:3]
    groups, listed = call.lists.shape[1], call.lists.shape[3]
    index = call.lists.expand(b, -1, -1, -1).long()
    rows = b * groups * n_q
    share_q, share_k = heads // groups, max(1, kv_heads // groups)
    q = call.q.unflatten(1, (groups, share_q)).transpose(2, 3).reshape(rows, share_q, 1, d)
    # Pages of one token: all tokens of the heads that a list serves, list after list.
    own = torch.arange(groups, device=index.device) // max(1, groups // kv_heads)
    first = torch.arange(b, device=index.device).view(b, 1) * min(groups, kv_heads) + own
    pages = (first.view(b, groups, 1, 1) * n_k + index.clamp(min=0)).reshape(rows, listed)
    pools = [_pool(x, share_k) for x in (call.k, call.v)]
    view, bias = _view(call.view, index), _bias(call, index)
    made = replace(
        call, q=q, k=pools[0], v=pools[1], view=view, bias=bias, bias_rows=1, pages=pages, lists=None
    )

    def restore(partial: Partial) -> Partial:
        out, lse = partial
        out = out.view(b, groups, n_q, share_q, d_v).transpose(2, 3).reshape(b, heads, n_q, d_v)
        if lse is not None:
            lse = lse.view(b, groups, n_q, share_q).transpose(2, 3).reshape(b, heads, n_q)
        return Partial(out, lse)

    return made.gathered() if gathered else made, restore


def _pool(x: Tensor, share: int) -> Tensor:
    """`[B, H_kv, N, D]` as pages of one token, `[B * (H_kv / share) * N, share, 1, D]`."""
    b, heads, n, d = x.shape
    return x.unflatten(1, (heads // share, share)).transpose(2, 3).reshape(-1, share, 1, d)


def _view(view: Visibility, index: Tensor) -> Visibility:
    """What every query, now a sequence of its own, sees of its list; `index [B, groups, N_q, K]`."""
    b, groups, n_q, listed = index.shape

    def rows(x: Tensor) -> Tensor:  # [b|1, groups|1, n_q, a] to [rows, 1, 1, a]
        return x.expand(b, groups, n_q, -1).reshape(-1, 1, 1, x.shape[3])

    axes = view.pos.shape[3]
    pos = view.pos.expand(b, groups, -1, -1)
    flat = index.clamp(min=0).flatten(2).unsqueeze(-1).expand(-1, -1, -1, axes)
    got = pos.gather(2, flat).view(b, groups, n_q, listed, axes)
    got = got.masked_fill((index < 0).unsqueeze(-1), HIDDEN).reshape(-1, 1, listed, axes)
    lo, hi = (rows(x) for x in torch.broadcast_tensors(view.lo, view.hi))
    q_pos = view.q_pos[:, :1]  # lists of several heads have one of each position
    return Visibility(lo, hi, got, rows(q_pos.unsqueeze(-1))[..., 0])


def _bias(call: Call, index: Tensor) -> Tensor | None:
    """The bias of each entry of each list: `[B * H_l * N_q, query heads of a list, 1, K]`."""
    if call.bias is None:
        return None
    (b, heads, n_q, _), n_k, groups = call.q.shape, call.k.shape[2], index.shape[1]
    given = call.bias
    if call.bias_rows != 1:
        given = given.repeat_interleave(call.bias_rows, 2)[:, :, :n_q]
    every = index.repeat_interleave(heads // groups, 1)
    given = given.expand(b, heads, n_q, n_k).gather(3, every.clamp(min=0)).masked_fill(every < 0, -torch.inf)
    rows = given.unflatten(1, (groups, heads // groups)).transpose(2, 3)
    return rows.reshape(b * groups * n_q, heads // groups, 1, index.shape[3])
