"""Permutations made of three choices a level, fixed or relaxed so that they can be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewise.transforms.butterfly.factors import levels_of


class Permutation(nn.Module):
    """A permutation of n numbers by `choices`, bool `[log2(n) - 1, 3]`, from the whole down to blocks of four.

    In every block of its size a level does up to three things: it sorts even places before odd ones, it turns the
    first half around, and it turns the second half around. All even-odd sorts are the bit reversal of the FFT; with
    the second half turned around at the top they are the order of the DCT (Makhoul, 1980); none is the identity.

    `forward`: `[..., n]` to the same. Raises ValueError for choices of another shape.
    """

    def __init__(self, n: int, choices: Tensor) -> None:
        super().__init__()
        self.n, levels = n, levels_of(n) - 1
        if choices.dtype != torch.bool or choices.shape != (levels, 3):
            raise ValueError(
                f"choices must be bool [{levels}, 3] for n = {n}, got {choices.dtype} {list(choices.shape)}"
            )
        self.choices: Tensor
        self.register_buffer("choices", choices.clone())

    @classmethod
    def named(cls, name: str, n: int) -> Permutation:
        """By "identity", "bit-reversed" or "cosine". Raises ValueError for another name."""
        choices = torch.zeros(levels_of(n) - 1, 3, dtype=torch.bool)
        if name not in ("identity", "bit-reversed", "cosine"):
            raise ValueError(f"permutation must be 'identity', 'bit-reversed' or 'cosine', got {name!r}")
        if name != "identity":
            choices[:, 0] = True
        if name == "cosine":
            choices[:1, 2] = True
        return cls(n, choices)

    @property
    def index(self) -> Tensor:
        """Where each number comes from, int64 `[n]`: the result is `x[..., index]`."""
        at = torch.arange(self.n, device=self.choices.device)
        for level, row in enumerate(self.choices.tolist()):
            for which, chosen in enumerate(row):
                if chosen:
                    at = _apply(at, self.n >> level, which)
        return at

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index)


class RelaxedPermutation(nn.Module):
    """A mixture of these permutations that gradients flow through (Dao et al., 2019, section 3.2).

    Each choice has a logit; with p its sigmoid, a step gives `p S x + (1 - p) x` for what the step would do, S.
    `hard()` gives the permutation of the likelier choices. `sharpness` in [0, 1] says how far they are from one half,
    on average.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.logits = nn.Parameter(0.5 * torch.randn(levels_of(n) - 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        for level, row in enumerate(self.logits.sigmoid()):
            for which, p in enumerate(row):
                x = x + p * (_apply(x, self.n >> level, which) - x)
        return x

    def hard(self) -> Permutation:
        return Permutation(self.n, (self.logits > 0).detach())

    @property
    def sharpness(self) -> float:
        if not len(self.logits):
            return 1.0
        return float((2 * self.logits.detach().sigmoid() - 1).abs().mean())


def _apply(x: Tensor, size: int, which: int) -> Tensor:
    """One of the three steps in every block of a size."""
    blocks = x.unflatten(-1, (x.shape[-1] // size, size))
    if which == 0:
        moved = torch.cat((blocks[..., ::2], blocks[..., 1::2]), -1)
    else:
        first, second = blocks.chunk(2, -1)
        moved = torch.cat((first.flip(-1), second) if which == 1 else (first, second.flip(-1)), -1)
    return moved.flatten(-2)
