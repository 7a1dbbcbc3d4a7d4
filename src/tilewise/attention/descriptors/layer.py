"""The attention layer over descriptors, at once or chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tilewise.attention.api import attend
from tilewise.attention.descriptors.compression import Compression, Described
from tilewise.attention.descriptors.frames import rotate
from tilewise.attention.descriptors.mask import ChunkMemory


@dataclass(frozen=True, eq=False)
class DescriptorState:
    """What descriptor attention keeps of the frames it has seen; never changed, so any chunk can be taken again.

    Attributes:
        keys, values: `[B, H_kv, M, D]`, of the retained descriptors, normalised and rotated.
        count: float32 `[M]`, how many patches each stands for.
        frames: frames seen. grid: rows and columns of their patches. compression: how they were compressed.
    """

    keys: Tensor
    values: Tensor
    count: Tensor
    frames: int
    grid: tuple[int, int]
    compression: Compression

    @property
    def length(self) -> int:
        """Tokens kept."""
        return self.keys.shape[2]

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.count))


Kept = tuple[Tensor, Tensor, Tensor]  # keys, values, counts


class DescriptorAttention(nn.Module):
    """Attention of all image tokens to descriptors of all images (FlashVGGT, arXiv 2512.01540; CVPR 2026).

    Takes the place of attention over all tokens of all images, as in VGGT: queries are the tokens of S frames, keys
    and values the much fewer tokens that `Compression` leaves of them. Scores fall by about `ratio^2`. Descriptors
    are resampled before projection, rotated by their places in the frame, and attended to by `tilewise.attend`.

    Three forms: `forward(x, grid)`, every frame sees every descriptor; `forward(x, grid, chunk=n)`, frames see
    their own chunk of n frames and what is retained of earlier ones; `step`, the same chunk by chunk with a state.
    `chunk=1` with `retain=1` is the causal attention of the paper's second training stage.

    Parameters are named and laid out as in VGGT's attention blocks, so that their weights load (`kv_heads` None).

    Differs from the paper: memory holds keys and values, not tokens that every chunk projects again; the frames
    retained are those whose number in the sequence `retain` divides, where the paper counts anew in each chunk (the
    same when `retain` divides chunks); a chunk sees all its own descriptors, as in the paper's equation, where the
    authors' code shows it the retained ones alone; in causal training the reference frame is seen, which the
    authors' mask hides; k-means is not random, and never finds frame 0 again.

    Args:
        dim: width of tokens. heads: query heads. compression: how frames become descriptors.
        kv_heads: key and value heads, a divisor of `heads`; None is `heads`.
        qk_norm: LayerNorm on queries and keys of each head. rope: base of the rotation, None for none.
        engine: of `tilewise.attend`.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        compression: Compression | None = None,
        *,
        kv_heads: int | None = None,
        qk_norm: bool = True,
        rope: float | None = 100.0,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        for name, value in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if dim % heads or heads % kv_heads:
            raise ValueError(f"heads {heads} must divide dim {dim} and be a multiple of kv_heads {kv_heads}")
        if rope is not None and (dim // heads % 4 or not rope > 0):
            raise ValueError(
                f"rope needs a base > 0 and a head_dim in multiples of 4, got {rope!r}, {dim // heads}"
            )
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, dim // heads
        self.compression = Compression() if compression is None else compression
        self.rope, self.engine = rope, engine
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, rope={self.rope}, {self.compression}"

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        *,
        chunk: int | None = None,
        keyframes: Tensor | None = None,
    ) -> Tensor:
        """`x [B, S, special + H * W, dim]` of S frames to the same shape.

        Args:
            grid: (H, W). chunk: frames per chunk, None for one of all frames.
            keyframes: int64 `[n]` or `[B, n]`, frames to keep whole besides the first; None finds them by
                clustering, and takes none in chunks, as clusters look ahead.

        Raises ValueError, TypeError: for arguments that do not fit.
        """
        self._check(x, grid)
        if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"chunk must be None or an integer >= 1, got {chunk!r}")
        whole = self.compression.whole_frames(x, 0, keyframes, cluster=chunk is None)
        described = self.compression.describe(x, grid, whole)
        k, v = self._keys(described)
        mask = None
        if chunk is not None:
            of_query = torch.arange(x.shape[1], device=x.device).repeat_interleave(x.shape[2]) // chunk
            of_key = described.frame.unsqueeze(1) // chunk
            retained = torch.zeros_like(described.count, dtype=torch.bool).index_fill(
                0, described.staying, True
            )
            mask = ChunkMemory(of_query, of_key, retained)
        return self._attend(x, grid, k, v, described.count, mask)

    def step(
        self,
        x: Tensor,
        grid: tuple[int, int],
        state: DescriptorState | None = None,
        *,
        keyframes: Tensor | None = None,
    ) -> tuple[Tensor, DescriptorState]:
        """The next chunk of frames, `x [B, S, special + H * W, dim]`, and the state after it.

        `keyframes` are numbers within this chunk. Equals `forward` over all frames with `chunk` if all chunks but
        the last have that length.
        Raises as `forward`, and ValueError for a state of other frames: batch, heads, grid, compression, dtype.
        """
        self._check(x, grid)
        first = 0 if state is None else state.frames
        whole = self.compression.whole_frames(x, first, keyframes, cluster=False)
        new = self.compression.describe(x, grid, whole, first=first)
        k, v = self._keys(new)
        now = (k, v, new.count)
        held = (k[:, :, :0], v[:, :, :0], new.count[:0]) if state is None else self._held(state, grid, k)
        out = self._attend(x, grid, *_join(held, now), None)
        stays = (k.index_select(2, new.staying), v.index_select(2, new.staying), new.count[new.staying])
        later = DescriptorState(*_join(held, stays), first + x.shape[1], (grid[0], grid[1]), self.compression)
        return out, later

    def _held(self, state: DescriptorState, grid: tuple[int, int], k: Tensor) -> Kept:
        """What `state` holds, if it is of frames like these."""
        have = (tuple(state.grid), state.compression, state.keys.dtype, state.keys.device)
        want = (tuple(grid), self.compression, k.dtype, k.device)
        for name, old, new in zip(("grid", "compression", "dtype", "device"), have, want):
            if old != new:
                raise ValueError(f"the state holds descriptors of {name} {old}, this chunk has {new}")
        sizes = [(*x.shape[:2], x.shape[3]) for x in (state.keys, state.values, k)]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"the state holds [B, H_kv, M, D] with (B, H_kv, D) {sizes[0]}, this chunk has {sizes[2]}"
            )
        return state.keys, state.values, state.count

    def _check(self, x: Tensor, grid: tuple[int, int]) -> None:
        self.compression.coarse(grid)
        per = self.compression.special + grid[0] * grid[1]
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[2:] != (per, self.dim):
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be [B, S, {per}, {self.dim}] for grid {grid}, got {given}")

    def _keys(self, described: Described) -> tuple[Tensor, Tensor]:
        rows = self.heads * self.head_dim
        kv = nn.functional.linear(described.tokens, self.qkv.weight[rows:], self.qkv.bias[rows:])
        k, v = kv.unflatten(-1, (2, self.kv_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self._rotate(self.k_norm(k), described.places), v

    def _attend(self, x, grid, k, v, count, mask) -> Tensor:
        b, s, per, _ = x.shape
        rows = self.heads * self.head_dim
        q = nn.functional.linear(x.flatten(1, 2), self.qkv.weight[:rows], self.qkv.bias[:rows])
        q = q.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        fine = self.compression.places(grid, x.device)[0]
        places = torch.cat([fine.new_zeros(self.compression.special, 2), fine]).repeat(s, 1).unsqueeze(0)
        q = self._rotate(self.q_norm(q), places)
        bias = count.log().to(q.dtype).view(1, 1, 1, -1) if self.compression.weigh else None
        out = cast(Tensor, attend(q, k, v, mask=mask, bias=bias, engine=self.engine))
        return self.proj(out.transpose(1, 2).flatten(2)).view(b, s, per, self.dim)

    def _rotate(self, x: Tensor, places: Tensor) -> Tensor:
        return x if self.rope is None else rotate(x, places, self.rope)


def _join(before: Kept, after: Kept) -> Kept:
    """Keys, values and counts one after the other."""
    return (
        torch.cat([before[0], after[0]], 2),
        torch.cat([before[1], after[1]], 2),
        torch.cat([before[2], after[2]]),
    )
