"""The meaning of choosing keys: the whole matrix of scores, sorted, in plain PyTorch, any dtype up to float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.choose_keys.call import Call
from tilewise.tiles import Tiling
from tilewise.tiles.visibility import to_heads


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Tensor:
    """The keys of each query, ascending, -1 behind them: int32 `[B, lists, N_q, W]`."""
    n_k, width = call.k.shape[2], call.shape[3]
    if not n_k:
        return call.q.new_empty(call.shape, dtype=torch.int32)
    score, seen = scores(call), candidates(call)
    chosen = highest(call, score, seen) if call.most is None else above_quantile(call, call.most, score, seen)
    keys = torch.where(chosen, torch.arange(n_k, device=chosen.device), n_k).sort(-1).values[..., :width]
    return keys.masked_fill(keys == n_k, -1).int()


def scores(call: Call) -> Tensor:
    """`[B, lists, N_q, N_k]`, finite or plus infinity."""
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    products = (
        call.q.to(wide) @ to_heads(call.k, call.q.shape[1]).expand(-1, call.q.shape[1], -1, -1).to(wide).mT
    )
    values = torch.where(products > 0, products, call.slope * products)
    if call.weight is not None:
        values = values * call.weight.to(wide).unsqueeze(-1)
    score = values.unflatten(1, (call.lists, -1)).sum(2)
    return score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(wide).min)


def candidates(call: Call) -> Tensor:
    """The keys that a query sees, of those it seeks among: bool `[B, lists, N_q, N_k]`."""
    tokens = to_heads(call.view.tokens(), call.lists)
    seen = Tiling(call.covers).split(tokens.transpose(2, 3), False).any(3).transpose(2, 3)
    seen = seen.expand(call.q.shape[0], call.lists, -1, -1)
    if call.among is not None:
        own = torch.arange(call.k.shape[2], device=seen.device) // call.block
        seen = seen & (call.among.unsqueeze(-1) == own).any(3)
    return seen


def highest(call: Call, score: Tensor, seen: Tensor) -> Tensor:
    """The `top` highest of what is seen, bool."""
    place = torch.arange(score.shape[3], device=score.device)
    score = score.masked_fill(~seen, -torch.inf)
    if call.ends:
        first = torch.where(seen, place, len(place)).amin(-1, keepdim=True)
        last = torch.where(seen, place, -1).amax(-1, keepdim=True)
        score = score.masked_fill((place == first) | (place == last), torch.inf)
    if call.latest:
        score = score.flip(-1)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(seen).scatter(-1, order[..., : call.top], True)
    return (chosen.flip(-1) if call.latest else chosen) & seen


def above_quantile(call: Call, most: int, score: Tensor, seen: Tensor) -> Tensor:
    """What reaches the quantile of a normal distribution with the mean and deviation of what is seen, bool."""
    count = seen.sum(-1, keepdim=True)
    some = count.clamp(min=1).to(score.dtype)
    mean = score.masked_fill(~seen, 0).sum(-1, keepdim=True) / some
    squares = (score - mean).masked_fill(~seen, 0).square().sum(-1, keepdim=True)
    deviation = (squares / (some - 1).clamp(min=1)).sqrt()
    quantile = torch.special.ndtri((1 - call.top / some).clamp(min=0)).masked_fill(count <= call.top, 0)
    largest = score.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    least = torch.minimum(mean + deviation * quantile, largest)
    chosen = seen & ((count <= call.top) | ~(score < least))
    return chosen & (chosen.flip(-1).cumsum(-1).flip(-1) <= most)
