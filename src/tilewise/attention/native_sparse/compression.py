"""Keys and values compressed block by block, and which blocks the attention over them finds important."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewise.attention.scores import AT_ONCE, grouped


class BlockMLP(nn.Module):
    """Blocks of `length` tokens, one every `stride`, each turned into one token: NSA's compression.

    A block, with a learned vector added for every place in it, goes through an MLP with one hidden layer; the mean
    of the block is added to the result, whose last layer is 0 at the start, so that training sets out from means.
    One MLP for all heads; the vectors differ by head.

    Args:
        heads: kv heads. head_dim: D. length: tokens in a block. stride: tokens between the first ones of two
            neighbours, a divisor of `length`; smaller ones overlap. hidden: width of the hidden layer, None is D.

    Shapes: `[B, heads, N, D] -> [B, heads, M, D]`, M = max(0, (N - length) // stride + 1): only whole blocks.
    """

    def __init__(
        self, heads: int, head_dim: int, length: int, stride: int, hidden: int | None = None
    ) -> None:
        super().__init__()
        if stride < 1 or length < 1 or length % stride:
            raise ValueError(f"length must be a multiple of stride >= 1, got {length!r} and {stride!r}")
        hidden = head_dim if hidden is None else hidden
        if heads < 1 or head_dim < 1 or hidden < 1:
            raise ValueError(f"heads, head_dim and hidden must be >= 1, got {heads}, {head_dim}, {hidden}")
        self.length, self.stride = length, stride
        self.places = nn.Parameter(torch.zeros(heads, length, head_dim))
        self.first, self.last = nn.Linear(length * head_dim, hidden), nn.Linear(hidden, head_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def count(self, n: int) -> int:
        """Blocks of a sequence of `n` tokens."""
        return max(0, (n - self.length) // self.stride + 1)

    def ends(self, n: int, device: torch.device) -> Tensor:
        """The position of each block's last token, int64 `[M]`: queries before it do not see the block."""
        return torch.arange(self.count(n), device=device) * self.stride + (self.length - 1)

    def forward(self, x: Tensor) -> Tensor:
        b, heads, n, d = x.shape
        if not self.count(n):
            return x.new_zeros(b, heads, 0, d)
        blocks = x.unfold(2, self.length, self.stride).mT + self.places.unsqueeze(1)  # [b, h, M, length, d]
        made = self.last(nn.functional.gelu(self.first(blocks.flatten(3))))
        return blocks.mean(3) + made


def overlaps(length: int, stride: int, block: int, blocks: int, count: int, device: torch.device) -> Tensor:
    """In how many strides each of `count` compressed blocks lies within each of `blocks` selection blocks.

    float32 `[count, blocks]`. With it the weights of compressed blocks become those of selection blocks: NSA's sum
    over m < block / stride and n < length / stride of the weight of compressed block `j block / stride + m - n`.
    """
    own = torch.arange(count, device=device).unsqueeze(1)
    first = torch.arange(blocks, device=device) * (block // stride)
    end = torch.minimum(own + length // stride, first + block // stride)
    return (end - torch.maximum(own, first)).clamp(min=0).float()


def choose(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    ends: Tensor,
    share: Tensor,
    block: int,
    top_n: int,
    n_k: int,
    scale: float,
) -> Tensor:
    """The blocks each query reads, int64 `[B, H_kv, N_q, W]`, -1 for none, W = min(top_n, blocks); no gradient.

    Weights of the attention over compressed keys, mapped to selection blocks by `share [M, T]` and summed over the
    query heads of a group. The first block and the two last ones that a query sees are always among the choice.

    Args:
        q: `[B, H_q, N_q, D]`, the last of n_k positions. keys: compressed, `[B, H_kv, M, D]`; lse: of the
            attention over them, `[B, H_q, N_q]`. ends: `[M]`, position of each one's last token.
    """
    b, heads, n_q, _ = q.shape
    kv_heads, (_, blocks), out = keys.shape[1], share.shape, []
    starts, wide = torch.arange(blocks, device=q.device), torch.promote_types(q.dtype, torch.float32)
    step = max(1, AT_ONCE // max(1, b * heads * max(keys.shape[2], blocks)))
    for first in range(0, n_q, step):
        some = slice(first, min(first + step, n_q))
        places = torch.arange(some.start, some.stop, device=q.device).unsqueeze(1) + (n_k - n_q)
        logits = grouped(q[:, :, some] * scale, keys).to(wide)
        weights = (logits - lse[:, :, some].unsqueeze(-1)).exp().masked_fill(ends > places, 0)
        shared = weights.unflatten(1, (kv_heads, heads // kv_heads)).sum(2)
        importance = shared @ share.to(shared.dtype)  # [b, h_kv, rows, blocks]
        own = places // block
        forced = (starts == 0) | (starts == own) | (starts == own - 1)
        importance = importance.masked_fill(forced, torch.inf).masked_fill(starts > own, -torch.inf)
        best, index = importance.topk(min(top_n, blocks), -1)
        out.append(index.masked_fill(best == -torch.inf, -1))
    if not out:
        return torch.zeros(b, kv_heads, 0, min(top_n, blocks), dtype=torch.int64, device=q.device)
    return torch.cat(out, 2)
