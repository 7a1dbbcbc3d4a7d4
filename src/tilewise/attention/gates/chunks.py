"""Adapters that say where a chunk ends and how much it matters, and what they learn."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention.gates.block_gate import rotary_angles
from tilewise.attention.gates.rotary import turn
from tilewise.attention.gates.sizes import check_sizes, positive
from tilewise.attention.scores import AT_ONCE, grouped
from tilewise.tiles import Causal, Tiling, Visibility
from tilewise.tiles.visibility import to_heads


class ChunkAdapters(nn.Module):
    """The trained parts of ChunkLLM for one layer (Ouyang et al., 2025, arXiv 2510.02361).

    QK adapter: queries and keys, all heads side by side and without rotary embedding, are taken to `width` numbers;
    the product of a token's query with the mean key of a chunk, over the square root of `width`, says how much the
    chunk matters to the token. Chunk adapter: the keys of a token and the `window - 1` before it go through one
    hidden layer to a logit: does a chunk end with this token? Nothing looks ahead.

    Args:
        head_dim, heads, kv_heads: of the layer. width: numbers that queries and keys are compared in.
        window, hidden: tokens that an end is told from, and numbers in the hidden layer.
        rotary: as for `BlockGate`. seed: of the weights it starts from.

    Raises ValueError for other settings, and when called for a layer of other sizes.
    """

    kind: ClassVar[str] = "chunk"

    def __init__(
        self,
        head_dim: int,
        heads: int,
        kv_heads: int,
        width: int = 32,
        window: int = 4,
        hidden: int = 32,
        rotary: float | Tensor | tuple[float, ...] | None = 10_000.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive(head_dim=head_dim, heads=heads, kv_heads=kv_heads, width=width, window=window, hidden=hidden)
        self.head_dim, self.heads, self.kv_heads = head_dim, heads, kv_heads
        self.width, self.window, self.hidden = width, window, hidden
        self.angles = rotary_angles(rotary, head_dim)
        g = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=g) / shape[0] ** 0.5)

        self.query, self.key = weight(heads * head_dim, width), weight(kv_heads * head_dim, width)
        self.inner, self.end = weight(window * kv_heads * head_dim, hidden), weight(hidden, 1)
        self.inner_bias, self.end_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(1))

    def settings(self) -> dict[str, Any]:
        """What it is made with, for a file's header; the seed is no part of it."""
        names = ("head_dim", "heads", "kv_heads", "width", "window", "hidden")
        return {**{name: getattr(self, name) for name in names}, "rotary": list(self.angles) or None}

    def features(self, x: Tensor, positions: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Queries or keys `[B, H, N, D]` as the adapters read them, `[B, N, H D]`, at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        if hidden is not None:
            x = x.masked_fill(to_heads(hidden, x.shape[1]).unsqueeze(-1), 0)
        return turn(x, positions, self.angles, back=True).transpose(1, 2).flatten(2)

    def ends(self, features: Tensor) -> Tensor:
        """Logits `[B, N]` that a chunk ends with each token; before the first key feature there are zeros."""
        padded = F.pad(features, (0, 0, self.window - 1, 0))
        seen = padded.unfold(1, self.window, 1).flatten(2)  # [b, n, h d window]
        inner = F.relu(seen @ self.inner.to(seen.dtype) + self.inner_bias.to(seen.dtype))
        return (inner @ self.end.to(seen.dtype) + self.end_bias.to(seen.dtype)).squeeze(-1)

    def scores(self, queries: Tensor, chunk_keys: Tensor) -> Tensor:
        """`queries [B, M, H_q D]`, `chunk_keys [B, C, H_kv D]`, mean features of chunks, to scores `[B, M, C]`."""
        left, right = queries @ self.query.to(queries.dtype), chunk_keys @ self.key.to(chunk_keys.dtype)
        return left @ right.mT * self.width**-0.5


class ChunkLesson(NamedTuple):
    """What adapters learn from one layer of one text.

    Attributes:
        keys: features of all keys `[1, N, H_kv D]`. ends: bool `[1, N]`, tokens that end a chunk.
        queries: features of the C - 1 tokens that end all chunks but the last `[1, C - 1, H_q D]`.
        chunk_keys: mean features of these chunks `[1, C - 1, H_kv D]`.
        target: the share of each of these tokens' attention, averaged over heads, that lies in each chunk up to its
            own, `[1, C - 1, C - 1]`.
    """

    keys: Tensor
    ends: Tensor
    queries: Tensor
    chunk_keys: Tensor
    target: Tensor


@torch.no_grad()
def chunk_lesson(
    adapters: ChunkAdapters, q: Tensor, k: Tensor, ends: Tensor, *, scale: float | None = None
) -> ChunkLesson:
    """The lesson of one layer of a text under a causal mask.

    Args:
        adapters: say how to read queries and keys; their weights are not read. q `[1, H_q, N, D]`, k
            `[1, H_kv, N, D]`: as the layer's attention sees them. ends: bool `[N]`, tokens that end a sentence, by
            whatever rule; True somewhere. scale: None is 1 / sqrt(D).

    Attention is worked out for the ends alone, in pieces.
    """
    check_sizes(adapters, q, k)
    n = k.shape[2]
    if q.shape[0] != 1 or ends.shape != (n,) or ends.dtype != torch.bool or not bool(ends[: n - 1].any()):
        raise ValueError(f"ends must be bool [{n}] with an end before the last token, for one text")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    at = ends[: n - 1].nonzero().flatten()
    view = Causal().bind(n, n, device=q.device)
    bounds = torch.cat([at.new_zeros(1), at + 1, at.new_tensor([n])])
    chunks, out = Tiling.from_bounds(bounds), []
    for some in at.split(max(1, AT_ONCE // (q.shape[1] * n))):
        logits = (grouped(q[:, :, some] * scale, k)).float()
        weights = logits.masked_fill(~view.permute(some.view(1, 1, -1), None).tokens(), -torch.inf).softmax(
            -1
        )
        out.append(chunks.split(weights.mean(1).mT.unsqueeze(1), 0).sum(3)[:, 0].mT)
    keys, queries = adapters.features(k, view.k_pos), adapters.features(q, view.q_pos)
    means = chunks.mean(keys.unsqueeze(1))[0][:, 0]
    return ChunkLesson(keys, ends.unsqueeze(0), queries[:, at], means[:, :-1], torch.cat(out, 1)[..., :-1])


def chunk_loss(adapters: ChunkAdapters, lesson: ChunkLesson) -> Tensor:
    """Divergence of the adapters' shares of chunks from the true ones, plus cross-entropy of the ends, in nats."""
    scores = adapters.scores(lesson.queries, lesson.chunk_keys)
    late = torch.ones_like(scores, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(late, -torch.inf).log_softmax(-1).masked_fill(late, 0)
    target = lesson.target / lesson.target.sum(-1, keepdim=True).clamp(min=1e-30)
    apart = (torch.special.xlogy(target, target) - target * shares).sum(-1).mean()
    logits = adapters.ends(lesson.keys)
    return apart + F.binary_cross_entropy_with_logits(logits, lesson.ends.to(logits.dtype))


def hidden_keys(view: Visibility) -> Tensor:
    """Keys that nobody sees, bool `[B|1, H|1, N]`."""
    return ~view.keys_seen()
