"""Lists of keys on the torch engine: keys and values gathered for some queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles.call import Call, rounded
from tilewise.tiles import Partial
from tilewise.tiles.visibility import HIDDEN

GATHERED = 1 << 22  # numbers gathered at once: 16 MiB of float32


def attend_lists(call: Call, lists: Tensor) -> Partial:
    """Attention of every query to those keys of its list `[B|1, H_l, N_q, K]` that it sees.

    A query's products are of one size whatever is in the lists, so that none depends on the lists of others.
    """
    b, heads, n_q, d = call.q.shape
    kv_heads, n_k, d_v, listed = call.k.shape[1], call.k.shape[2], call.v.shape[3], lists.shape[3]
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    out = call.q.new_zeros(b, heads, n_q, d_v, dtype=wide)
    lse = call.q.new_full((b, heads, n_q), -torch.inf, dtype=wide)
    if not out.numel() or not listed or not n_k:
        return Partial(out.to(call.v.dtype), lse)
    units = max(lists.shape[1], kv_heads)  # of heads that share both keys and a list
    share = heads // units
    keys, values = (x.to(wide).reshape(-1, x.shape[3]) for x in (call.k, call.v))
    first = torch.arange(b * units, device=call.q.device).view(b, units, 1, 1) // (units // kv_heads) * n_k
    every = lists.repeat_interleave(units // lists.shape[1], 1).expand(b, -1, -1, -1)
    step = max(1, GATHERED // (b * units * listed * max(d, d_v)))
    for start in range(0, n_q, step):
        some = slice(start, min(start + step, n_q))
        index = every[:, :, some].long()  # [b, units, rows, K]
        at = (first + index.clamp(min=0)).flatten()
        queries = call.q[:, :, some].to(wide).unflatten(1, (units, share)).transpose(2, 3)
        queries = queries.reshape(-1, share, d) * call.scale
        scores = torch.bmm(queries, keys[at].view(-1, listed, d).mT).view(*index.shape[:3], share, listed)
        weights, sums = _weigh(call, _masked(call, scores, index, some))
        part = torch.bmm(weights.flatten(0, 2), values[at].view(-1, listed, d_v))
        out[:, :, some] = part.view(*index.shape[:3], share, d_v).transpose(2, 3).flatten(1, 2)
        lse[:, :, some] = sums.transpose(2, 3).flatten(1, 2)
    return Partial(out.to(call.v.dtype), lse)


def _masked(call: Call, scores: Tensor, index: Tensor, some: slice) -> Tensor:
    """Scores `[b, units, rows, share, K]` with cap and bias, -inf for what a query does not see."""
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    named = index.clamp(min=0)
    if call.bias is not None:
        rows = torch.arange(call.q.shape[2], device=index.device)[some] // call.bias_rows
        bias = call.bias if call.bias.shape[2] == 1 else call.bias[:, :, rows]
        share, n_k = scores.shape[3], call.k.shape[2]
        bias = bias.expand(index.shape[0], index.shape[1] * share, index.shape[2], n_k)
        bias = bias.unflatten(1, (-1, share)).transpose(2, 3)
        scores = scores + bias.gather(4, named.unsqueeze(3).expand_as(scores)).to(scores.dtype)
    seen = index >= 0
    for axis in range(call.view.pos.shape[3]):
        lo, hi, pos = (_for_units(x[..., axis], index) for x in (call.view.lo, call.view.hi, call.view.pos))
        at = pos.unsqueeze(2).expand(-1, -1, index.shape[2], -1).gather(3, named)
        lo, hi = (x[:, :, some].unsqueeze(3) for x in (lo, hi))
        seen = seen & (at > HIDDEN) & (lo <= at) & (at <= hi)
    return scores.masked_fill(~seen.unsqueeze(3), -torch.inf)


def _for_units(x: Tensor, index: Tensor) -> Tensor:
    """Limits or positions `[b|1, lists|1, n]` for every unit, `[b, units, n]`."""
    b, units = index.shape[:2]
    return x.repeat_interleave(units // x.shape[1], 1).expand(b, units, -1)


def _weigh(call: Call, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, and the log of the sum of exponentials of each row."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty[..., 0], -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0)
    if call.weights is not None:
        top = weights.amax(-1, keepdim=True).masked_fill(empty, 1)
        weights = rounded(weights / top, call.weights) * top
    return weights, lse
