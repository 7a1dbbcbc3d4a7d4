"""What an engine of the selective scan receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """Channels that each run a small diagonal state space of their own, steered by every token.

    Channel c has S states, `h_t = exp(delta_t A_c) h_{t-1} + delta_t x_t B_t`, and gives
    `y_t = C_t . h_t + D_c x_t`; B_t and C_t are shared by the channels of a group. Channels come last: so the
    linear layers around a scan write and read them, and so they fill registers. Time last is a stride view.

    Args:
        x: `[batch, N, channels]`, any strides.
        delta: step sizes >= 0, `[batch, N, channels]`, in x's dtype or as `A`.
        A: `[channels, S]`, finite and <= 0.
        B, C: `[batch, groups, N, S]` in x's dtype, any strides. Channel c reads group c // (channels // groups).
        D: `[channels]`; None adds nothing.
        state: `[Q, channels, S]` before the first token, for each of Q sequences; None = zeros.
        offsets: int64 `[Q + 1]` for packed sequences (batch is then 1): sequence i is tokens offsets[i] to
            offsets[i + 1] - 1. None: every batch entry is a sequence, Q = batch.

    A, D and state are float32, float64 when x is.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    state: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def sequences(self) -> int:
        """How many there are."""
        return self.x.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def wide(self) -> torch.dtype:
        """What is accumulated in."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def state_shape(self) -> tuple[int, int, int]:
        """Of the state, `(Q, channels, S)`."""
        return self.sequences, self.A.shape[0], self.A.shape[1]

    def spans(self) -> list[tuple[int, int, int]]:
        """Each sequence as (batch entry, first token, last token + 1)."""
        if self.offsets is None:
            return [(b, 0, self.x.shape[1]) for b in range(self.x.shape[0])]
        ends = self.offsets.tolist()
        return [(0, start, end) for start, end in zip(ends, ends[1:])]
