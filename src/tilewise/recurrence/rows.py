"""Sequences of any lengths as rows of whole chunks, each row behind what its open chunk already holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.recurrence.checks import check_offsets


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the tokens of S sequences stand in rows of `T = chunks * span` places.

    Row s is its open chunk, with `filled[s]` places for tokens of earlier calls, then `lengths[s]` new ones. Where
    all of that fits into one chunk, as in decoding, rows are only as long as the new tokens need: they begin at
    place `start` and their one chunk spans fewer places.

    Attributes:
        tokens: int64 `[S, T]`, the token at each place, counted through the batch; -1 where no new one stands.
        filled, lengths: int64 `[S]`. chunk: tokens of a chunk. span: places of one in these rows. start: the place
            in the open chunk that rows begin at. shape: (B, N) of the batch.
    """

    tokens: Tensor
    filled: Tensor
    lengths: Tensor
    chunk: int
    span: int
    start: int
    shape: tuple[int, int]

    @classmethod
    def of(
        cls, x: Tensor, count: Tensor | None, chunk: int, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Rows:
        """Rows of the batch `x [B, N, ...]`; `count [S]` tokens were read before it (None: none).

        Raises ValueError and TypeError for a mask or offsets that do not fit, and for a state of other sequences.
        """
        b, n = x.shape[:2]
        offsets = check_offsets(cu_seqlens, mask, x.unsqueeze(1))
        if offsets is not None:
            lengths = offsets[1:] - offsets[:-1]
        else:
            lengths = torch.full((b,), n, device=x.device) if mask is None else mask.sum(1)
        filled = torch.zeros_like(lengths) if count is None else count.to(x.device) % chunk
        if filled.shape != lengths.shape:
            raise ValueError(f"state must hold {lengths.shape[0]} sequences, got {filled.shape[0]}")
        start, stop = 0, 0
        if len(lengths):
            start, stop = int(filled.min()), int((filled + lengths).max())
        if stop > chunk:
            start, stop = 0, -(-stop // chunk) * chunk
        within = torch.arange(start, stop, device=x.device) - filled.unsqueeze(1)
        real = (within >= 0) & (within < lengths.unsqueeze(1))
        within = within.clamp(0, max(n - 1, 0))
        if offsets is not None:
            places = within + offsets[:-1].unsqueeze(1)
        else:
            if mask is not None and n:  # a row's tokens first, its padding behind them
                within = (~mask).long().argsort(dim=1, stable=True).gather(1, within)
            places = within + n * torch.arange(b, device=x.device).unsqueeze(1)
        span = min(chunk, stop - start)
        return cls(places.masked_fill(~real, -1), filled, lengths, chunk, span, start, (b, n))

    @property
    def chunks(self) -> int:
        """Chunks of the longest row, begun ones included."""
        return self.tokens.shape[1] // self.span if self.span else 0

    @property
    def real(self) -> Tensor:
        """Bool `[S, T]`: a new token stands here."""
        return self.tokens >= 0

    @property
    def ends(self) -> Tensor:
        """Int64 `[S]`: tokens of the open chunk and behind it, old and new."""
        return self.filled + self.lengths

    @property
    def places(self) -> Tensor:
        """Int64 `[T]`: counted from the start of the open chunk."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) + self.start

    def take(self, x: Tensor) -> Tensor:
        """`[B, N, ...]` as `[S, T, ...]`, zeros where no new token stands."""
        flat = x.flatten(0, 1)
        if not flat.shape[0]:
            return x.new_zeros(*self.tokens.shape, *x.shape[2:])
        return flat[self.tokens.clamp(min=0)].masked_fill(~_like(self.real, x), 0)

    def put(self, y: Tensor) -> Tensor:
        """The reverse: `[S, T, ...]` as `[B, N, ...]`, zeros for padding."""
        flat = y.new_zeros(self.shape[0] * self.shape[1], *y.shape[2:])
        return flat.index_put((self.tokens[self.real],), y[self.real]).unflatten(0, self.shape)

    def whole(self, new: Tensor, kept: Tensor) -> Tensor:
        """`new [S, T, ...]` behind what was open, `kept [S, chunk, ...]`: whole chunks of `[S, ..., ...]`."""
        stop = self.start + new.shape[1]
        full = new.new_zeros(new.shape[0], -(-stop // self.chunk) * self.chunk, *new.shape[2:])
        parts = (full[:, : self.start], new, full[:, stop:])
        made = torch.cat(parts, 1)
        if not made.shape[1]:
            return made
        old = torch.arange(self.chunk, device=new.device) < self.filled.unsqueeze(1)
        first = torch.where(_like(old, new), kept.to(new.dtype), made[:, : self.chunk])
        return torch.cat((first, made[:, self.chunk :]), 1)

    def open(self, whole: Tensor, kept: Tensor) -> Tensor:
        """What is open behind these rows, `[S, chunk, ...]` with zeros behind it; `whole` is of `whole`."""
        if not whole.shape[1]:
            return kept.to(whole.dtype)
        # A row that ends with a full chunk has nothing open, and the places behind it need not exist.
        places = (self.ends // self.chunk * self.chunk).unsqueeze(1) + torch.arange(
            self.chunk, device=whole.device
        )
        used = places < self.ends.unsqueeze(1)
        found = whole.take_along_dim(_like(places.clamp(max=whole.shape[1] - 1), whole), 1)
        return found.masked_fill(~_like(used, whole), 0)


def _like(x: Tensor, other: Tensor) -> Tensor:
    """`[S, T]` as `[S, T, 1, ...]`."""
    return x.view(*x.shape, *[1] * (other.ndim - 2))
