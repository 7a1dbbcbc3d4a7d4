"""Tensor attention with polynomials for weights: near-linear time when scores are bounded.

With P(x) = sum of c_l x^l in place of exp, and the multinomial theorem,

    P(scale <q_i, k1_j * k2_l>) = sum over monomials a of w_a q_i^a k1_j^a k2_l^a,   w_a = c_|a| |a|! / a!,

so the sums over j and over l are taken apart: two states, one matrix of monomials times values for each sequence of
keys, whose elementwise product every query reads. Nothing has the size of N x N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from tilewise.attention.tensor.call import Call, fold, unfold
from tilewise.attention.tensor.monomials import count, monomials, multinomials
from tilewise.tiles import Partial, Visibility
from tilewise.tiles.visibility import HIDDEN

NUMBERS = 1 << 21  # numbers of one piece of work: 8 MiB in float32


def attend(call: Call, coefficients: list[float], wide: torch.dtype) -> Partial:
    """Attention with weights P(score), P given by its `coefficients`: out in q's dtype, lse in `wide`.

    The lse is the log of the sum of P. Sums must be positive, which they are where P's relative error is below 1.
    Computed in `wide`. Differentiable; pieces are computed again in the backward pass, which holds besides them
    the states (one for all, or under a causal mask one for each piece).

    Raises ValueError for a mask that is no prefix (see `prefixes`).
    """
    spans = prefixes(call)
    degree, dim = len(coefficients) - 1, call.q.shape[3]
    factors, degrees = multinomials(dim, degree)
    weights = torch.tensor(coefficients, dtype=torch.float64)[degrees] * factors
    weights = weights.to(device=call.q.device, dtype=wide).unsqueeze(1)  # [r, 1]
    q, keys = _balanced(call, wide)
    keeps = [view.keys_seen() for view in call.views]  # [B|1, 1, N_t]
    values = [_with_ones(v.to(wide), keep) for v, keep in zip(call.values, keeps)]
    empty = torch.zeros((), dtype=torch.bool, device=q.device)
    if spans is None:
        sums = _all(q, keys, values, weights, degree)
        for keep in keeps:
            empty = empty | ~keep.any(-1, keepdim=True)
    else:
        sums = _prefix(q, keys, values, weights, degree, spans)
        for keep, span in zip(keeps, spans):
            kept = pad(keep.cumsum(-1), (1, 0))
            empty = empty | (kept[..., torch.tensor(span, dtype=torch.int64, device=q.device)] == 0)
    sums, empty = unfold(sums, call.q.shape[1]), empty.expand(*call.q.shape[:3])
    total = sums[..., -1].masked_fill(empty, 1)
    out = (sums[..., :-1] / total.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0)
    return Partial(out.to(call.q.dtype), total.log().masked_fill(empty, -torch.inf))


def prefixes(call: Call) -> list[list[int]] | None:
    """How many of the first keys each query sees, for each sequence of keys; None where all see all.

    Padding is no concern of it: padded keys weigh nothing. Raises ValueError for any other mask.
    """
    found = [_prefix_lengths(view) for view in call.views]
    if all(n == view.k_pos.shape[2] for lengths, view in zip(found, call.views) for n in lengths):
        return None
    return found


def _prefix_lengths(view: Visibility) -> list[int]:
    n = view.k_pos.shape[2]
    usual = torch.arange(n, device=view.pos.device)
    lengths = view.hi[..., 0].clamp(-1, n - 1) + 1
    fits = (
        view.dense is None
        and view.pos.shape[1:2] == (1,)
        and view.pos.shape[-1] == 1
        and bool(((view.k_pos == usual) | (view.k_pos == HIDDEN)).all())
        and bool((view.lo <= 0).all())
        and bool((lengths == lengths[:1, :1]).all())
        and bool((lengths.diff(dim=-1) >= 0).all())
    )
    if not fits:
        raise ValueError(
            "mask must let every query see a prefix of the keys, no shorter than that of the query before it"
            " (None, 'causal', block-causal, Prefix, and padding) for a polynomial; the exact form takes any mask"
        )
    return lengths[0, 0].tolist()


def radius(call: Call) -> float:
    """The largest |score| that these entries allow: |scale| max over i of sum over d of |q_id| max |k1_jd| ...

    Costs one pass over the inputs. Never below the true one.
    """
    if not call.q.numel() or any(not k.numel() for k in call.keys):
        return 0.0
    with torch.no_grad():
        top = torch.ones((), dtype=torch.float64, device=call.q.device)
        for k in call.keys:
            top = top * k.abs().amax(2, keepdim=True).to(torch.float64)
        sums = fold(call.q, call.kv_heads).abs().to(torch.float64) * top
        return float(sums.sum(-1).max()) * abs(call.scale)


def largest_entry(call: Call) -> float:
    """The largest |entry| of queries and visible keys."""
    with torch.no_grad():
        tops = [float(x.abs().max()) for x in (call.q, *call.keys) if x.numel()]
    return max(tops, default=0.0)


def multiply_adds(n_q: int, n_keys: tuple[int, ...], head_dim: int, value_dim: int, degree: int) -> int:
    """Multiply-adds of the matrix products of one head, no mask: monomials times (D_v + 1), for every token."""
    return count(head_dim, degree) * (value_dim + 1) * (n_q + sum(n_keys))


def _balanced(call: Call, wide: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Queries `[B, H_kv, G N_q, D]`, scaled, and keys, so that no monomial overflows: |keys| <= 1 by dimension.

    Keys are divided by powers of two and queries multiplied by them, which rounds nothing.
    """
    q, keys = fold(call.q.to(wide), call.kv_heads) * call.scale, []
    for k in call.keys:
        k = k.to(wide)
        if k.shape[2]:
            _, exponent = torch.frexp(k.detach().abs().amax(2, keepdim=True))
            exponent = exponent.clamp(-100, 100)  # 2^exponent is a float32
            one = torch.ones_like(exponent, dtype=wide)
            k, q = k * torch.ldexp(one, -exponent), q * torch.ldexp(one, exponent)
        keys.append(k)
    return q, keys


def _with_ones(v: Tensor, keep: Tensor) -> Tensor:
    """Values and a column of ones, whose sum is the softmax's denominator; padded tokens have 0 in it."""
    ones = keep.unsqueeze(-1).to(v.dtype).expand(*v.shape[:3], 1)
    return torch.cat([v, ones], -1)


def _all(q: Tensor, keys: list[Tensor], values: list[Tensor], weights: Tensor, degree: int) -> Tensor:
    """Every query sees every key: sums over all tuples, `[B, H_kv, G N_q, D_v + 1]`, last the denominators."""
    size = max(16, NUMBERS // max(1, q.shape[0] * q.shape[1] * len(weights)))
    state = weights
    for k, v in zip(keys, values):
        state = state * _sum(k, v, degree, size)
    return torch.cat([_again(_answers, some, state, degree) for some in q.split(size, 2)], 2)


def _prefix(
    q: Tensor, keys: list[Tensor], values: list[Tensor], weights: Tensor, degree: int, spans: list[list[int]]
) -> Tensor:
    """Query i sees the first `spans[t][i]` keys of sequence t: sums as in `_all`.

    A few queries at a time: states up to each of them are running sums over the keys they add, which costs
    N count(D, degree) (D_v + 1) additions and as many products, and no row reads what comes after it.
    """
    b, heads, _, dim = q.shape
    n, wide = len(spans[0]), len(weights) * values[0].shape[3]
    group = q.shape[2] // n if n else 1
    q = q.reshape(b, heads, group, n, dim)
    size = max(1, NUMBERS // max(1, b * heads * wide))
    states = [v.new_zeros(b, heads, len(weights), v.shape[3]) for v in values]
    at, first, parts = [0] * len(keys), 0, []
    while first < n:
        last = first + 1
        while last < n and last - first < size and all(s[last] - s[first] <= size for s in spans):
            last += 1
        cuts = []
        for t, span in enumerate(spans):
            if span[first] > at[t]:
                new = slice(at[t], span[first])
                states[t] = states[t] + _sum(keys[t][:, :, new], values[t][:, :, new], degree, size)
            cuts.append(slice(span[first], span[last - 1]))
            at[t] = span[last - 1]
        steps = [torch.tensor(s[first:last], device=q.device) - s[first] for s in spans]
        pieces = [x[:, :, cut] for xs in (keys, values) for x, cut in zip(xs, cuts)]
        part, *states = _again(_piece, degree, q[:, :, :, first:last], weights, *pieces, *states, *steps)
        parts.append(part)
        first = last
    return torch.cat(parts, 3).flatten(2, 3) if parts else q.new_zeros(b, heads, 0, values[0].shape[3])


def _piece(degree: int, q: Tensor, weights: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Sums of some queries, and the states after the keys that they see; `rest`: see `_prefix`."""
    many = len(rest) // 4
    keys, values, states, steps = (rest[first : first + many] for first in range(0, 4 * many, many))
    product, after = weights, []
    for k, v, state, step in zip(keys, values, states, steps):
        added = monomials(k, degree).unsqueeze(4) * v.unsqueeze(3)  # [b, h, s, r, e]
        running = torch.cat([state.unsqueeze(2), added], 2).cumsum(2)
        product = product * running[:, :, step]
        after.append(running[:, :, -1])
    # [b, h, c, g, r] @ [b, h, c, r, e]
    sums = (monomials(q, degree).transpose(2, 3) @ product).transpose(2, 3)
    return sums, *after


def _sum(k: Tensor, v: Tensor, degree: int, size: int) -> Tensor:
    """The state of some keys: monomials times values, summed over tokens, `[B, H_kv, count, D_v + 1]`."""
    total = v.new_zeros(*v.shape[:2], count(k.shape[3], degree), v.shape[3])
    for some, theirs in zip(k.split(size, 2), v.split(size, 2)):
        total = total + _again(_state, some, theirs, degree)
    return total


def _state(k: Tensor, v: Tensor, degree: int) -> Tensor:
    return monomials(k, degree).mT @ v


def _answers(q: Tensor, state: Tensor, degree: int) -> Tensor:
    return monomials(q, degree) @ state


def _again(function, *arguments):
    """`function` with nothing kept for the backward pass but its arguments."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)
