"""What an engine of the gated networks receives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PAD = 16  # what is kept for the backward pass has rows of a multiple of so many numbers


class Kind(NamedTuple):
    """Sizes of a kind of network: `gates` of its inputs, `parts` of its state, and how many numbers a unit
    keeps of each token for the backward pass."""

    gates: int
    parts: tuple[str, ...]
    kept: int


# Kept are, in this order: elman h; lstm i, f, z, o, c before; gru r, z, n, R_n h + b_n; slstm i', f', z, o,
# sigmoid(-f), c before, n before; and for all of them h before.
KINDS: Mapping[str, Kind] = {
    "elman": Kind(1, ("h",), 2),
    "lstm": Kind(4, ("h", "c"), 6),
    "gru": Kind(3, ("h",), 5),
    "slstm": Kind(4, ("h", "c", "n", "m"), 8),
}


@dataclass(frozen=True, eq=False)
class Call:
    """A network whose gates read its own last output, head by head.

    With `r_g = R_g h + b_g` from the output h before the token, and `x_g` the inputs of the token:

        elman  h = tanh(x + r)
        lstm   i, f, o = sigmoid(x + r), z = tanh(x_z + r_z); c = f c + i z; h = o tanh(c)
        gru    r, z = sigmoid(x + r), n = tanh(x_n + r * r_n); h = (1 - z) n + z h
        slstm  m' = max(logsigmoid(x_f + r_f) + m, x_i + r_i), i = exp(x_i + r_i - m'),
               f = exp(logsigmoid(x_f + r_f) + m - m'), z = tanh(x_z + r_z), o = sigmoid(x_o + r_o);
               c = f c + i z; n = f n + i; h = o c / n; where n is 0, nothing was seen and m counts as -inf

    Args:
        wx: `[B, H, N, G, d]`, any strides; the gates are (z), (i, f, z, o), (r, z, n) and (i, f, z, o).
        R: `[H, G, d, d]`, row j of R[h, g] being that of unit j; bias: `[H, G, d]` or None.
        state: `[S, H, P, d]` before the first token, its parts (h), (h, c), (h) and (h, c, n, m); None
            is zeros.
        mask: bool `[B, N]`, False for tokens that are passed over: no state changes and the output is 0.
        offsets: int64 `[S + 1]` for packed sequences (B is then 1); None: every batch entry is one, S = B.
        kind: one of KINDS. keep: whether a backward pass will follow.

    wx, R and bias have one dtype; the state is float32, float64 when they are.
    """

    wx: Tensor
    R: Tensor
    bias: Tensor | None = None
    state: Tensor | None = None
    mask: Tensor | None = None
    offsets: Tensor | None = None
    kind: str = "lstm"
    keep: bool = False

    @property
    def sequences(self) -> int:
        """How many there are."""
        return self.wx.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def wide(self) -> torch.dtype:
        """What is accumulated in."""
        return torch.float64 if self.wx.dtype == torch.float64 else torch.float32

    def state_shape(self) -> tuple[int, int, int, int]:
        """Of the state, `(S, H, P, d)`."""
        return self.sequences, self.wx.shape[1], len(KINDS[self.kind].parts), self.wx.shape[4]

    def kept_shape(self) -> tuple[int, ...]:
        """Of what a forward pass keeps, `(B, N, H, K, d)` with d padded; nothing where nothing is kept."""
        b, heads, n, _, d = self.wx.shape
        return (b, n, heads, KINDS[self.kind].kept, -(-d // PAD) * PAD) if self.keep else (0,)

    def new_out(self) -> Tensor:
        """For the outputs `[B, H, N, d]`; in memory the heads of a token lie together, as the layer after
        wants."""
        b, heads, n, _, d = self.wx.shape
        return self.wx.new_empty(b, n, heads, d).transpose(1, 2)

    def spans(self) -> list[tuple[int, int, int]]:
        """Each sequence as (batch entry, first token, last token + 1)."""
        if self.offsets is None:
            return [(b, 0, self.wx.shape[2]) for b in range(self.wx.shape[0])]
        ends = self.offsets.tolist()
        return [(0, start, end) for start, end in zip(ends, ends[1:])]
