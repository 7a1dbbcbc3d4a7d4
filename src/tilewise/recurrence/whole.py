"""Linear attention without order: every token reads sums over all tokens, and nothing is `N x N`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.recurrence.checks import check_offsets, check_tensors
from tilewise.recurrence.mixer import wide
from tilewise.recurrence.state import Carried

NORMALIZE = (None, "divide", "subtract")
Weigh = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Sums(Carried):
    """What linear attention keeps of keys and values, float32 or wider; `a + b` is what both sets give.

    Attributes:
        products: `[B, H, D_k, D_v]`, the sum of `k^T v`. keys: `[B, H, D_w]`, of the keys that weigh.
        values: `[B, H, D_v]`. count: `[B]`, how many tokens.
    """

    products: Tensor
    keys: Tensor
    values: Tensor
    count: Tensor

    def __add__(self, other: Sums) -> Sums:
        pairs = zip(
            (self.products, self.keys, self.values, self.count),
            (other.products, other.keys, other.values, other.count),
        )
        return Sums(*(a + b for a, b in pairs))


def whole_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalize: str | None = "divide",
    scale: float | None = None,
    eps: float = 0.0,
    weigh: Weigh | None = None,
    mask: Tensor | None = None,
    layout: str = "bhnd",
) -> Tensor:
    """Attention of all tokens to all tokens whose weights are products of features, in time linear in N.

    With `s = scale` and means over the tokens that `mask` leaves, the weight of token j for query i is

        "divide"    q_i.k_j / (N (q_i.mean(k) + eps))        a mean of values if features are not negative
        "subtract"  s (q_i.k_j - q_i.mean(k)) / N + 1 / N    weights of sum 1 that tell q from 2 q
        None        s q_i.k_j / N

    Args:
        q: features of queries, `[B, H_q, N, D_k]`, float16, bfloat16, float32 or float64, any strides.
            k: of keys, `[B, H, N, D_k]`; v: values, `[B, H, N, D_v]`. H_q is a multiple of H; query head h
            reads kv head `h // (H_q // H)`.
        normalize: as above. A query whose denominator is 0 gets 0.
        scale: None is 1/sqrt(D_k); "divide" takes none, as it cancels.
        eps: added to the mean denominator of "divide".
        weigh: other features of queries and keys, shaped like q and k but for D, that make the denominator of
            "divide" (features turned by positions may make negative ones).
        mask: bool `[B, N]`, False for padding anywhere: it is read by none and gets 0.
        layout: "bhnd", or "bnhd" for `[B, N, H, D]` inputs and output (a stride view, never a copy).

    Returns:
        `[B, H_q, N, D_v]` in q's dtype; sums are float32 (float64 for float64 inputs), autocast or not.

    Raises ValueError or TypeError for arguments that do not fit.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd', got {layout!r}")
    if layout == "bnhd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weigh = None if weigh is None else (weigh[0].transpose(1, 2), weigh[1].transpose(1, 2))
    check_whole(q, k, v, normalize, scale, eps, weigh, mask)
    if normalize == "subtract":
        # The weights stay as they are when all keys are moved alike. Around their mean, sums do not cancel.
        k = wide(k)
        if mask is None:
            k = k - (k.mean(2, keepdim=True) if k.shape[2] else 0)
        else:
            seen = mask.view(mask.shape[0], 1, -1, 1)
            k = k.masked_fill(~seen, 0)
            k = k - k.sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
    sums = gather(k, v, weigh=None if weigh is None else weigh[1], mask=mask)
    if mask is not None:
        hidden = ~mask.view(mask.shape[0], 1, -1, 1)
        q = q.masked_fill(hidden, 0)  # what padding holds may be no number
        weigh = None if weigh is None else (weigh[0].masked_fill(hidden, 0), weigh[1])
    out = read(q, sums, normalize, scale=scale, eps=eps, weigh=None if weigh is None else weigh[0])
    out = out if mask is None else out.masked_fill(hidden, 0)
    return out.transpose(1, 2) if layout == "bnhd" else out


def gather(k: Tensor, v: Tensor, *, weigh: Tensor | None = None, mask: Tensor | None = None) -> Sums:
    """The sums of keys and values, shaped as for `whole_attention`, of which it checks none."""
    with torch.autocast(k.device.type, enabled=False):
        k, v = wide(k), wide(v)
        weigh = k if weigh is None else wide(weigh)
        if mask is not None:
            hidden = ~mask.view(mask.shape[0], 1, -1, 1)
            k, v, weigh = (x.masked_fill(hidden, 0) for x in (k, v, weigh))
            count = mask.sum(1).to(k.dtype)
        else:
            count = k.new_full((k.shape[0],), k.shape[2])
        return Sums(k.mT @ v, weigh.sum(2), v.sum(2), count)


def read(
    q: Tensor,
    sums: Sums,
    normalize: str | None = "divide",
    *,
    scale: float | None = None,
    eps: float = 0.0,
    weigh: Tensor | None = None,
) -> Tensor:
    """What queries `[B, H_q, N, D_k]` find in sums, `[B, H_q, N, D_v]`; as `whole_attention`, unchecked."""
    heads, n = sums.products.shape[1], q.shape[2]
    groups = q.shape[1] // heads

    def grouped(x: Tensor) -> Tensor:  # [b, h, groups * n, d]: all that read one sum are one product
        return wide(x).unflatten(1, (heads, groups)).flatten(2, 3)

    with torch.autocast(q.device.type, enabled=False):
        x = grouped(q)
        count = sums.count.clamp(min=1).view(-1, 1, 1, 1)
        keys = sums.keys.unsqueeze(3) / count
        if normalize == "divide":
            below = (x if weigh is None else grouped(weigh)) @ keys + eps
            nothing = below == 0
            out = x @ (sums.products / count) / below.masked_fill(nothing, 1)
            out = out.masked_fill(nothing, 0)
        else:
            x = x * (q.shape[3] ** -0.5 if scale is None else scale)
            out = x @ (sums.products / count)
            if normalize == "subtract":
                out = out + (1 - x @ keys) * (sums.values.unsqueeze(2) / count)
    return out.unflatten(2, (groups, n)).flatten(1, 2).to(q.dtype)


def check_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalize: str | None,
    scale: float | None,
    eps: float,
    weigh: Weigh | None,
    mask: Tensor | None,
) -> None:
    """The arguments of `whole_attention`."""
    check_tensors(q, k, v)
    check_offsets(None, mask, q)
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(map(repr, NORMALIZE))}, got {normalize!r}")
    if normalize == "divide" and scale is not None:
        raise ValueError(f"normalize 'divide' takes no scale, which cancels, got {scale!r}")
    if normalize != "divide" and (weigh is not None or eps):
        raise ValueError(f"weigh and eps are for normalize 'divide', got normalize {normalize!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps!r}")
    if weigh is None:
        return
    for name, x, like in (("queries", weigh[0], q), ("keys", weigh[1], k)):
        if x.shape[:3] != like.shape[:3] or x.shape[3:] != weigh[0].shape[3:] or x.dtype != like.dtype:
            raise ValueError(
                f"weigh must hold {name} [{', '.join(map(str, like.shape[:3]))}, D] of {like.dtype}, with one"
                f" D for both, got {list(x.shape)} of {x.dtype}"
            )
