"""Orders: which tokens share a tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.scores import grouped
from tilewise.tiles import Visibility
from tilewise.tiles.visibility import to_heads


@dataclass(frozen=True)
class SegmentSort:
    """Sorts keys by importance within segments of the sequence, so that important ones share tiles.

    Importance is the mean attention that a key gets from the last `probe` queries. Segments keep their places,
    so causality between segments stays tile by tile. Grouped heads: one order per kv head, from the mean over
    its query heads, so that keys are never repeated.

    Args:
        segment: tokens per segment. probe: queries at the end of the prompt that judge.
        queries: also sort queries within segments, by their product with the mean of the `probe` most important
            keys; scattered queries that look for those keys then share tiles.
    """

    segment: int
    probe: int = 128
    queries: bool = False
    looks = "prompt"

    def __post_init__(self) -> None:
        for name, value in (("segment", self.segment), ("probe", self.probe)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    def permutations(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float
    ) -> tuple[Tensor | None, Tensor | None]:
        b, heads, n_q, _ = q.shape
        kv_heads, n_k = k.shape[1:3]
        if not n_q or n_k <= self.segment:
            return None, None
        last = torch.arange(max(n_q - self.probe, 0), n_q, device=q.device).view(1, 1, -1)
        seen = to_heads(view.permute(last, None).tokens(), heads)
        logits = grouped(q[:, :, -self.probe :] * scale, k).float()  # scaled first: float16 overflows
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num_(0)
        importance = weights.mean(2).view(b, kv_heads, heads // kv_heads, n_k).mean(2)  # [b, h_kv, n_k]
        k_order = self._sort(importance)
        if not self.queries:
            return None, k_order
        best = importance.topk(min(self.probe, n_k), -1).indices  # [b, h_kv, probe]
        centre = k.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, k.shape[3])).mean(2, keepdim=True)
        return self._sort(grouped(q * scale, centre).float().squeeze(-1)), k_order

    def _sort(self, importance: Tensor) -> Tensor:
        """Descending within whole segments; a last short segment stays as it is."""
        n = importance.shape[-1]
        place = torch.arange(n, device=importance.device)
        tail = place >= n // self.segment * self.segment
        by_importance = importance.masked_fill(tail, 0).argsort(dim=-1, descending=True, stable=True)
        return by_importance.gather(-1, (by_importance // self.segment).argsort(dim=-1, stable=True))
