"""SPT's sparse attention: keys that share the most codes of a product quantiser with a query."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.token_choice import lists_plan
from tilewise.kernels.choose_keys import Call, choose_keys, explain
from tilewise.tiles import Mask, Visibility, as_mask
from tilewise.tiles.clustering import kmeans
from tilewise.tiles.visibility import to_heads

ROWS_AT_ONCE = 1 << 20  # gathered numbers: 4 MiB of float32


@dataclass(frozen=True)
class SharedCodes(Method):
    """The method of an `SPT` module, which see."""

    codebooks: Tensor = field(repr=False, compare=False)
    share: float = 1 / 8
    reads = "codes of q and k"
    needs = "codebooks"

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        if not k.shape[2]:
            return Plan((Pass(view),), view)
        call = self.choice(q, k, view)
        return lists_plan(choose_keys(call), view, (explain(call),))

    def choice(self, q: Tensor, k: Tensor, view: Visibility) -> Call:
        """What chooses the keys of each query, int32 `[B, H_q, N_q, W]`."""
        subspaces, codewords, part = self.codebooks.shape
        if q.shape[3] != subspaces * part:
            raise ValueError(f"the codebooks are for head_dim {subspaces * part}, got {q.shape[3]}")
        # How many codes two vectors share is the product of their codes written as zeros and a one each.
        wanted, codes = (one_hot(encode(x, self.codebooks), codewords).flatten(3) for x in (q, k))
        width = max(1, math.ceil(self.share * k.shape[2] - 1e-6))
        return Call(wanted.bfloat16(), codes.bfloat16(), view, width, lists=q.shape[1], latest=True)


def encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """The nearest codeword of each part: `x [..., D]`, codebooks `[S, E, D / S]` to int64 `[..., S]`."""
    return _distances(x, codebooks).argmin(-1)


def _distances(x: Tensor, codebooks: Tensor) -> Tensor:
    """Squared distances `[..., S, E]`, in at least float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts, books = x.to(wide).unflatten(-1, (codebooks.shape[0], -1)), codebooks.to(wide)
    products = torch.einsum("...sd,sed->...se", parts, books)
    return parts.square().sum(-1, keepdim=True) - 2 * products + books.square().sum(-1)


def _listed(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """Attention of each query to its list, by gathering."""
    heads, none = q.shape[1], index < 0
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    flat = index.clamp(min=0).flatten(2).unsqueeze(-1)
    keys, values = (
        to_heads(x.to(wide), heads)
        .expand(-1, heads, -1, -1)
        .gather(2, flat.expand(-1, -1, -1, x.shape[3]))
        .unflatten(2, index.shape[2:])
        for x in (k, v)
    )
    scores = (q.to(wide).unsqueeze(3) @ keys.mT).squeeze(3) * scale
    lost = none.all(-1, keepdim=True)
    weights = scores.masked_fill(none & ~lost, -torch.inf).softmax(-1).masked_fill(none, 0)
    return (weights.unsqueeze(3) @ values).squeeze(3).to(v.dtype)


class SPT(nn.Module):
    """Sparse attention for fine-tuning (Gui et al., 2023, arXiv 2312.10365).

    Queries and keys are cut into parts, and each part is named by its nearest codeword of a small codebook. A query
    reads the keys that share the most codes with it, a `share` of all, by exact attention; of keys that share as
    many the latest. Attention weights are computed, and kept for the backward pass, for these alone. Gradients flow
    through them to q, k and v; the choice has none, and codebooks learn from `loss`.

        layer = SPT(head_dim=64)
        layer.fit(q, k)
        out = layer(q, k, v, mask="causal")  # or attend(q, k, v, layer.method(), mask="causal")
        (task + 0.1 * layer.loss(q, k)).backward()

    `forward` keeps lists for the backward pass, and gathers keys and values again there, for some queries at a
    time. `attend` with the method runs on every engine and takes a bias, but where gradients are needed it keeps
    gathered copies, `share` x N x N keys and values.

    Its other half, the routed feed-forward layer, is `tilewise.linear.RoutedFFN`.

    Differs from the authors' code: distances are Euclidean, where theirs are sums of sizes; scores are not
    clamped to +-10; a mask takes part in the choice, where theirs may spend a query's share on keys it does not
    see. The share is of all keys, so early queries of a causal prompt read all they see. Grouped heads: each
    query head chooses for itself; all heads share the codebooks.

    Args:
        head_dim: of the calls, a multiple of `subspaces`. subspaces: parts of a vector. codewords: per part.
        share: of the keys that a query reads, in (0, 1].

    Raises ValueError for settings that do not fit, and when a call has another head_dim.
    """

    kind: ClassVar[str] = "codes"

    def __init__(
        self, head_dim: int, *, subspaces: int = 8, codewords: int = 16, share: float = 1 / 8
    ) -> None:
        super().__init__()
        for name, value in (("head_dim", head_dim), ("subspaces", subspaces), ("codewords", codewords)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if head_dim % subspaces:
            raise ValueError(f"head_dim must be a multiple of {subspaces} subspaces, got {head_dim}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share!r}")
        self.head_dim, self.subspaces, self.codewords, self.share = head_dim, subspaces, codewords, share
        self.codebooks = nn.Parameter(torch.randn(subspaces, codewords, head_dim // subspaces))

    @torch.no_grad()
    def fit(self, q: Tensor, k: Tensor, iterations: int = 10, seed: int = 0) -> None:
        """Set the codebooks by k-means on the parts of queries `[B, H_q, N, D]` and keys `[B, H_kv, N, D]`."""
        subspaces, codewords, _ = self.codebooks.shape
        both = torch.cat([self._check(x).flatten(0, 2) for x in (q, k)]).float()
        parts = both.unflatten(1, (subspaces, -1)).transpose(0, 1).unsqueeze(0)
        self.codebooks.copy_(kmeans(parts, codewords, iterations, seed).centres[0])

    def loss(self, q: Tensor, k: Tensor) -> Tensor:
        """Mean squared distance of queries and keys to their codewords; its gradient moves the codebooks alone."""
        near = [_distances(self._check(x).detach(), self.codebooks).amin(-1).mean() for x in (q, k)]
        return (near[0] + near[1]) / self.codebooks.shape[2]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | Tensor | str | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of `q [B, H_q, N_q, D]` to `k`, `v [B, H_kv, N_k, D | D_v]`; masks as in `attend`, no floats.

        Returns `[B, H_q, N_q, D_v]` in v's dtype, computed in at least float32; 0 for queries that see nothing.
        """
        (b, heads, n_q, d), n_k = self._check(q).shape, self._check(k).shape[2]
        if not n_q or not n_k:
            return v.new_zeros(b, heads, n_q, v.shape[3])
        view = as_mask(mask).bind(n_q, n_k, device=q.device)
        with torch.no_grad():
            index = choose_keys(self.method().choice(q, k, view)).long()
        factor = d**-0.5 if scale is None else scale
        step = max(1, ROWS_AT_ONCE // max(1, b * heads * index.shape[3] * max(d, v.shape[3])))
        parts = [(q[:, :, i : i + step], index[:, :, i : i + step]) for i in range(0, n_q, step)]
        return torch.cat(
            [checkpoint(_listed, x, k, v, own, factor, use_reentrant=False) for x, own in parts], 2
        )

    def settings(self) -> dict[str, Any]:
        """What it is made with, for a file's header."""
        return {name: getattr(self, name) for name in ("head_dim", "subspaces", "codewords", "share")}

    def method(self) -> SharedCodes:
        """The method with these codebooks, to be given to `attend`."""
        return SharedCodes(self.codebooks.detach(), self.share)

    def _check(self, x: Tensor) -> Tensor:
        want = self.codebooks.shape[0] * self.codebooks.shape[2]
        if x.ndim != 4 or x.shape[3] != want:
            raise ValueError(f"queries and keys must be [B, H, N, {want}], got {list(x.shape)}")
        return x
