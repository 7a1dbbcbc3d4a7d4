"""The meaning of tensor attention, each weight written out: N^3 numbers for order 3. For tests and small inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise.attention.tensor.call import Call
from tilewise.tiles import Mask, Partial
from tilewise.tiles.visibility import to_heads


def definition(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    mask: Mask | Tensor | str | None = None,
    scale: float | None = None,
) -> Partial:
    """Softmax attention over tuples of keys (Alman and Song, 2023, arXiv 2310.04064), by its formula.

    For keys (k1, k2) and values (v1, v2), order 3:

        score[i, j, l] = scale * sum over d of q[i, d] k1[j, d] k2[l, d]
        out[i] = sum over (j, l) of softmax(score[i])[j, l] * v1[j] * v2[l]     (elementwise product)

    and likewise for m - 1 keys. Holds all N_q N_1 ... N_(m-1) weights: N^3 for order 3, and takes as much time.

    Args:
        q: `[B, H_q, N_q, D]`, any floating dtype; computed in float32, float64 if given so.
        keys: m - 1 tensors `[B, H_kv, N_t, D]`; their lengths may differ. values: as many, `[B, H_kv, N_t, D_v]`.
        mask: as in `tilewise.attend`, bound to each sequence of keys; a tuple is visible where each key of it is.
        scale: factor of the scores; None is 1 / D, the paper's.

    Returns:
        Partial: out `[B, H_q, N_q, D_v]`, lse `[B, H_q, N_q]`. A query that sees no tuple gets 0 and -inf.
    """
    call = Call.bind(q, keys, values, mask, scale)
    heads = q.shape[1]
    xs = [to_heads(x, heads).to(call.wide) for x in call.keys]
    ys = [to_heads(x, heads).to(call.wide) for x in call.values]
    letters = "jklmnoprstuvwxyz"[: len(xs)]
    every = ",".join(f"bh{a}d" for a in letters)
    scores = torch.einsum(f"bhid,{every}->bhi{letters}", q.to(call.wide), *xs) * call.scale
    for t, view in enumerate(call.views):
        seen = to_heads(view.tokens(), heads)  # [b, h, i, N_t]
        shape = (*seen.shape[:3], *[1] * t, seen.shape[3], *[1] * (len(xs) - 1 - t))
        scores = scores.masked_fill(~seen.reshape(shape), -torch.inf)
    flat = scores.flatten(3)
    empty = (flat == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(flat.masked_fill(empty, 0), -1).masked_fill(empty[..., 0], -torch.inf)
    weights = torch.softmax(flat.masked_fill(empty, 0), -1).masked_fill(empty, 0).view_as(scores)
    out = torch.einsum(f"bhi{letters},{every}->bhid", weights, *ys)
    return Partial(out.to(q.dtype), lse)
