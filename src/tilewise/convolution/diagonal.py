"""A diagonal state space of each channel, as a kernel and as a state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tilewise.recurrence.mixer import check_width, wide

SPAN = 64  # powers are made of those within a span and those between spans, so none is N x states in all


class DiagonalSSM(nn.Module):
    """`s_t = p s_{t-1} + b u_t`, `y_t = 2 Re(c . s_t)` for each channel, with complex numbers p inside the
    unit circle.

    After S4D (Gu et al., 2022, arXiv 2206.11893): rates `A = -exp(log_rate) + i frequency`, held for a
    learned step d (zero-order hold): `p = exp(d A)`, `b = (p - 1) / A`; at first rates are 1/2 and
    frequencies pi times 0, 1, 2 ...

    Args:
        channels: their number. states: real numbers in the state of one, even. steps: the smallest and
            largest d.

    Raises ValueError for sizes and steps that do not fit.
    """

    def __init__(self, channels: int, states: int = 64, steps: tuple[float, float] = (0.001, 0.1)) -> None:
        super().__init__()
        check_width(channels, 1, "channels")
        half = check_width(states, 2, "states")
        least, most = steps
        if not 0 < least <= most:
            raise ValueError(f"steps must rise from above 0, got {steps!r}")
        self.log_step = nn.Parameter(torch.empty(channels).uniform_(math.log(least), math.log(most)))
        self.log_rate = nn.Parameter(torch.full((channels, half), math.log(0.5)))
        self.frequency = nn.Parameter((math.pi * torch.arange(half)).repeat(channels, 1))
        self.read = nn.Parameter(torch.randn(channels, half, 2) * 0.5**0.5)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """log p, b and c, `[C, S / 2]`."""
        rate = torch.complex(-wide(self.log_rate).exp(), wide(self.frequency))
        exponent = wide(self.log_step).exp().unsqueeze(1) * rate
        # exp(z) - 1 without cancelling for small steps: 2 exp(z / 2) sinh(z / 2).
        return (
            exponent,
            2 * (exponent / 2).exp() * (exponent / 2).sinh() / rate,
            torch.view_as_complex(wide(self.read)),
        )

    def kernel(self, n: int) -> Tensor:
        """`[C, n]`: what y reads of an input k steps later."""
        exponent, write, read = self._parts()
        return self._read(exponent, (read * write).unsqueeze(0), n)[0]

    def from_state(self, state: Tensor, n: int) -> Tensor:
        """What n outputs read of the state before the first, complex `[B, C, S / 2]`: `[B, C, n]`."""
        exponent, _, read = self._parts()
        return self._read(exponent, read * exponent.exp() * state, n)

    def _read(self, exponent: Tensor, weights: Tensor, n: int) -> Tensor:
        """`2 Re(sum of weights * p^t)` for t below n, `[B, C, n]`."""
        spans = -(-n // SPAN)
        within = (exponent.unsqueeze(2) * torch.arange(min(n, SPAN), device=exponent.device)).exp()
        between = (
            exponent.unsqueeze(1) * (SPAN * torch.arange(spans, device=exponent.device)).unsqueeze(1)
        ).exp()
        return 2 * ((weights.unsqueeze(2) * between) @ within).real.flatten(2)[..., :n]

    def to_state(self, u: Tensor, state: Tensor | None, lengths: Tensor) -> Tensor:
        """The state after inputs `u [B, C, N]`, of which the last `lengths [B]` count (others are 0): `[B, C,
        S / 2]`."""
        exponent, write, _ = self._parts()
        n = u.shape[2]
        spans = -(-n // SPAN)
        u = nn.functional.pad(wide(u), (spans * SPAN - n, 0)).unflatten(2, (spans, SPAN)).to(exponent.dtype)
        back = torch.arange(SPAN - 1, -1, -1, device=u.device)
        within = (exponent.unsqueeze(1) * back.unsqueeze(1)).exp()  # [c, span, s]
        between = (
            exponent.unsqueeze(1) * (SPAN * torch.arange(spans - 1, -1, -1, device=u.device)).unsqueeze(1)
        ).exp()
        made = write * ((u @ within) * between).sum(2)
        if state is None:
            return made
        return made + (exponent * lengths.view(-1, 1, 1)).exp() * state
