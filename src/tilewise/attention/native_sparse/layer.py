"""Native sparse attention as a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tilewise.attention.api import attend, attend_tiles
from tilewise.attention.native_sparse.compression import BlockMLP, choose, overlaps
from tilewise.tiles import Causal, TileMap, Tiling, Window
from tilewise.tiles.visibility import to_heads

BRANCHES = ("compressed", "selected", "sliding")


class NativeSparseAttention(nn.Module):
    """Native sparse attention, NSA (Yuan et al., 2025, arXiv 2502.11089), in the loop order of FSA (2508.18224).

    Causal. Every query attends three times, and learned gates in (0, 1) weigh the answers, head by head:

    compressed   to one key and value for every whole block of `length` tokens, made by a `BlockMLP`
    selected     to the tokens of `top_n` blocks of `block` tokens: the first one, the two last ones and those in
                 which the weights of the compressed branch, summed over the query heads of a group, are largest
    sliding      to the last `window` tokens, itself included

    Each branch has keys and values of its own. The heads of a group read the same blocks. All three run through the
    tile operator, forward and backward; the choice has no gradient, the compression learns from its own branch.
    Selected blocks are read key block by key block, see `loop_costs`.

    Differs from the paper: the compression starts as a mean (see `BlockMLP`); gates are a linear map of the input,
    where the paper writes MLP. Rotary positions are the caller's: rotate between `project` and `attend`.

    Args:
        dim: of the input and output. heads, kv_heads, head_dim: of the attention.
        length, stride: of compressed blocks. block: tokens of a selection block; stride divides both.
        top_n: blocks read, the forced ones included. window: tokens of the sliding branch.
        hidden: width of the compression's hidden layer, None is head_dim.

    Raises ValueError for sizes below 1 and for such as do not divide.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, *,
        length: int = 32, stride: int = 16, block: int = 64, top_n: int = 16, window: int = 512,
        hidden: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"dim": dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "length": length,
                 "stride": stride, "block": block, "top_n": top_n, "window": window}  # fmt: skip
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if length % stride or block % stride:
            raise ValueError(f"stride must divide length and block, got {stride}, {length} and {block}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.block, self.top_n, self.window = block, top_n, window
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, 2 * len(BRANCHES) * kv_heads * head_dim, bias=False)
        self.gates = nn.Linear(dim, len(BRANCHES) * heads)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.compress_k, self.compress_v = (
            BlockMLP(kv_heads, head_dim, length, stride, hidden) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim] -> [B, N, dim]`."""
        return self.out(self.attend(*self.project(x)).transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Queries `[B, H_q, N, D]`, keys and values of each branch `[B, H_kv, N, D]`, gates `[B, H_q, N, 3]`."""
        q = self.q(x).unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)
        both = self.kv(x).unflatten(2, (2, len(BRANCHES), self.kv_heads, self.head_dim))
        keys, values = both.permute(2, 3, 0, 4, 1, 5)
        gates = self.gates(x).sigmoid().unflatten(2, (self.heads, len(BRANCHES))).transpose(1, 2)
        return q, tuple(keys), tuple(values), gates

    def attend(self, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], gates: Tensor) -> Tensor:
        """The gated sum of the branches, `[B, H_q, N_q, D]`.

        Queries are the last N_q of the N_k positions, so chunks and single steps of decoding need no other call:
        keys and values, as `project` gives them, are the only state.
        """
        for name, x in (("keys", keys), ("values", values)):
            if len(x) != len(BRANCHES):
                raise ValueError(f"{name} must be three tensors, one for each branch, got {len(x)}")
        parts = self.branches(q, keys, values)
        return sum(
            (part * gate for part, gate in zip(parts, gates.split(1, -1), strict=True)), start=q.new_zeros(())
        )

    def branches(self, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What each branch gives before its gate: three tensors `[B, H_q, N_q, D]`."""
        index, compressed = self._choose(q, keys[0], values[0])
        sliding = attend(q, keys[2], values[2], mask=Causal() & Window(self.window - 1, 0))
        selected = attend_tiles(q, keys[1], values[1], self.tiles(index, keys[1].shape[2]), mask="causal")
        return compressed, cast(Tensor, selected), cast(Tensor, sliding)

    def choose(self, q: Tensor, keys: Sequence[Tensor]) -> Tensor:
        """The blocks each query reads, int64 `[B, H_kv, N_q, W]`, -1 for none; see `branches` for the arguments."""
        return self._choose(q, keys[0], keys[0])[0]

    def tiles(self, index: Tensor, n_k: int) -> TileMap:
        """Chosen blocks as a tile map with tiles one query high."""
        blocks = -(-n_k // self.block)
        keep = torch.zeros(*index.shape[:3], blocks + 1, dtype=torch.bool, device=index.device)
        keep.scatter_(3, index.masked_fill(index < 0, blocks), True)
        return TileMap(to_heads(keep[..., :blocks], self.heads), Tiling(1), Tiling(self.block))

    def _choose(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The choice, and the compressed branch whose weights it is made from."""
        n_q, n_k, scale = q.shape[2], k.shape[2], 1 / math.sqrt(self.head_dim)
        ends = self.compress_k.ends(n_k, q.device)
        keys, values = self.compress_k(k), self.compress_v(v)
        places = torch.arange(n_k - n_q, n_k, device=q.device)
        out, lse = attend(q, keys, values, mask=Causal().at(places, ends), return_lse=True)
        compress = self.compress_k
        share = overlaps(
            compress.length, compress.stride, self.block, -(-n_k // self.block), len(ends), q.device
        )
        with torch.no_grad():
            index = choose(q, keys, lse, ends, share, self.block, self.top_n, n_k, scale)
        return index, out
