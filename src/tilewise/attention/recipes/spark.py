"""Spark Transformer's attention: keys found by the first channels, above a threshold that needs no sort."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.token_choice import lists_plan
from tilewise.kernels.choose_keys import Call, choose_keys, explain
from tilewise.tiles import Mask, Visibility, as_mask
from tilewise.tiles.visibility import to_heads


@dataclass(frozen=True)
class Spark(Method):
    """Attention to about `top_k` keys per query, found in linear time (You et al., 2025, arXiv 2506.06644).

    The first `rank` channels of a query and a key predict their score; what lies above the row's Gaussian quantile
    (`StatisticalTopK`) is read, each query head for itself, by exact attention over all channels.

    Differs from the paper, whose models are trained with its attention: there the weights of the predictor's
    softmax are multiplied by a softplus of the other channels' products. That is `spark_attention`; this method
    gives plain attention over the same kind of choice, and so fits models that were trained densely.

    Args:
        top_k: keys to expect per query. rank: channels of the predictor; None is half of head_dim.
        most: keys read at most, the latest of those above the threshold; None is twice `top_k`.
    """

    top_k: int = 256
    rank: int | None = None
    most: int | None = None
    name = "spark"
    reads = "q, k"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("top_k", self.top_k, 1),
            ("rank", self.rank, 1),
            ("most", self.most, self.top_k),
        ):
            if value is None and name != "top_k":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        if not k.shape[2]:
            return Plan((Pass(view),), view)
        call = self.choice(q, k, view)
        return lists_plan(choose_keys(call), view, (explain(call),))

    def choice(self, q: Tensor, k: Tensor, view: Visibility) -> Call:
        """What chooses the keys of each query, int32 `[B, H_q, N_q, W]`."""
        rank = self._rank(q.shape[3])
        most = 2 * self.top_k if self.most is None else self.most
        return Call(q[..., :rank], k[..., :rank], view, self.top_k, lists=q.shape[1], most=most)

    def _rank(self, head_dim: int) -> int:
        rank = max(1, head_dim // 2) if self.rank is None else self.rank
        if rank > head_dim:
            raise ValueError(f"rank must be at most head_dim {head_dim}, got {rank}")
        return rank


def spark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int = 256,
    rank: int | None = None,
    mask: Mask | Tensor | str | None = None,
) -> Tensor:
    """The paper's attention, for models trained with it: `sum_j softmax_j(q1 . k1) softplus(q2 . k2) v_j`.

    Over keys that `StatisticalTopK` finds in the scores of the first `rank` channels, q1 and k1; q2 and k2 are the
    others. Each product is scaled by the root of its number of channels. Weights do not add up to 1.

    Args:
        q: `[B, H_q, N_q, D]`; k, v: `[B, H_kv, N_k, D]`, `[B, H_kv, N_k, D_v]`. top_k, rank: as in `Spark`; at most
            twice `top_k` keys are read. mask: as in `attend`, booleans only.

    Returns `[B, H_q, N_q, D_v]`, differentiable in q, k and v; holds N_q x 2 `top_k` gathered keys and values, and
    computes in at least float32. Raises ValueError for a rank that leaves no other channel.
    """
    method, heads, n_q = Spark(top_k, rank), q.shape[1], q.shape[2]
    rank = method._rank(q.shape[3])
    if rank == q.shape[3]:
        raise ValueError(f"rank must leave channels for the gate: below head_dim {q.shape[3]}, got {rank}")
    if not n_q or not k.shape[2]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    view = as_mask(mask).bind(n_q, k.shape[2], device=q.device)
    with torch.no_grad():
        index = choose_keys(method.choice(q, k, view)).long()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = (_gather(to_heads(x, heads).to(wide).expand(-1, heads, -1, -1), index) for x in (k, v))
    queries = q.to(wide).unsqueeze(3)
    predicted = (queries[..., :rank] @ keys[..., :rank].mT).squeeze(3) / math.sqrt(rank)
    gate = (queries[..., rank:] @ keys[..., rank:].mT).squeeze(3) / math.sqrt(q.shape[3] - rank)
    none = index < 0
    lost = none.all(-1, keepdim=True)
    weights = predicted.masked_fill(none & ~lost, -torch.inf).softmax(-1).masked_fill(none, 0)
    return ((weights * F.softplus(gate)).unsqueeze(3) @ values).squeeze(3).to(q.dtype)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """`x [B, H, N, D]` at `index [B, H, M, K]`: `[B, H, M, K, D]`."""
    flat = index.clamp(min=0).flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[3])
    return x.gather(2, flat).unflatten(2, index.shape[2:])
