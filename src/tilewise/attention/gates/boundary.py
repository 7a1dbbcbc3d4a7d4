"""A predictor of chunk boundaries from keys, and what it learns: where the attention that keys get changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention.gates.block_gate import rotary_angles
from tilewise.attention.gates.rotary import turn
from tilewise.attention.gates.sizes import check_sizes, positive
from tilewise.attention.scores import AT_ONCE, grouped
from tilewise.tiles import Causal, Mask, Visibility
from tilewise.tiles.visibility import to_heads


class BoundaryPredictor(nn.Module):
    """The trained part of DHSA for one layer (Xiong et al., 2025, arXiv 2510.24606).

    For every gap between two tokens the keys of the `window` tokens on its left and on its right, all kv heads side
    by side and without their rotary embedding, are taken to `width` numbers and pooled by learned weights, left and
    right alike. Both sides, their difference without sign, their product and their cosine go through one hidden
    layer to a
    logit: does a chunk end here?

    Differs from the authors' predictors: tokens are weighed, but do not attend to each other within a window.

    Args:
        head_dim, heads, kv_heads: of the layer. window: tokens on each side. width, hidden: numbers per side and in
            the hidden layer. rotary: as for `BlockGate`. seed: of the weights it starts from.

    Raises ValueError for other settings, and when called for a layer of other sizes.
    """

    kind: ClassVar[str] = "boundary"

    def __init__(
        self,
        head_dim: int,
        heads: int,
        kv_heads: int,
        window: int = 4,
        width: int = 16,
        hidden: int = 32,
        rotary: float | Tensor | tuple[float, ...] | None = 10_000.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive(head_dim=head_dim, heads=heads, kv_heads=kv_heads, window=window, width=width, hidden=hidden)
        self.head_dim, self.heads, self.kv_heads = head_dim, heads, kv_heads
        self.window, self.width, self.hidden = window, width, hidden
        self.angles = rotary_angles(rotary, head_dim)
        g = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=g) / shape[0] ** 0.5)

        self.enter, self.weigh = weight(kv_heads * head_dim, width), weight(width, 1)
        self.fuse, self.decide = weight(4 * width + 1, hidden), weight(hidden, 1)
        self.fuse_bias, self.decide_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(1))

    def settings(self) -> dict[str, Any]:
        """What it is made with, for a file's header; the seed is no part of it."""
        names = ("head_dim", "heads", "kv_heads", "window", "width", "hidden")
        return {**{name: getattr(self, name) for name in names}, "rotary": list(self.angles) or None}

    def features(self, k: Tensor, view: Visibility) -> Tensor:
        """Keys as the predictor reads them: `[B, N, H_kv D]`, at least float32; hidden ones are 0."""
        wide = torch.promote_types(k.dtype, torch.float32)
        hidden = ~to_heads(view.keys_seen(), k.shape[1]).unsqueeze(-1)
        k = turn(k.to(wide).masked_fill(hidden, 0), view.k_pos, self.angles, back=True)
        return k.transpose(1, 2).flatten(2)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[B, N - 1]`: the i-th says whether a chunk ends with token i. None for N of 0 or 1."""
        x = features @ self.enter.to(features.dtype)  # [b, n, width]
        b, n, width = x.shape
        if n < 2:
            return x.new_zeros(b, 0)
        score = x @ self.weigh.to(x.dtype)
        known = torch.ones_like(score)
        # Windows of the tokens that end at i, for i = 0 .. n - 2, and of those that begin at i + 1.
        padded = [F.pad(y, (0, 0, self.window - 1, self.window - 1)) for y in (x, score, known)]
        x, score, known = (
            y.unfold(1, self.window, 1) for y in padded
        )  # [b, n + window - 1, width | 1, window]
        share = score.masked_fill(known == 0, -torch.inf).softmax(-1)
        pooled = (x * share).sum(-1)
        left, right = pooled[:, : n - 1], pooled[:, self.window :][:, : n - 1]
        alike = F.cosine_similarity(left, right, dim=-1, eps=1e-6).unsqueeze(-1)
        fused = torch.cat([left, right, (left - right).abs(), left * right, alike], -1)
        inner = F.relu(fused @ self.fuse.to(x.dtype) + self.fuse_bias.to(x.dtype))
        return (inner @ self.decide.to(x.dtype) + self.decide_bias.to(x.dtype)).squeeze(-1)


class BoundaryLesson(NamedTuple):
    """Keys `[B, N, H_kv D]`, how much each gap is a boundary, in [0, 1] `[B, N - 1]`, and which count."""

    features: Tensor
    target: Tensor
    counted: Tensor


def attention_ratio(q: Tensor, k: Tensor, view: Visibility, scale: float, window: int) -> Tensor:
    """How unlike the attention is that the two sides of every gap get from later queries: `[B, N - 1]`, >= 1.

    The attention of all heads, averaged, of the queries behind both sides, onto the `window` keys left of the gap
    and onto those right of it; the larger over the smaller. Gaps without a whole window on both sides have 1. In
    pieces of queries, never N x N.
    """
    b, heads, n_q, _ = q.shape
    n = k.shape[2]
    if n < 2:
        return q.new_ones(b, max(0, n - 1), dtype=torch.float32)
    sides = torch.zeros(2, b, n - 1, device=q.device)
    gaps = torch.arange(n - 1, device=q.device)
    step = max(1, AT_ONCE // max(1, b * heads * n))
    for start in range(0, n_q, step):
        some = torch.arange(start, min(start + step, n_q), device=q.device)
        seen = to_heads(view.permute(some.view(1, 1, -1), None).tokens(), heads)
        logits = (grouped(q[:, :, some] * scale, k)).float().masked_fill(~seen, -torch.inf)
        weights = logits.softmax(-1).nan_to_num_(0).mean(1)  # [b, rows, n]
        sums = F.pad(weights.double().cumsum(-1), (1, 0))
        behind = (some + n - n_q).unsqueeze(1) > gaps + window  # [rows, n - 1]
        ends = gaps + 1
        left = sums[:, :, ends] - sums[:, :, (ends - window).clamp(min=0)]
        right = sums[:, :, (ends + window).clamp(max=n)] - sums[:, :, ends]
        sides += torch.stack([(x * behind).sum(1) for x in (left, right)]).float()
    ratio = (sides.amax(0) + 1e-6) / (sides.amin(0) + 1e-6)
    return ratio.masked_fill((gaps + 1 < window) | (gaps + 1 + window > n), 1)


@torch.no_grad()
def boundary_lesson(
    predictor: BoundaryPredictor,
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    share: float = 0.1,
    sharpness: float = 4.0,
) -> BoundaryLesson:
    """The lesson of one layer: `sigmoid(sharpness (log ratio - log ratio at the best share))` of `attention_ratio`.

    Args:
        predictor: says how to read keys; its weights are not read. q `[B, H_q, N, D]`, k `[B, H_kv, N, D]`: as the
            layer's attention sees them. mask: causal when None. scale: None is 1 / sqrt(D).
        share: part of the gaps that is more boundary than not, in (0, 1). sharpness: > 0.
    """
    check_sizes(predictor, q, k)
    if not 0 < share < 1 or not sharpness > 0:
        raise ValueError(f"share must be in (0, 1) and sharpness > 0, got {share!r} and {sharpness!r}")
    view = (Causal() if mask is None else mask).bind(q.shape[2], k.shape[2], device=q.device)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    ratio = attention_ratio(q, k, view, scale, predictor.window).log()
    counted = ratio > 0
    middle = ratio.masked_fill(~counted, torch.nan).nanquantile(1 - share, -1, keepdim=True).nan_to_num(0)
    return BoundaryLesson(predictor.features(k, view), (sharpness * (ratio - middle)).sigmoid(), counted)


@dataclass(frozen=True)
class BoundaryLoss:
    """Binary cross-entropy on soft labels, in nats, weighed by `(1 - p)^focus`, p how far the label is met."""

    focus: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.focus, (int, float)) or self.focus < 0:
            raise ValueError(f"focus must be >= 0, got {self.focus!r}")

    def __call__(self, predictor: nn.Module, lesson: BoundaryLesson) -> Tensor:
        logits = predictor(lesson.features)
        target = lesson.target.to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        p = logits.sigmoid()
        met = p * target + (1 - p) * (1 - target)
        counted = lesson.counted.to(logits.dtype)
        return ((1 - met).pow(self.focus) * loss * counted).sum() / counted.sum().clamp(min=1)
