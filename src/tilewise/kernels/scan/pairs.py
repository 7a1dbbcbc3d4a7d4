"""What decays between tokens of a chunk, and the scores of queries and earlier keys under it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Decays within chunks; no exponent is ever positive, since sums run over the very tokens between two.

    `before` and `after` are the factors from the beginning to each token, it included, and from each to the end, it
    excluded: `[rows, H, tile, D_k | 1]`; `total [rows, H, D_k | 1, 1]` that of the whole chunk.
    """

    decay: Tensor | None  # [rows, H, tile] or [rows, H, tile, D_k]
    before: Tensor
    after: Tensor
    total: Tensor

    @classmethod
    def of(cls, decay: Tensor | None, like: Tensor) -> Pairs:
        """Those of `decay`; None decays nothing. `like [rows, H, tile, D_k]`."""
        if decay is None:
            one = like.new_ones(like.shape[0], 1, 1, 1)
            return cls(None, one, one, one)
        steps = decay if decay.ndim == 4 else decay.unsqueeze(3)
        before = steps.cumsum(2).exp()
        return cls(decay, before, _behind(steps).exp(), before[:, :, -1].unsqueeze(3))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """`sum_d q_td k_sd exp(decay from s to t)`, `[rows, H, G, tile, tile]`, right where s <= t.

        q is `[rows, H, G, tile, D_k]`, k `[rows, H, 1, tile, D_k]`.
        """
        if self.decay is None:
            return q @ k.mT
        if self.decay.ndim == 3:
            return (q @ k.mT) * self._factors()
        blocks = (q * k).sum(-1, keepdim=True).unsqueeze(-1)  # [..., tile, 1, 1], tokens with themselves
        half = 1
        while half < q.shape[-2]:
            (queries, _), (keys, _) = self._right(q, half), self._left(k, half)
            lower = queries @ keys.mT  # [..., blocks, half, half]
            first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
            upper = torch.zeros_like(lower)
            blocks = torch.cat((torch.cat((first, upper), -1), torch.cat((lower, second), -1)), -2)
            half *= 2
        return blocks.squeeze(-3)

    def gradients(self, d_scores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of q, of k and of the log decays (both with the groups added up), for `d_scores` that is 0
        where s > t.

        A decay gets the sum over the pairs of tokens that pass it, each added up by itself: a difference of larger
        sums would lose what decays have made small.
        """
        if self.decay is None or self.decay.ndim == 3:
            weighted = d_scores if self.decay is None else d_scores * self._factors()
            passing = (weighted * (q @ k.mT)).sum(2, keepdim=True)  # [r, h, 1, later, earlier]
            gate = from_here(passing).tril(-1).sum(-1, keepdim=True)
            return weighted @ k, (weighted.mT @ q).sum(2, keepdim=True), gate
        own = d_scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        d_q, d_k, gate = own * k, (own * q).sum(2, keepdim=True), torch.zeros_like(k)
        half, tile = 1, q.shape[-2]
        while half < tile:
            blocks = d_scores.unflatten(-2, (-1, 2 * half)).unflatten(-1, (-1, 2 * half))
            lower = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., half:, :half]
            (queries, q_factor), (keys, k_factor) = self._right(q, half), self._left(k, half)
            right, left = (lower @ keys) * q_factor, ((lower.mT @ queries) * k_factor).sum(2, keepdim=True)
            d_q = d_q + torch.cat((torch.zeros_like(right), right), -2).flatten(-3, -2)
            d_k = d_k + torch.cat((left, torch.zeros_like(left)), -2).flatten(-3, -2)
            by_right = (right * q.unflatten(-2, (-1, 2 * half))[..., half:, :]).sum(2, keepdim=True)
            by_left = left * k.unflatten(-2, (-1, 2 * half))[..., :half, :]
            gate = gate + torch.cat((so_far(by_left), from_here(by_right)), -2).flatten(-3, -2)
            half *= 2
        return d_q, d_k, gate

    def together(self, x: Tensor) -> Tensor:
        """`[..., D_k]` summed over channels that share a decay: `[..., 1]`, or as it is."""
        return x if self.decay is None or self.decay.ndim == 4 else x.sum(-1, keepdim=True)

    def _factors(self) -> Tensor:
        """exp(decay from s to t) with one decay for all channels: `[rows, H, 1, tile, tile]`, 1 where s > t."""
        decay, tile = self.decay, self.decay.shape[2]  # type: ignore[union-attr]
        later = torch.ones(tile, tile, dtype=torch.bool, device=decay.device).tril(-1)  # type: ignore[union-attr]
        sums = decay.unsqueeze(3).expand(*decay.shape, tile).masked_fill(~later, 0)  # type: ignore[union-attr]
        return sums.cumsum(2).exp().unsqueeze(2)

    def _right(self, q: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """The second half of each block, decayed from the border between the halves; and the factors."""
        steps = self.decay.unsqueeze(2).unflatten(-2, (-1, 2 * half))  # type: ignore[union-attr]
        factor = steps[..., half:, :].cumsum(-2).exp()
        return q.unflatten(-2, (-1, 2 * half))[..., half:, :] * factor, factor

    def _left(self, k: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """The first half of each block, decayed to that border; and the factors."""
        steps = self.decay.unsqueeze(2).unflatten(-2, (-1, 2 * half))  # type: ignore[union-attr]
        factor = _behind(steps[..., :half, :]).exp()
        return k.unflatten(-2, (-1, 2 * half))[..., :half, :] * factor, factor


def so_far(x: Tensor) -> Tensor:
    """Sums along dim -2 of all that comes before each token."""
    return torch.cat((torch.zeros_like(x[..., :1, :]), x[..., :-1, :]), -2).cumsum(-2)


def from_here(x: Tensor) -> Tensor:
    """Sums along dim -2 of each token and all that comes after it."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _behind(steps: Tensor) -> Tensor:
    """Sums along dim -2 of all that comes after each token."""
    return from_here(torch.cat((steps[..., 1:, :], torch.zeros_like(steps[..., :1, :])), -2))
