"""The torch engine of the choice of keys: some queries at a time, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.choose_keys import op
from tilewise.kernels.choose_keys.call import Call
from tilewise.kernels.choose_keys.compact import compact
from tilewise.tiles import Tiling
from tilewise.tiles.visibility import to_heads

AT_ONCE = 1 << 22  # numbers in a temporary: 16 MiB of float32


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Tensor:
    """The keys of each query, int32 `[B, lists, N_q, W]`."""
    return op.run(call, "torch")


def forward(call: Call) -> Tensor:
    """The operator on this engine."""
    b, lists, n_q, width = call.shape
    out = call.q.new_empty(call.shape, dtype=torch.int32)
    if not out.numel():
        return out
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    keys = call.k.to(wide)
    own = call.q.shape[1] * (call.sought if call.among is None else call.sought * call.q.shape[3])
    step = max(1, AT_ONCE // max(1, b * max(own, lists * call.view.pos.shape[2])))
    for start in range(0, n_q, step):
        rows = slice(start, min(start + step, n_q))
        out[:, :, rows] = _choose(call, keys, rows, width)
    return out


def _choose(call: Call, keys: Tensor, rows: slice, width: int) -> Tensor:
    """The keys of some queries."""
    seen, named = _seen(call, rows), None
    if call.among is None:
        products = _products(call, keys, rows)
    else:
        named, inside = _named(call, call.among[:, :, rows])
        seen = inside & seen.expand(*named.shape[:3], -1).gather(3, named)
        products = _listed_products(call, keys, rows, named)
    score = _score(call, products, rows)
    if call.most is None:
        keep = _highest(call, score.masked_fill_(~seen, -torch.inf)) & seen
    else:
        keep = _above_quantile(call, score, seen.expand_as(score))
    places = compact(keep, width)
    if named is None:
        return places
    return named.gather(3, places.clamp(min=0).long()).masked_fill_(places < 0, -1).int()


def _seen(call: Call, rows: slice) -> Tensor:
    """Which keys these queries see, bool `[B|1, lists|1, rows, N_k]`."""
    some = torch.arange(call.q.shape[2], device=call.q.device)[rows].view(1, 1, -1)
    tokens = to_heads(call.view.permute(some, None).tokens(), call.lists)
    if call.covers == 1:
        return tokens
    return Tiling(call.covers).split(tokens.transpose(2, 3), False).any(3).transpose(2, 3)


def _named(call: Call, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of blocks `[B, lists, rows, M]`, int64 `[B, lists, rows, M * block]`, and which there are."""
    inner = torch.arange(call.block, device=blocks.device)
    named = blocks.long().unsqueeze(-1) * call.block + inner
    inside = (blocks.unsqueeze(-1) >= 0) & (named < call.k.shape[2])
    return named.flatten(3).clamp_(0, call.k.shape[2] - 1), inside.flatten(3)


def _products(call: Call, keys: Tensor, rows: slice) -> Tensor:
    """`[B, lists, heads of a list, rows, N_k]`."""
    q = call.q[:, :, rows].to(keys.dtype)
    b, heads, m, d = q.shape
    folded = q.reshape(b, keys.shape[1], heads // keys.shape[1] * m, d)
    return (folded @ keys.mT).view(b, call.lists, heads // call.lists, m, keys.shape[2])


def _listed_products(call: Call, keys: Tensor, rows: slice, named: Tensor) -> Tensor:
    """`[B, lists, heads of a list, rows, M * block]`, of keys that each query names."""
    q = call.q[:, :, rows].to(keys.dtype).unflatten(1, (call.lists, -1)).transpose(2, 3)
    keys = to_heads(keys, call.lists).expand(-1, call.lists, -1, -1)
    index = named.flatten(2).unsqueeze(-1).expand(-1, -1, -1, keys.shape[3])
    own = keys.gather(2, index).unflatten(2, named.shape[2:])  # [b, lists, rows, m * block, d]
    return (q @ own.mT).transpose(2, 3)


def _score(call: Call, products: Tensor, rows: slice) -> Tensor:
    """Heads added up, finite or plus infinity: `[B, lists, rows, *]`."""
    if call.slope != 1:
        products = torch.nn.functional.leaky_relu(products, call.slope)
    if call.weight is not None:
        weight = call.weight[:, :, rows].to(products.dtype).unflatten(1, (call.lists, -1))
        products = products * weight.unsqueeze(-1)
    score = products.sum(2) if products.shape[2] > 1 else products[:, :, 0]
    return score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(score.dtype).min)


def _highest(call: Call, score: Tensor) -> Tensor:
    """The `top` highest of each row, bool; -inf is not to be chosen."""
    if call.ends:
        place, shown = torch.arange(score.shape[3], device=score.device), score > -torch.inf
        first = torch.where(shown, place, score.shape[3]).amin(-1, keepdim=True)
        last = torch.where(shown, place, -1).amax(-1, keepdim=True)
        score = score.masked_fill_((place == first) | (place == last), torch.inf)
    if call.top >= score.shape[3]:
        return score > -torch.inf
    least = score.topk(call.top, -1, sorted=False).values.amin(-1, keepdim=True)
    keep = score >= least
    over = keep.sum(-1, keepdim=True) - call.top
    if bool((over > 0).any()):  # more equal scores than are wanted, which is rare: only then they are counted
        equal = score == least
        order = equal.flip(-1) if call.latest else equal
        before = order.cumsum(-1, dtype=torch.int32)
        before = before.flip(-1) if call.latest else before
        keep &= ~equal | (before <= equal.sum(-1, keepdim=True) - over)
    return keep


def _above_quantile(call: Call, score: Tensor, seen: Tensor) -> Tensor:
    """What reaches the quantile of its row, bool."""
    count = seen.sum(-1, keepdim=True)
    some = count.clamp(min=1).to(score.dtype)
    mean = score.masked_fill(~seen, 0).sum(-1, keepdim=True) / some
    squares = (score - mean).masked_fill_(~seen, 0).square_().sum(-1, keepdim=True)
    deviation = (squares / (some - 1).clamp(min=1)).sqrt_()
    quantile = torch.special.ndtri((1 - call.top / some).clamp_(min=0)).masked_fill_(count <= call.top, 0)
    least = score.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    least = torch.minimum(mean + deviation * quantile, least).masked_fill_(count <= call.top, -torch.inf)
    return (score < least).logical_not_().logical_and_(seen)


op.IMPLEMENTATIONS["torch"] = forward
