"""A gate that guesses, from pooled queries and keys, how large the largest weight of a tile is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tilewise.attention.gates.rotary import frequencies, resampled, turn
from tilewise.attention.gates.sizes import check_sizes, positive
from tilewise.attention.scores import by_tile, grouped, true_weights
from tilewise.attention.stages import Layout
from tilewise.tiles import NONE, Causal, Mask, Tiling
from tilewise.tiles.visibility import FAR, HIDDEN

POOLS = ("mean", "max", "min")


class Pooled(NamedTuple):
    """What a `BlockGate` reads of a layer: `q [B, H_q, T_q, D p]`, `k [B, H_kv, T_k, D p]`, where tiles begin."""

    q: Tensor
    k: Tensor
    q_at: Tensor
    k_at: Tensor


class BlockGate(nn.Module):
    """The trained part of SeerAttention for one layer (Gao et al., 2024, arXiv 2410.13276).

    Queries and keys before their rotary embedding are pooled over tiles, in one way or several side by side; a
    matrix for each head takes them to `width` numbers; the embedding is put on again with the position at which the
    tile begins; scores are products over the square root of `width`.

    Args:
        head_dim, heads, kv_heads: of the layer. width: numbers that pooled queries and keys are compared in, even.
        rotary: base of the model's rotary embedding, or the angles per position of its pairs where it is scaled
            (`model.model.rotary_emb.inv_freq` in transformers), or None for a model without.
        query_pools, key_pools: out of "mean", "max" and "min".
        seed: of the weights it starts from.

    Weights: `query [H_q, D p, width]`, `key [H_kv, D p, width]`, float32, normal with deviation 1 / sqrt(D p).
    Raises ValueError for other settings, and when called for a layer of other sizes.
    """

    kind: ClassVar[str] = "block"

    def __init__(
        self,
        head_dim: int,
        heads: int,
        kv_heads: int,
        width: int = 32,
        rotary: float | Tensor | tuple[float, ...] | None = 10_000.0,
        query_pools: tuple[str, ...] = ("mean",),
        key_pools: tuple[str, ...] = ("mean", "max", "min"),
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive(head_dim=head_dim, heads=heads, kv_heads=kv_heads, width=width)
        if heads % kv_heads or width % 2:
            raise ValueError(
                f"heads must be a multiple of kv_heads and width even, got {heads}, {kv_heads}, {width}"
            )
        for name, pools in (("query_pools", query_pools), ("key_pools", key_pools)):
            if not pools or len(set(pools)) < len(pools) or set(pools) - set(POOLS):
                raise ValueError(f"{name} must be some of {', '.join(POOLS)}, each once, got {pools!r}")
        self.head_dim, self.heads, self.kv_heads, self.width = head_dim, heads, kv_heads, width
        self.angles = rotary_angles(rotary, head_dim)
        self.query_pools, self.key_pools = tuple(query_pools), tuple(key_pools)
        g = torch.Generator().manual_seed(seed)
        sizes = ((heads, head_dim * len(query_pools)), (kv_heads, head_dim * len(key_pools)))
        weights = [torch.randn(h, n, width, generator=g) / n**0.5 for h, n in sizes]
        self.query, self.key = (nn.Parameter(weight) for weight in weights)

    def settings(self) -> dict[str, Any]:
        """What it is made with, for a file's header; the seed is no part of it."""
        return {
            "head_dim": self.head_dim,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "width": self.width,
            "rotary": list(self.angles) or None,
            "query_pools": list(self.query_pools),
            "key_pools": list(self.key_pools),
        }

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raise ValueError unless `q [B, H_q, N, D]` and `k [B, H_kv, N, D]` have this gate's sizes."""
        check_sizes(self, q, k)

    def pool(self, layout: Layout) -> Pooled:
        """Pooled queries and keys of a layer; no weight takes part, so it can be kept while the gate is trained."""
        check_sizes(self, layout.q, layout.k)
        wide = torch.promote_types(layout.q.dtype, torch.float32)
        seen = layout.view.keys_seen()
        k = layout.k.to(wide).masked_fill(~seen.unsqueeze(-1), 0)  # what is hidden may be NaN
        q = turn(layout.q.to(wide), layout.view.q_pos, self.angles, back=True)
        k = turn(k, layout.view.k_pos, self.angles, back=True)
        q_at, k_at = layout.view.q_pos, layout.view.k_pos
        k_at = k_at.masked_fill(k_at == HIDDEN, FAR)
        starts = [t.split(at, FAR).amin(3) for t, at in ((layout.q_tiling, q_at), (layout.k_tiling, k_at))]
        starts = [at.masked_fill(at == FAR, 0) for at in starts]  # tiles without a token that is seen
        return Pooled(
            _pooled(q, layout.q_tiling, self.query_pools, None),
            _pooled(k, layout.k_tiling, self.key_pools, seen),
            *starts,
        )

    def forward(self, pooled: Pooled) -> Tensor:
        """Logits `[B, H_q, T_q, T_k]`, in at least float32; of hidden tiles as well."""
        angles = resampled(self.angles, self.head_dim, self.width)
        q = turn(pooled.q @ self.query.to(pooled.q.dtype), pooled.q_at, angles)
        k = turn(pooled.k @ self.key.to(pooled.k.dtype), pooled.k_at, angles)
        return grouped(q, k) * self.width**-0.5


def rotary_angles(rotary: float | Tensor | tuple[float, ...] | None, head_dim: int) -> tuple[float, ...]:
    """Angles per position of each pair, from a base, from angles or from None, which has none."""
    if rotary is None:
        return ()
    if isinstance(rotary, (int, float)) and not isinstance(rotary, bool) and rotary > 0:
        return frequencies(float(rotary), head_dim)
    found = rotary.tolist() if isinstance(rotary, Tensor) else rotary
    if isinstance(found, (list, tuple)) and 0 < len(found) <= head_dim // 2:
        return tuple(float(angle) for angle in found)
    raise ValueError(f"rotary must be a base > 0, up to {head_dim // 2} angles, or None, got {rotary!r}")


def _pooled(x: Tensor, tiling: Tiling, pools: tuple[str, ...], seen: Tensor | None) -> Tensor:
    """`x [B, H, N, D]` pooled over tiles, way beside way: `[B, H, T, D p]`; 0 for tiles without tokens."""
    out = []
    for pool in pools:
        if pool == "mean":
            out.append(tiling.mean(x, seen)[0])
            continue
        sign = 1 if pool == "max" else -1
        kept = sign * x if seen is None else (sign * x).masked_fill(~seen.unsqueeze(-1), -torch.inf)
        best = tiling.split(kept, -torch.inf).amax(3)
        out.append(sign * best.masked_fill(best == -torch.inf, 0))
    return torch.cat(out, -1)


@dataclass(frozen=True)
class TrueMax:
    """The oracle of the gate: a tile's largest true attention weight. Costs more than dense attention.

    Taken in pieces of queries, so nothing N x N is held.
    """

    looks = "tile"

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        b, heads, n_q, _ = layout.q.shape
        n_k = layout.k.shape[2]
        height = layout.q_tiling.size if layout.q_tiling.bounds is None else max(1, n_q)
        out = []
        for weights in true_weights(layout, height):
            columns = by_tile(layout.k_tiling, weights, n_k, sums=False)
            out.append(layout.q_tiling.split(columns, 0).amax(3))
        shape = (b, heads, 0, layout.k_tiling.count(n_k))
        return torch.cat(out, 2) if out else layout.q.new_zeros(shape, dtype=torch.float32)


class BlockLesson(NamedTuple):
    """What a gate learns from one layer of one text: its input, the share of each tile, and which are visible."""

    pooled: Pooled
    target: Tensor
    visible: Tensor


@torch.no_grad()
def block_lesson(
    gate: BlockGate,
    q: Tensor,
    k: Tensor,
    *,
    tile: int = 64,
    mask: Mask | None = None,
    scale: float | None = None,
) -> BlockLesson:
    """The lesson of one layer: each row's largest weights by tile, as shares of their sum.

    Args:
        gate: says how to pool; its weights are not read. q `[B, H_q, N, D]`, k `[B, H_kv, N, D]`: as the layer's
            attention sees them. tile: tokens per tile side. mask: causal when None. scale: None is 1 / sqrt(D).

    Holds N / tile numbers a row, and while it is made some rows of attention weights, never N x N.
    """
    positive(tile=tile)
    view = (Causal() if mask is None else mask).bind(q.shape[2], k.shape[2], device=q.device)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    layout = Layout(q, k, view, Tiling(tile), Tiling(tile), scale)
    visible = layout.kinds() != NONE
    largest = TrueMax().score(layout, visible)
    total = largest.sum(-1, keepdim=True)
    return BlockLesson(gate.pool(layout), largest / total.masked_fill(total == 0, 1), visible)


@dataclass(frozen=True)
class BlockLoss:
    """Kullback-Leibler divergence of the gate's softmax over a row of tiles from the shares of the lesson, in nats.

    Mean over rows. `skip`: the part of the rows left out at the start, which have few tiles to tell apart; the
    authors leave out a quarter.
    """

    skip: float = 0.25

    def __post_init__(self) -> None:
        if not isinstance(self.skip, (int, float)) or not 0 <= self.skip < 1:
            raise ValueError(f"skip must be in [0, 1), got {self.skip!r}")

    def __call__(self, gate: nn.Module, lesson: BlockLesson) -> Tensor:
        rows = slice(int(self.skip * lesson.target.shape[2]), None)
        logits = gate(lesson.pooled).masked_fill(~lesson.visible, -torch.inf)[:, :, rows]
        target = lesson.target[:, :, rows]
        shares = logits.log_softmax(-1).masked_fill(target == 0, 0)
        return (torch.special.xlogy(target, target) - target * shares).sum(-1).mean()
