"""A tiling: the cut of one sequence axis into consecutive tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


def to_heads(x: Tensor, heads: int) -> Tensor:
    """Metadata `[b, h, ...]` of kv heads repeated to `heads` query heads; h of 1 or `heads` stays as it is."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


@dataclass(frozen=True, eq=False)
class Tiling:
    """Consecutive tiles of a sequence: all `size` tokens long (the last may be shorter), or given by `bounds`.

    Args:
        size: tokens in a tile; with `bounds`, tokens in the longest tile.
        bounds: int64 `[T + 1]` or `[B|1, H|1, T + 1]`, non-decreasing, first 0, last the sequence length. Tiles
            may be empty and may differ by batch entry and head (clusters of different sizes).

    A tiling without bounds fits any length, so it can be named before the sequence is known.
    """

    size: int
    bounds: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"tile size must be an integer >= 1, got {self.size!r}")

    @classmethod
    def from_bounds(cls, bounds: Tensor) -> Tiling:
        """The tiling with the given bounds, checked. Raises ValueError for bounds that are no tiling."""
        if bounds.dtype != torch.int64 or bounds.ndim not in (1, 3) or bounds.shape[-1] < 1:
            raise ValueError(
                f"bounds must be int64 [T+1] or [B, H, T+1], got {bounds.dtype} {list(bounds.shape)}"
            )
        bounds = bounds.reshape((1,) * (3 - bounds.ndim) + bounds.shape)
        sizes = bounds.diff(dim=-1)
        if bool((bounds[..., 0] != 0).any()) or bool((sizes < 0).any()):
            raise ValueError("bounds must start at 0 and never decrease")
        return cls(max(1, int(sizes.max()) if sizes.numel() else 1), bounds)

    def count(self, n: int) -> int:
        """How many tiles a sequence of `n` tokens has."""
        return -(-n // self.size) if self.bounds is None else self.bounds.shape[-1] - 1

    def check(self, n: int, axis: str, batch: int, heads: int) -> None:
        """Raise ValueError unless this tiling covers exactly `n` tokens of so many batch entries and heads."""
        if self.bounds is not None:
            b, h = self.bounds.shape[:2]
            if b not in (1, batch) or h not in (1, heads):
                raise ValueError(
                    f"{axis} tiling has batch {b} and {h} heads, the call has {batch} and {heads}"
                )
        if self.bounds is not None and bool((self.bounds[..., -1] != n).any()):
            ends = self.bounds[..., -1].unique().tolist()
            raise ValueError(f"{axis} tiling ends at {ends}, but the sequence has {n} tokens")

    def ids(self, n: int, device: torch.device | str) -> Tensor:
        """The tile every token lies in: int64 `[1|B, 1|H, n]`."""
        tokens = torch.arange(n, device=device)
        if self.bounds is None:
            return (tokens // self.size).view(1, 1, n)
        bounds = self.bounds.to(device)
        tokens = tokens.expand(*bounds.shape[:2], n).contiguous()
        return torch.searchsorted(bounds[..., 1:].contiguous(), tokens, right=True)

    def split(self, x: Tensor, fill: float | int) -> Tensor:
        """Cut `x [B, H, N, ...]` into `[B, H, T, size, ...]`; slots past a tile's end hold `fill`.

        Without bounds and when `size` divides N this is a view.
        """
        n = x.shape[2]
        tiles = self.count(n)
        if self.bounds is None:
            missing = tiles * self.size - n
            if torch.compiler.is_compiling() or missing:  # a branch on lengths would compile again for each
                x = pad(x, (0, 0) * (x.ndim - 3) + (0, missing), value=fill)
            return x.unflatten(2, (tiles, self.size))
        bounds = self.bounds.to(x.device)
        if not n:
            heads = max(x.shape[1], bounds.shape[1])
            return x.new_full((max(x.shape[0], bounds.shape[0]), heads, tiles, self.size, *x.shape[3:]), fill)
        slots = bounds[..., :-1, None] + torch.arange(self.size, device=x.device)  # [b, h, T, size]
        beyond = slots >= bounds[..., 1:, None]
        b, h = max(x.shape[0], slots.shape[0]), max(x.shape[1], slots.shape[1])
        x, slots, beyond = (to_heads(y, h) for y in (x, slots, beyond))
        x = x.expand(b, h, *x.shape[2:])
        slots = slots.clamp(max=n - 1).expand(b, h, -1, -1)
        index = slots.reshape(b, h, -1, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:])
        out = x.gather(2, index).unflatten(2, (tiles, self.size))
        beyond = beyond.reshape(*beyond.shape, *[1] * (x.ndim - 3))
        return out.masked_fill(beyond, fill)

    def join(self, x: Tensor, n: int) -> Tensor:
        """Undo `split`: `[B, H, T, size, ...]` to `[B, H, n, ...]`."""
        flat = x.flatten(2, 3)
        if self.bounds is None:
            return flat[:, :, :n]
        own = self.ids(n, x.device)
        first = self.bounds.to(x.device)[..., :-1].expand(*own.shape[:2], -1).gather(2, own)
        place = own * self.size + torch.arange(n, device=x.device) - first  # [b, h, n]
        place = to_heads(place, x.shape[1]).expand(*x.shape[:2], n)
        return flat.gather(
            2, place.reshape(*place.shape, *[1] * (x.ndim - 4)).expand(-1, -1, -1, *x.shape[4:])
        )

    def sizes(self, n: int, device: torch.device | str) -> Tensor:
        """Tokens in each tile: int64 `[1|B, 1|H, T]`."""
        if self.bounds is not None:
            return self.bounds.to(device).diff(dim=-1)
        starts = torch.arange(self.count(n), device=device) * self.size
        return (n - starts).clamp(max=self.size).view(1, 1, -1)

    def mean(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean of `x [B, H, N, D]` over each tile, in at least float32, and the number of tokens it is made of.

        `keep [B|1, H|1, N]` leaves tokens out (padding). Returns `[B, H, T, D]` and `[B|1, H|1, T]`; a tile
        with no tokens has mean 0 and count 0.
        """
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        if keep is None:
            counts = self.sizes(x.shape[2], x.device)
        else:
            x = x.masked_fill(~keep.unsqueeze(-1), 0)  # what is left out may be NaN
            counts = self.split(keep.to(torch.int64), 0).sum(-1)
        total = self.split(x, 0).sum(3, dtype=dtype)
        return total / counts.clamp(min=1).unsqueeze(-1), counts
