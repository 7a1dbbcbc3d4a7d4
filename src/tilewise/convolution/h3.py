"""H3: a shift and a diagonal state space with products between them, and the diagonal one alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.api import long_conv
from tilewise.convolution.diagonal import DiagonalSSM
from tilewise.convolution.ragged import Lines, sequences
from tilewise.convolution.state import ConvState
from tilewise.recurrence import Carried
from tilewise.recurrence.checks import check_offsets
from tilewise.recurrence.mixer import Mixer, check_width
from tilewise.recurrence.model import mixer


@dataclass(frozen=True, eq=False)
class H3State(Carried):
    """What H3 carries.

    Attributes:
        shift: the last keys. diagonal: complex `[S, C, states / 2]`, seen as real numbers `[..., 2]`.
    """

    shift: ConvState
    diagonal: Tensor


@dataclass(frozen=True, eq=False)
class DiagonalState(Carried):
    """What `S4D` carries: `diagonal` as in `H3State`."""

    diagonal: Tensor


@mixer("h3")
class H3(Mixer):
    """Hungry hungry hippos (Fu et al., 2022, arXiv 2212.14052): `q * diagonal(shift(k) * v)`.

    A shift state space is a short learned kernel over the keys, which can hold a token back until the next
    one comes; its product with the values passes a diagonal state space, which remembers, and queries choose
    what of it is let out. In training both are convolutions with the states' kernels; a sequence may be split
    anywhere, down to single tokens, as the states are handed on.

    Args:
        width: of the inputs. states: of a channel's diagonal state space, even. shift: states of the shift,
            how many tokens it holds. head: channels of a head, in which every key meets every value and
            queries add up.
        steps: the smallest and largest step that channels begin with.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        states: int = 64,
        shift: int = 64,
        head: int = 1,
        steps: tuple[float, float] = (0.001, 0.1),
    ) -> None:
        super().__init__()
        check_width(head, 1, "head")
        check_width(shift, 1, "shift")
        self.head, self.heads = head, check_width(width, head)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.shift = nn.Parameter(torch.randn(width, shift) * shift**-0.5)
        self.shift_skip = nn.Parameter(torch.randn(width))
        self.diagonal = DiagonalSSM(self.heads, states, steps)
        self.skip = nn.Parameter(torch.randn(self.heads))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        return _in_lines(self._mix, x, state, mask, cu_seqlens)

    def _mix(self, x: Tensor, state: H3State | None, real: Tensor | None, lengths: Tensor):
        q, k, v = (part(x).mT for part in (self.query, self.key, self.value))  # [b, c, n]
        k, tail = long_conv(
            k, self.shift, skip=self.shift_skip, state=None if state is None else state.shift, mask=real,
            return_state=True,
        )  # fmt: skip
        if self.head > 1:
            by_head = (self.heads, self.head)
            k = k.unflatten(1, by_head).unsqueeze(3).expand(-1, -1, -1, self.head, -1).flatten(1, 3)
            v = v.unflatten(1, by_head).unsqueeze(2).expand(-1, -1, self.head, -1, -1).flatten(1, 3)
            q = q.unflatten(1, by_head).unsqueeze(3)  # [b, h, d, 1, n]
        before = None if state is None else torch.view_as_complex(state.diagonal)
        gate = q if self.head == 1 else None
        y, after = _diagonal(self.diagonal, k, self.skip, before, lengths, real, v, gate, self.head**2)
        if self.head > 1:
            y = (y.unflatten(1, (*by_head, self.head)) * q).sum(2).flatten(1, 2)
        return self.out(y.mT), H3State(tail, torch.view_as_real(after))


@mixer("s4d")
class S4D(Mixer):
    """A diagonal state space for each channel (Gu et al., 2022, arXiv 2206.11893), and a gated linear layer.

    `glu(out(gelu(diagonal(x))))`: what H3 is measured against. Args and errors as for `H3`.
    """

    def __init__(self, width: int, states: int = 64, steps: tuple[float, float] = (0.001, 0.1)) -> None:
        super().__init__()
        self.diagonal = DiagonalSSM(width, states, steps)
        self.skip = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        return _in_lines(self._mix, x, state, mask, cu_seqlens)

    def _mix(self, x: Tensor, state: DiagonalState | None, real: Tensor | None, lengths: Tensor):
        before = None if state is None else torch.view_as_complex(state.diagonal)
        y, after = _diagonal(self.diagonal, x.mT, self.skip, before, lengths, real)
        return F.glu(self.out(F.gelu(y.mT)), dim=-1), DiagonalState(torch.view_as_real(after))


def _in_lines(mix, x: Tensor, state, mask: Tensor | None, cu_seqlens: Tensor | None):
    """`mix` over sequences side by side, where they do not lie so already."""
    offsets = check_offsets(cu_seqlens, mask, x.mT)
    if mask is None and offsets is None:
        return mix(x, state, None, torch.full((x.shape[0],), x.shape[1], device=x.device))
    lines = Lines.of(sequences(mask, offsets, x.shape[1]), x.device)
    y, after = mix(lines.take(x), state, lines.real, lines.real.sum(1))
    return lines.put(y, (x.shape[0], x.shape[1])), after


def _diagonal(
    ssm: DiagonalSSM,
    x: Tensor,
    skip: Tensor,
    before: Tensor | None,
    lengths: Tensor,
    real: Tensor | None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    copies: int = 1,
) -> tuple[Tensor, Tensor]:
    """`gate_out * (ssm(gate_in * x) + skip * gate_in * x)` of `[B, C, N]`, and the state after it.

    `before`: complex `[B, C, states / 2]`. Each channel of the state space serves `copies` of x.
    """
    b, channels, n = x.shape
    u = x if gate_in is None else x * gate_in
    if real is not None:  # projections of nothing are their biases
        u = u.masked_fill(~real.unsqueeze(1), 0)
    kernel = ssm.kernel(max(1, n)).repeat_interleave(copies, 0)
    y = cast(Tensor, long_conv(u, kernel, gate_out=gate_out, skip=skip.repeat_interleave(copies)))
    split = (b * copies, channels // copies)  # copies beside the batch, as one state space serves them all

    def apart(z: Tensor) -> Tensor:
        return z.unflatten(1, (channels // copies, copies)).transpose(1, 2).reshape(*split, *z.shape[2:])

    def together(z: Tensor) -> Tensor:
        return z.unflatten(0, (b, copies)).transpose(1, 2).flatten(1, 2)

    first = None if before is None else apart(before)
    if first is not None:
        more = together(ssm.from_state(first, n)).to(y.dtype)
        y = y + (more if gate_out is None else gate_out * more)
    if real is not None and n:  # states count from the last token: sequences end together
        place = torch.arange(n, device=x.device) - (n - lengths).unsqueeze(1)
        u = u.take_along_dim(place.clamp(min=0).unsqueeze(1), 2).masked_fill((place < 0).unsqueeze(1), 0)
    after = ssm.to_state(apart(u), first, lengths.repeat_interleave(copies))
    return y, together(after)
