"""Sequences of unlike lengths, packed or padded, as a few batches of like ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def sequences(mask: Tensor | None, offsets: Tensor | None, n: int) -> list[Tensor]:
    """Places of the tokens of each sequence, counted through the batch `[B, N]`."""
    if offsets is not None:
        places = torch.arange(n, device=offsets.device)
        return [places[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist())]
    if mask is None:
        raise ValueError("sequences are given by a mask or by offsets")
    return [row.nonzero().flatten() + b * n for b, row in enumerate(mask)]


def by_length(
    run: Callable[..., Tensor],
    rows: list[Tensor],
    parts: list[Tensor | None],
    before: Tensor | None,
    exact: bool,
) -> Tensor:
    """`run` over each sequence by itself, those of like length together.

    Args:
        run: of `[s, C, T]` parts and `[s, C, K - 1]` or None, gives `[s, C, T]`. rows: places of each
            sequence's tokens. parts: `[B, C, N]` each, or None. before: `[S, C, K - 1]` or None.
        exact: whether a batch takes only sequences of one length; else up to twice the shortest's, zeros
            behind.

    Returns `[B, C, N]`, 0 where no sequence has a token.
    """
    first = parts[0]
    if first is None:
        raise ValueError("the first part is the inputs and must be there")
    b, channels, n = first.shape
    flat = [None if part is None else part.transpose(0, 1).flatten(1) for part in parts]  # [C, B * N]
    out = first.new_zeros(channels, b * n)
    groups: dict[int, list[int]] = {}
    for i, own in enumerate(rows):
        if len(own):
            groups.setdefault(len(own) if exact else len(own).bit_length(), []).append(i)
    for group in groups.values():
        longest = max(len(rows[i]) for i in group)
        places = torch.zeros(len(group), longest, dtype=torch.int64, device=first.device)
        real = torch.zeros_like(places, dtype=torch.bool)
        for i, sequence in enumerate(group):
            places[i, : len(rows[sequence])], real[i, : len(rows[sequence])] = rows[sequence], True

        def take(part: Tensor | None, places: Tensor = places, real: Tensor = real) -> Tensor | None:
            if part is None:
                return None
            found = part.index_select(1, places.flatten()).unflatten(1, places.shape).transpose(0, 1)
            return found.masked_fill(~real.unsqueeze(1), 0)

        own_before = None if before is None else before[torch.tensor(group, device=first.device)]
        made = run(*(take(part) for part in flat), own_before)
        out = out.index_copy(1, places[real], made.transpose(0, 1)[:, real].to(out.dtype))
    return out.unflatten(1, (b, n)).transpose(0, 1)


def last_inputs(u: Tensor, rows: list[Tensor], before: Tensor | None, count: int) -> Tensor:
    """The last `count` values of each sequence of `u [B, C, N]` behind its `before [S, C, count]`: `[S, C,
    count]`."""
    flat = u.transpose(0, 1).flatten(1)
    made = []
    for i, own in enumerate(rows):
        recent = flat.index_select(1, own[max(0, len(own) - count) :])
        missing = count - recent.shape[1]
        front = (
            u.new_zeros(u.shape[1], missing) if before is None else before[i][:, before.shape[2] - missing :]
        )
        made.append(torch.cat((front.to(u.dtype), recent), 1))
    return torch.stack(made) if made else u.new_zeros(0, u.shape[1], count)


@dataclass(frozen=True, eq=False)
class Lines:
    """Sequences of a batch side by side, each from its first token on.

    Attributes:
        places: int64 `[S, T]`, where in the batch each token stands; real: bool `[S, T]`, whether there is
            one.
    """

    places: Tensor
    real: Tensor

    @classmethod
    def of(cls, rows: list[Tensor], device: torch.device) -> Lines:
        longest = max((len(own) for own in rows), default=0)
        places = torch.zeros(len(rows), longest, dtype=torch.int64, device=device)
        real = torch.zeros_like(places, dtype=torch.bool)
        for i, own in enumerate(rows):
            places[i, : len(own)], real[i, : len(own)] = own, True
        return cls(places, real)

    def take(self, x: Tensor) -> Tensor:
        """`[B, N, C]` as `[S, T, C]`, zeros where there is no token."""
        flat = x.flatten(0, 1)
        if not self.places.numel():
            return x.new_zeros(*self.places.shape, x.shape[2])
        return flat[self.places].masked_fill(~self.real.unsqueeze(2), 0)

    def put(self, y: Tensor, shape: tuple[int, int]) -> Tensor:
        """The reverse, 0 where no sequence has a token."""
        flat = y.new_zeros(shape[0] * shape[1], y.shape[2])
        return flat.index_copy(0, self.places[self.real], y[self.real]).unflatten(0, shape)
