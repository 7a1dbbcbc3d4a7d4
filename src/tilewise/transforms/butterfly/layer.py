"""ButterflyLinear: a linear layer of O(n log n) numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.transforms.butterfly.factors import multiply, random_twiddle
from tilewise.transforms.butterfly.permutation import Permutation


class ButterflyLinear(nn.Module):
    """A drop-in for `nn.Linear` whose matrix is butterfly products (Dao et al., 2019, arXiv 1903.05895).

    With n the power of two at or above `in_features`, the input is extended by zeros to n, goes through
    `ceil(out_features / n)` products side by side and is cut to `out_features`. Each product is `depth` times
    a fixed permutation and log2(n) untied real factors of 2n numbers. At depth 2 with bit reversal this is
    what the paper compresses hidden layers with; there the factors of a level are tied, and complex or real.
    We start from random rotations, which keep the length of every input, where the paper draws normal
    numbers.

    Args:
        in_features, out_features: any integers >= 1.
        bias: whether to add one.
        depth: how many products, one after the other.
        permutation: "bit-reversed" or "identity", before each of them.

    `forward`: `[..., in_features]` to `[..., out_features]`, in the parameters' dtype. Raises ValueError for
    settings or shapes that do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        depth: int = 2,
        permutation: str = "bit-reversed",
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("depth", depth)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if permutation not in ("bit-reversed", "identity"):
            raise ValueError(f"permutation must be 'bit-reversed' or 'identity', got {permutation!r}")
        self.in_features, self.out_features, self.depth = in_features, out_features, depth
        self.n = max(2, 1 << (in_features - 1).bit_length())
        self.stacks = -(-out_features // self.n)
        self.twiddle = nn.Parameter(random_twiddle(self.n, False, torch.float32, depth, self.stacks))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        order = Permutation.named(permutation, self.n).index if permutation != "identity" else None
        self.order: Tensor | None
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must be [..., {self.in_features}], got {list(x.shape)}")
        x = F.pad(x, (0, self.n - self.in_features)).unsqueeze(-2)
        for twiddle in self.twiddle:
            if self.order is not None:
                x = x.index_select(-1, self.order)
            x = multiply(twiddle, x, tied=False)
        x = x.flatten(-2)[..., : self.out_features]
        return x if self.bias is None else x + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, depth={self.depth}"
