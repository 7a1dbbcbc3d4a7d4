"""A codebook of keys: what makes attention linear in time, learned as moving averages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.mixer import wide

RARE = 0.02  # a codeword used less than this share of the mean use is drawn anew


class Codebook(nn.Module):
    """Codewords that stand for keys, as in Transformer-VQ (Lingle, 2023, arXiv 2309.16354).

    A key's code is the nearest codeword. In training each codeword moves towards the mean of the keys it stands
    for, `pace` of it kept at each call, and no gradient reaches it; a key gets the gradient of its codeword
    (straight through) and `commit` times that of its mean squared distance from it, whatever the loss.

    Args:
        heads, codes, dim: `codes` codewords of each head. pace, commit: as above.

    Differs from the authors' code in codewords that are hardly used, which take the place of a key of the call,
    and in the commitment, which is added to the gradient rather than handed out as a loss.
    """

    def __init__(self, heads: int, codes: int, dim: int, pace: float = 0.99, commit: float = 0.1) -> None:
        super().__init__()
        self.pace, self.commit = pace, commit
        self.words: Tensor
        self.uses: Tensor
        self.register_buffer("words", F.normalize(torch.randn(heads, codes, dim), dim=-1))
        self.register_buffer("uses", torch.zeros(heads, codes))  # in a call, on average

    def forward(self, k: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes int64 `[B, N, H]` of keys `[B, N, H, D]` and codewords `[B, N, H, D]` in their place.

        `real` bool `[B, N]` is False for keys that the codebook shall not learn from.
        """
        if self.training and k.numel():
            known = k.detach().flatten(0, 1) if real is None else k.detach()[real]
            self._redraw(known)
            self._learn(known)
        codes = self.nearest(k.detach())
        weight = self.commit / max(1, codes.numel()) if self.training else 0.0
        return codes, _Through.apply(k, self.named(codes).to(k.dtype), weight)

    def nearest(self, k: Tensor) -> Tensor:
        """Codes of keys `[..., H, D]`."""
        words = wide(self.words)
        scores = torch.einsum("...hd,hkd->...hk", wide(k), words) - words.square().sum(-1) / 2
        return scores.argmax(-1)

    def named(self, codes: Tensor) -> Tensor:
        """Codewords `[..., H, D]` of codes int64 `[..., H]`."""
        return wide(self.words)[torch.arange(codes.shape[-1], device=codes.device), codes]

    @torch.no_grad()
    def _learn(self, k: Tensor) -> None:
        """Move the codewords by the keys `[T, H, D]` of a call."""
        chosen = F.one_hot(self.nearest(k), self.words.shape[1]).to(self.words.dtype)  # [t, h, k]
        came, kept = (1 - self.pace) * chosen.sum(0), self.pace * self.uses
        total = torch.einsum("thk,thd->hkd", chosen, k.to(chosen.dtype)) * (1 - self.pace)
        uses = came + kept
        moved = (kept.unsqueeze(2) * self.words + total) / uses.unsqueeze(2).clamp(min=1e-12)
        self.words.copy_(torch.where(came.unsqueeze(2) > 0, moved, self.words))
        self.uses.copy_(uses)

    @torch.no_grad()
    def _redraw(self, k: Tensor) -> None:
        """Codewords that are hardly used become keys `[T, H, D]` of the call, drawn at random."""
        rare = self.uses <= RARE * self.uses.mean(1, keepdim=True)
        if len(k) and bool(rare.any()):
            heads = torch.arange(len(rare), device=k.device).unsqueeze(1)
            drawn = k[torch.randint(len(k), rare.shape, device=k.device), heads].to(self.words.dtype)
            self.words.copy_(torch.where(rare.unsqueeze(2), drawn, self.words))


class _Through(torch.autograd.Function):
    """Codewords in the place of keys, whose gradient goes to the keys, and `weight (k - word)` with it."""

    @staticmethod
    def forward(ctx, k: Tensor, words: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        if weight:
            ctx.save_for_backward(k - words)
        return words.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.weight:
            (apart,) = ctx.saved_tensors
            grad = grad + ctx.weight * apart
        return grad, None, None
