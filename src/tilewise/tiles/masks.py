"""Masks: what may be seen, as a property of positions. `a & b` is their conjunction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilewise.tiles.visibility import Visibility


class Mask:
    """What a query may see of the keys. Subclasses narrow a `Visibility`; `&` joins two masks."""

    def narrow(self, view: Visibility) -> Visibility:
        """This mask applied on top of `view`."""
        raise TypeError(f"{type(self).__name__} does not say what it hides")

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def at(self, q_pos: Tensor | None = None, k_pos: Tensor | None = None) -> Mask:
        """This mask with tokens at given positions, int64 `[N]` or `[B|1, H|1, N]`; None keeps the usual ones."""
        return Placed(self, q_pos, k_pos)

    def bind(
        self,
        n_q: int,
        n_k: int,
        *,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Visibility:
        """This mask for `n_q` queries and `n_k` keys.

        Positions default to 0..n_k-1 for keys and the last n_q of them for queries (aligned bottom-right);
        given ones are int64 `[N]` or `[B|1, H|1, N]`. Raises ValueError for shapes that do not fit.
        """
        usual = q_pos is None and k_pos is None
        k_pos = _positions(k_pos, 0, n_k, device, "k_pos")
        q_pos = _positions(q_pos, n_k - n_q, n_q, device, "q_pos")
        view = self.narrow(Visibility.everything(q_pos, k_pos))
        if usual and (type(self) is Everything or (type(self) is Causal and n_q == 1)):
            return replace(view, simple="everything")
        if usual and type(self) is Causal and n_q == n_k:
            return replace(view, simple="causal")
        return view


@dataclass(frozen=True)
class Everything(Mask):
    """Every query sees every key."""

    def narrow(self, view: Visibility) -> Visibility:
        return view


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees keys at its own position and before."""

    def narrow(self, view: Visibility) -> Visibility:
        return view.limit(hi=view.q_pos)


@dataclass(frozen=True)
class Window(Mask):
    """A query sees keys at most `left` positions before it and at most `right` after it.

    Distances are inclusive: 0 is the query's own position alone, None is no limit on that side.
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("left", self.left), ("right", self.right)):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"window {name} must be None or an integer >= 0, got {value!r}")

    def narrow(self, view: Visibility) -> Visibility:
        lo = None if self.left is None else view.q_pos - self.left
        hi = None if self.right is None else view.q_pos + self.right
        return view.limit(lo, hi)


def sliding_window(size: int) -> Window:
    """The window meant by a Hugging Face `sliding_window=size`: the token itself and `size - 1` before it."""
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"sliding window size must be an integer >= 1, got {size!r}")
    return Window(size - 1, 0)


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Packed sequences: a query sees only keys of its own document.

    Args:
        cu_seqlens: int32 or int64 `[documents + 1]`, starts of the documents and the end of the last, in
            positions. Documents may be empty.
    """

    cu_seqlens: Tensor

    def __post_init__(self) -> None:
        cu = self.cu_seqlens
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64) or cu.ndim != 1:
            raise TypeError(
                f"cu_seqlens must be an int32 or int64 tensor [documents + 1], got {_describe(cu)}"
            )
        if len(cu) < 2 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()):
            raise ValueError("cu_seqlens must start at 0, never decrease and hold at least two entries")

    def narrow(self, view: Visibility) -> Visibility:
        cu = self.cu_seqlens.to(device=view.q_pos.device, dtype=torch.int64)
        checked = () if torch.compiler.is_compiling() else (("queries", view.q_pos), ("keys", view.k_pos))
        for name, pos in checked:
            if pos.numel() and int(pos.max()) >= int(cu[-1]):
                raise ValueError(
                    f"cu_seqlens ends at {int(cu[-1])}, but there are {name} up to {int(pos.max())}"
                )
        document = torch.searchsorted(cu[1:].contiguous(), view.q_pos.contiguous(), right=True)
        return view.limit(cu[document], cu[document + 1] - 1)


@dataclass(frozen=True)
class BlockCausal(Mask):
    """A query sees its own block of `block` positions and all blocks before it."""

    block: int

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block must be an integer >= 1, got {self.block!r}")

    def narrow(self, view: Visibility) -> Visibility:
        end = (torch.div(view.q_pos, self.block, rounding_mode="floor") + 1) * self.block - 1
        return view.limit(hi=end)


@dataclass(frozen=True)
class Prefix(Mask):
    """Prefix language model: everybody sees the first `length` positions; beyond them the mask is causal."""

    length: int

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 0:
            raise ValueError(f"prefix length must be an integer >= 0, got {self.length!r}")

    def narrow(self, view: Visibility) -> Visibility:
        return view.limit(hi=view.q_pos.clamp(min=self.length - 1))


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Hides padding, on either side: `keep [B, N_k]` bool or 0/1 integers, as tokenizers return it."""

    keep: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Tensor) or self.keep.ndim != 2 or self.keep.is_floating_point():
            raise TypeError(f"keep must be a bool or integer tensor [B, N_k], got {_describe(self.keep)}")

    def narrow(self, view: Visibility) -> Visibility:
        if self.keep.shape[1] != view.k_pos.shape[2]:
            raise ValueError(
                f"padding mask covers {self.keep.shape[1]} keys, but there are {view.k_pos.shape[2]}"
            )
        return view.hide(~self.keep.to(device=view.pos.device, dtype=torch.bool).unsqueeze(1))


@dataclass(frozen=True, eq=False)
class TokenMask(Mask):
    """Any boolean grid `[N_q, N_k]` or `[B|1, H|1, N_q, N_k]`; True = may be seen."""

    seen: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.seen, Tensor) or self.seen.dtype != torch.bool or self.seen.ndim not in (2, 4):
            raise TypeError(
                f"a mask tensor must be bool [N_q, N_k] or [B, H, N_q, N_k], got {_describe(self.seen)}"
            )

    def narrow(self, view: Visibility) -> Visibility:
        n_q, n_k = view.q_pos.shape[2], view.k_pos.shape[2]
        if self.seen.shape[-2:] != (n_q, n_k):
            raise ValueError(f"mask is for {list(self.seen.shape[-2:])} tokens, the call has {[n_q, n_k]}")
        return view.with_dense(self.seen[(None,) * (4 - self.seen.ndim)].to(view.pos.device))


@dataclass(frozen=True, eq=False)
class Placed(Mask):
    """A mask whose tokens stand at given positions (see `Mask.at`)."""

    mask: Mask
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None

    def narrow(self, view: Visibility) -> Visibility:
        raise ValueError("positions hold for a whole mask: write (a & b).at(...), not a & b.at(...)")

    def bind(
        self,
        n_q: int,
        n_k: int,
        *,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Visibility:
        q_pos, k_pos = (self.q_pos if q_pos is None else q_pos), (self.k_pos if k_pos is None else k_pos)
        return self.mask.bind(n_q, n_k, q_pos=q_pos, k_pos=k_pos, device=device)


@dataclass(frozen=True)
class Both(Mask):
    """What two masks both allow."""

    first: Mask
    second: Mask

    def narrow(self, view: Visibility) -> Visibility:
        return self.second.narrow(self.first.narrow(view))


def as_mask(mask: Mask | Tensor | str | None) -> Mask:
    """A mask from what callers may write: None (everything), "causal", a Mask, or a boolean tensor."""
    if mask is None:
        return Everything()
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, str):
        if mask == "causal":
            return Causal()
        raise ValueError(f"mask must be None, 'causal', a mask object or a tensor, got {mask!r}")
    if isinstance(mask, Tensor):
        return TokenMask(mask)
    raise TypeError(f"mask must be None, 'causal', a mask object or a tensor, got {type(mask).__name__}")


def _positions(given: Tensor | None, start: int, n: int, device, name: str) -> Tensor:
    if given is None:
        return torch.arange(start, start + n, device=device).view(1, 1, n)
    if given.dtype not in (torch.int32, torch.int64) or given.ndim not in (1, 3) or given.shape[-1] != n:
        raise ValueError(f"{name} must be integers [{n}] or [B, H, {n}], got {_describe(given)}")
    return given.to(device=device, dtype=torch.int64).reshape((1,) * (3 - given.ndim) + given.shape)


def _describe(value) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
