"""Staircase adaptive quantisation (SAQ): a cache of keys and values that loses bits as its tokens grow old."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.api import attend
from tilewise.tiles import Partial


@dataclass(frozen=True, eq=False)
class PackedBits:
    """A tensor in `bits` per entry, packed, in groups along its last axis that have a least value and a step each.

    Attributes:
        packed: uint8, the codes of all entries, without gaps but at the end.
        least, step: `[..., groups]`, in the dtype of the tensor; an entry is `least + step * code`.
        shape: of the tensor. bits: 1 to 8. group: entries per group, the last one shorter where it does not divide.
    """

    packed: Tensor
    least: Tensor
    step: Tensor
    shape: torch.Size
    bits: int
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in (self.packed, self.least, self.step))

    @classmethod
    def of(cls, x: Tensor, bits: int, group: int) -> PackedBits:
        """Each group spread evenly between its least and its largest entry, rounded to the nearest of 2^bits."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        missing = -x.shape[-1] % group
        padded = torch.cat([wide, wide[..., -1:].expand(*x.shape[:-1], missing)], -1)
        groups = padded.unflatten(-1, (-1, group))
        least, most = groups.amin(-1), groups.amax(-1)
        # Rounded to what is kept before codes are made, so that they make up for it where they can.
        step = ((most - least) / (2**bits - 1)).clamp(max=torch.finfo(x.dtype).max).to(x.dtype)
        least = least.to(x.dtype)
        width = step.to(wide.dtype).unsqueeze(-1)
        codes = (groups - least.to(wide.dtype).unsqueeze(-1)) / width.masked_fill(width == 0, 1)
        codes = codes.round().clamp(0, 2**bits - 1).flatten(-2)[..., : x.shape[-1]]
        return cls(_pack(codes.to(torch.uint8), bits), least, step, x.shape, bits, group)

    def dense(self) -> Tensor:
        """The tensor, as far as its bits tell, in its own dtype."""
        wide = torch.promote_types(self.least.dtype, torch.float32)
        codes = _unpack(self.packed, self.bits, self.shape.numel()).view(self.shape).to(wide)
        least, step = (
            x.to(wide).repeat_interleave(self.group, -1)[..., : self.shape[-1]]
            for x in (self.least, self.step)
        )
        most = torch.finfo(self.least.dtype).max  # which a rounded step may lead beyond
        return (least + step * codes).clamp(-most, most).to(self.least.dtype)


@dataclass(frozen=True, eq=False)
class StaircaseState:
    """What a `StaircaseCache` holds.

    Attributes:
        blocks: keys `[B, H_kv, D, block]` (so that a group is a channel's) and values `[B, H_kv, block, D]`, oldest
            first.
        k, v: the newest tokens, less than a block, as they came, `[B, H_kv, N', D]`.
    """

    blocks: tuple[tuple[PackedBits, PackedBits], ...]
    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        """Tokens held."""
        return sum(v.shape[2] for _, v in self.blocks) + self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held: packed codes, what their groups need, and the newest tokens."""
        newest = sum(x.numel() * x.element_size() for x in (self.k, self.v))
        return newest + sum(part.nbytes for pair in self.blocks for part in pair)

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of every block, oldest first."""
        return tuple(k.bits for k, _ in self.blocks)


@dataclass(frozen=True)
class StaircaseCache:
    """Staircase adaptive quantisation of keys and values (Li, 2024, arXiv 2410.18441), on KIVI's groups.

    New tokens are held as they come. When there are `block` of them they are quantised in `bits[0]` bits; with
    every further block they go down a stair, `bits[1]`, `bits[2]`, ..., and stay at the last. Going down means
    quantising anew what the finer bits still tell, as the original is gone. Keys are grouped per channel over
    `group` tokens, values per token over `group` channels (Liu et al., 2024, arXiv 2402.02750). Meant for
    multi-query attention, whose one kv head all queries read; any number of kv heads works.

    The state is the same however tokens come, one by one or many at once. One entry in `bits` is uniform
    quantisation, KIVI with a window of `block`. For inference: states take no gradient.

    Differs from the paper: blocks on the last stair are left as they are instead of quantised anew with every
    block, which would change nothing but roundings.

    Args:
        bits: of the stairs, each in 1..8, never rising.
        block: tokens per stair. group: entries that share a least value and a step.
    """

    bits: tuple[int, ...] = (8, 4, 2)
    block: int = 64
    group: int = 64

    def __post_init__(self) -> None:
        fits = isinstance(self.bits, tuple) and self.bits and all(b in range(1, 9) for b in self.bits)
        if not fits or any(after > before for before, after in zip(self.bits, self.bits[1:])):
            raise ValueError(f"bits must be a tuple of integers in 1..8 that never rise, got {self.bits!r}")
        for name, value in (("block", self.block), ("group", self.group)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    def append(self, state: StaircaseState | None, k: Tensor, v: Tensor) -> StaircaseState:
        """The state with more tokens: `k [B, H_kv, n, D]`, `v [B, H_kv, n, D_v]`; None for `state` starts anew.

        Raises ValueError for shapes or dtypes that do not fit each other or the state; `state` is not changed.
        """
        for name, x, other in (("k", k, v), ("v", v, k)):
            if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
                given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must be a floating tensor [B, H_kv, n, D], got {given}")
            if x.shape[:3] != other.shape[:3] or x.dtype != other.dtype:
                raise ValueError(
                    f"k and v must be [B, H_kv, n, *] alike, got {k.dtype} {list(k.shape)} and"
                    f" {v.dtype} {list(v.shape)}"
                )
        k, v = k.detach(), v.detach()
        if state is None:
            state = StaircaseState((), k[:, :, :0].clone(), v[:, :, :0].clone())
        for name, x, held in (("k", k, state.k), ("v", v, state.v)):
            if x.dtype != held.dtype or x.shape[:2] != held.shape[:2] or x.shape[3] != held.shape[3]:
                raise ValueError(
                    f"{name} must be {held.dtype} {[*held.shape[:2], 'n', held.shape[3]]} as before, got"
                    f" {x.dtype} {list(x.shape)}"
                )
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        blocks = state.blocks
        for start in range(0, k.shape[2] - self.block + 1, self.block):
            some = slice(start, start + self.block)
            blocks = (*self._down(blocks), self._quantised(k[:, :, some].mT, v[:, :, some], 0))
        rest = k.shape[2] // self.block * self.block
        return StaircaseState(blocks, k[:, :, rest:].clone(), v[:, :, rest:].clone())

    def read(self, state: StaircaseState) -> tuple[Tensor, Tensor]:
        """Keys `[B, H_kv, N, D]` and values `[B, H_kv, N, D_v]` of all tokens, in the dtype they came in."""
        k = [pair[0].dense().mT for pair in state.blocks]
        v = [pair[1].dense() for pair in state.blocks]
        return torch.cat([*k, state.k], 2), torch.cat([*v, state.v], 2)

    def attend(
        self,
        q: Tensor,
        state: StaircaseState,
        *,
        scale: float | None = None,
        engine: str = "auto",
        return_lse: bool = False,
    ) -> Tensor | Partial:
        """Causal attention of `q [B, H_q, n, D]`, the last n tokens of the state, over what it holds of them.

        Other arguments and the result as in `tilewise.attend`.
        """
        k, v = self.read(state)
        return attend(q, k, v, mask="causal", scale=scale, engine=engine, return_lse=return_lse)

    def _down(self, blocks: tuple) -> tuple:
        """Every block one stair older; only those whose bits change are touched."""
        moved = []
        for age, pair in enumerate(reversed(blocks)):  # the newest goes from stair 0 to stair 1
            stair = min(age + 1, len(self.bits) - 1)
            if pair[0].bits != self.bits[stair]:
                pair = self._quantised(pair[0].dense(), pair[1].dense(), stair)
            moved.append(pair)
        return tuple(reversed(moved))

    def _quantised(self, k: Tensor, v: Tensor, stair: int) -> tuple[PackedBits, PackedBits]:
        """Keys `[B, H_kv, D, block]` and values `[B, H_kv, block, D]` in the bits of a stair."""
        bits = self.bits[stair]
        groups = min(self.group, self.block), min(self.group, v.shape[3])
        return PackedBits.of(k, bits, groups[0]), PackedBits.of(v, bits, groups[1])


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits, any shape, as one string of bits in uint8."""
    places = torch.arange(bits, device=codes.device)
    string = ((codes.flatten().unsqueeze(1) >> places) & 1).flatten()
    string = torch.cat([string, string.new_zeros(-len(string) % 8)]).view(-1, 8)
    return (string << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of a string of bits, int64."""
    string = ((packed.unsqueeze(1) >> torch.arange(8, device=packed.device)) & 1).flatten()
    codes = string[: count * bits].view(count, bits) << torch.arange(bits, device=packed.device)
    return codes.sum(1)
