"""Tile maps: which tiles of the attention matrix are paid for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilewise.tiles.tiling import Tiling
from tilewise.tiles.visibility import NONE, Visibility, to_heads


def cut(n_q: int) -> tuple[int, int]:
    """The usual tile for `n_q` queries: 128 x 128, no higher than there are queries."""
    return min(max(n_q, 1), 128), 128


@dataclass(frozen=True, eq=False)
class TileMap:
    """The tiles to compute: `keep` bool `[B|1, H|1, T_q, T_k]` over a tiling of queries and one of keys.

    Tiles that the mask hides are never computed, whatever the map says of them.
    """

    keep: Tensor
    q_tiling: Tiling
    k_tiling: Tiling

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Tensor) or self.keep.dtype != torch.bool or self.keep.ndim != 4:
            given = (
                f"{self.keep.dtype} {list(self.keep.shape)}"
                if isinstance(self.keep, Tensor)
                else type(self.keep)
            )
            raise TypeError(f"a tile map must be bool [B|1, H|1, T_q, T_k], got {given}")

    @classmethod
    def from_mask(cls, mask: Tensor, tile: tuple[int, int] = (128, 128)) -> TileMap:
        """A map from a boolean `[B|1, H|1, T_q, T_k]`; `tile` is (queries, keys) per tile.

        Raises TypeError when `mask` is not such a tensor, ValueError for tile sizes below 1.
        """
        if len(tile) != 2:
            raise ValueError(f"tile must be (queries, keys), got {tile!r}")
        return cls(mask, Tiling(tile[0]), Tiling(tile[1]))

    @classmethod
    def everything(
        cls, n_q: int, n_k: int, device: torch.device | str | None = None, tile: tuple[int, int] | None = None
    ) -> TileMap:
        """Every tile of `n_q` queries by `n_k` keys; by default tiles of 128, lower where there are few queries."""
        made = cls.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), tile or cut(n_q))
        count = made.q_tiling.count(n_q), made.k_tiling.count(n_k)
        return replace(made, keep=made.keep.expand(1, 1, *count))

    def check(self, batch: int, heads: int, n_q: int, n_k: int, kv_heads: int | None = None) -> None:
        """Raise ValueError unless the map fits these sizes."""
        self.q_tiling.check(n_q, "query", batch, heads)
        self.k_tiling.check(n_k, "key", batch, heads if kv_heads is None else kv_heads)
        want = (batch, heads, self.q_tiling.count(n_q), self.k_tiling.count(n_k))
        for axis, (have, need) in enumerate(zip(self.keep.shape, want)):
            if have != need and not (axis < 2 and have == 1):
                raise ValueError(
                    f"tile map is {list(self.keep.shape)}, but {n_q} queries by {n_k} keys need {list(want)}"
                    " (batch and heads may be 1)"
                )

    def cost(self, view: Visibility) -> tuple[Tensor, Tensor]:
        """Scores computed and scores in visible tiles, each `[B|1, H|1]` float64; their ratio is the density.

        `view` is in the order in which the map's tiles are cut.
        """
        n_q, n_k = view.q_pos.shape[2], view.k_pos.shape[2]
        seen = view.tiles(self.q_tiling, self.k_tiling) != NONE
        device = self.keep.device
        heights = self.q_tiling.sizes(n_q, device).double()
        widths = self.k_tiling.sizes(n_k, device).double()
        heads = max(self.keep.shape[1], seen.shape[1])
        seen, keep = to_heads(seen, heads), to_heads(self.keep, heads)
        area = to_heads(heights, heads).unsqueeze(-1) * to_heads(widths, heads).unsqueeze(-2)
        return (area * (keep & seen)).sum((-1, -2)), (area * seen).sum((-1, -2))
