"""Statistical top-k: about the k largest of a row, by a threshold in place of a sort."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StatisticalTopK:
    """Keeps what lies above `mean + deviation * Q(1 - k / n)` of its row, Q the quantiles of the normal
    distribution (You et al., 2025, arXiv 2506.06644).

    Of n numbers that are normally distributed about k lie there, whatever their mean and spread. Two sums and a
    comparison for each number: linear in n, where a sort is not. How many are kept is not fixed, and far from k
    where numbers are not normal: heavy tails stretch the deviation, and fewer are kept. The largest of a row is
    always kept; a row of at most k keeps all.

    As a `Select` stage it chooses tiles (forced ones in addition); on activations `soft` is the paper's operator.

    Args:
        k: how many to expect, >= 1.

    Raises ValueError for another k.
    """

    k: int
    looks = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"k must be an integer >= 1, got {self.k!r}")

    def threshold(self, x: Tensor, among: Tensor | None = None) -> Tensor:
        """What a number must reach, `[..., 1]` for `x [..., n]`, differentiable; -inf for rows of at most k.

        Computed in at least float32. `among` bool `[..., n]` says which numbers there are; None is all.
        """
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if among is None:
            among = torch.ones((), dtype=torch.bool, device=x.device)
        among = among.expand_as(wide)
        count = among.sum(-1, keepdim=True)
        some = count.clamp(min=1).to(wide.dtype)
        mean = wide.masked_fill(~among, 0).sum(-1, keepdim=True) / some
        squares = (wide - mean).masked_fill(~among, 0).square().sum(-1, keepdim=True)
        deviation = (squares / (some - 1).clamp(min=1)).clamp(min=torch.finfo(wide.dtype).tiny).sqrt()
        most = wide.detach().masked_fill(~among, -torch.inf)
        most = torch.nn.functional.pad(most, (1, 0), value=-torch.inf).amax(-1, keepdim=True)
        all_of_them = count <= self.k
        quantile = torch.special.ndtri((1 - self.k / some).clamp(min=0.0)).masked_fill(all_of_them, 0)
        reached = torch.minimum(mean + deviation * quantile, most)
        return reached.masked_fill(all_of_them, -torch.inf)

    def keep(self, x: Tensor, among: Tensor | None = None) -> Tensor:
        """Bool `[..., n]`: what is kept."""
        kept = x >= self.threshold(x, among)
        return kept if among is None else kept & among

    def soft(self, x: Tensor) -> Tensor:
        """`max(x - threshold, 0)`, in x's dtype; x itself where a row has at most k.

        Gradients flow through the threshold as well, so that a row's mean and spread take part.
        """
        if x.shape[-1] <= self.k:
            return x
        return (x - self.threshold(x)).clamp(min=0).to(x.dtype)

    def select(self, scores: Tensor, among: Tensor, forced: Tensor) -> Tensor:
        """As in `Select`: tiles that lie above the threshold of those that take part, and the forced ones."""
        return (self.keep(scores, among) | forced) & (among | forced)
