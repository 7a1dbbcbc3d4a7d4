"""Permutations made of three choices a level, fixed or relaxed so that they can be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewise.transforms.butterfly.factors import levels_of


class Permutation(nn.Module):
    """A permutation of n numbers by `choices`, bool `[log2(n), 3]`.

    A row does up to three things in every block of its size: it sorts even places before odd ones, it turns
    the first half around, and it turns the second half around. The first row is for the whole, the second for
    the whole again, then come halves, quarters and so on down to blocks of four. Even-odd sorts from the
    second row on are the bit reversal of the FFT; after a first row that sorts and turns the second half they
    are the order of the cosine transform (Makhoul, 1980); no choice is the identity.

    `forward`: `[..., n]` to the same. Raises ValueError for choices of another shape.
    """

    def __init__(self, n: int, choices: Tensor) -> None:
        super().__init__()
        self.n, rows = n, levels_of(n)
        if choices.dtype != torch.bool or choices.shape != (rows, 3):
            raise ValueError(
                f"choices must be bool [{rows}, 3] for n = {n}, got {choices.dtype} {list(choices.shape)}"
            )
        self.choices: Tensor
        self.register_buffer("choices", choices.clone())

    @classmethod
    def named(cls, name: str, n: int) -> Permutation:
        """By "identity", "bit-reversed" or "cosine". Raises ValueError for another name."""
        choices = torch.zeros(levels_of(n), 3, dtype=torch.bool)
        if name not in ("identity", "bit-reversed", "cosine"):
            raise ValueError(f"permutation must be 'identity', 'bit-reversed' or 'cosine', got {name!r}")
        if name != "identity":
            choices[1:, 0] = True
        if name == "cosine":
            choices[0, [0, 2]] = True
        return cls(n, choices)

    @property
    def index(self) -> Tensor:
        """Where each number comes from, int64 `[n]`: the result is `x[..., index]`."""
        at = torch.arange(self.n, device=self.choices.device)
        for row, chosen in enumerate(self.choices.tolist()):
            for which in range(3):
                if chosen[which]:
                    at = _apply(at, self.n >> max(0, row - 1), which)
        return at

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index)


class RelaxedPermutation(nn.Module):
    """A mixture of these permutations that gradients flow through (Dao et al., 2019, section 3.2).

    Each choice has a logit; with p its sigmoid, a step gives `p S x + (1 - p) x` for what the step would do,
    S. The first row has three logits, all others share three, as in the authors' code: `logits [2, 3]`.
    `hard()` gives the permutation of the likelier choices. `sharpness` in [0, 1] says how far they are from
    one half, on average.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        levels_of(n)
        self.n = n
        self.logits = nn.Parameter(0.5 * torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return relaxed(x, self.logits)

    def hard(self) -> Permutation:
        own = (self.logits > 0).detach()
        return Permutation(self.n, torch.cat((own[:1], own[1:].expand(levels_of(self.n) - 1, -1))))

    @property
    def sharpness(self) -> float:
        return float((2 * self.logits.detach().sigmoid() - 1).abs().mean())


def relaxed(x: Tensor, logits: Tensor) -> Tensor:
    """The mixture of permutations of `x [..., n]`; leading axes of `logits [..., 2, 3]` broadcast."""
    chances, n = logits.sigmoid(), x.shape[-1]
    for row in range(levels_of(n)):
        for which in range(3):
            moved = _apply(x, n >> max(0, row - 1), which)
            x = x + chances[..., min(row, 1), which, None] * (moved - x)
    return x


def _apply(x: Tensor, size: int, which: int) -> Tensor:
    """One of the three steps in every block of a size."""
    blocks = x.unflatten(-1, (x.shape[-1] // size, size))
    if which == 0:
        moved = torch.cat((blocks[..., ::2], blocks[..., 1::2]), -1)
    else:
        first, second = blocks.chunk(2, -1)
        moved = torch.cat((first.flip(-1), second) if which == 1 else (first, second.flip(-1)), -1)
    return moved.flatten(-2)
