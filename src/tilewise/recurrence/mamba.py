"""Mamba: a state space for every channel, whose step, input and output are chosen by the token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.mixer import Mixer, check_width, wide
from tilewise.recurrence.model import mixer
from tilewise.recurrence.selective import SelectiveState, selective_scan
from tilewise.recurrence.short_conv import ShortConv
from tilewise.recurrence.state import Carried


@dataclass(frozen=True, eq=False)
class MambaState(Carried):
    """What Mamba carries: the states of its channels, and the last inputs of its short convolution."""

    scan: SelectiveState
    tail: Tensor


@mixer("mamba")
class Mamba(Mixer):
    """The selective state space (Gu and Dao, 2023, arXiv 2312.00752), the paper's block without its norm.

    The token is widened, passes a short convolution and `silu`, and then the selective scan: each channel keeps
    `states` numbers, and how long a step they take, what is written and what is read depend on the token. Outputs
    are gated by `silu` of another projection. In the paper's models the block stands alone, without a channel mixer
    (`ModelConfig(..., hidden=0)`).

    Args:
        width: of the inputs. states: of each channel. expand: channels as a multiple of the width.
        rank: of the projection that makes step sizes; None is width / 16, rounded up. conv: width of the
            convolution. steps: the smallest and the largest step that channels begin with.
        selective: False makes steps, inputs and outputs the same for every token, so that the layer is a linear
            time-invariant state space (S4D): the control.

    Raises ValueError for sizes below 1 and steps that do not rise from above 0.
    """

    def __init__(
        self,
        width: int,
        states: int = 16,
        expand: int = 2,
        rank: int | None = None,
        conv: int = 4,
        steps: tuple[float, float] = (0.001, 0.1),
        selective: bool = True,
    ) -> None:
        super().__init__()
        rank = -(-width // 16) if rank is None else rank
        for label, value in (("states", states), ("expand", expand), ("rank", rank)):
            check_width(value, 1, label)
        least, most = steps
        if not 0 < least <= most:
            raise ValueError(f"steps must rise from above 0, got {steps!r}")
        channels = width * expand
        self.sizes, self.selective = (rank, states, states), selective
        self.inner, self.gate = (nn.Linear(width, channels, bias=False) for _ in range(2))
        self.conv = ShortConv(channels, conv, bias=True)
        if selective:
            self.select = nn.Linear(channels, sum(self.sizes), bias=False)
            self.step = nn.Linear(rank, channels, bias=False)
            nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        else:
            self.to_state, self.to_out = (nn.Parameter(torch.randn(states)) for _ in range(2))
        # Steps that are softplus of the bias: evenly spread logs between the smallest and the largest.
        first = torch.empty(channels).uniform_(math.log(least), math.log(most)).exp()
        self.step_bias = nn.Parameter(first + torch.log(-torch.expm1(-first)))
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels))
        self.out = nn.Linear(channels, width, bias=False)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        packing = {"mask": mask, "cu_seqlens": cu_seqlens}
        inner, tail = self.conv(self.inner(x), None if state is None else state.tail, **packing)
        inner = F.silu(inner)
        delta, to_state, to_out = self._chosen(inner)
        made, after = selective_scan(
            inner, delta, -wide(self.log_rate).exp(), to_state, to_out, D=self.skip,
            state=None if state is None else state.scan, return_state=True, **packing,
        )  # fmt: skip
        return self.out(made * F.silu(self.gate(x))), MambaState(after, tail)

    def _chosen(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes `[B, N, channels]`, what is written and what is read, `[B, N, states]`."""
        if not self.selective:
            delta = F.softplus(wide(self.step_bias)).expand(inner.shape)
            shape = (*inner.shape[:2], self.sizes[1])
            return delta, self.to_state.expand(shape), self.to_out.expand(shape)
        rank, to_state, to_out = self.select(inner).split(self.sizes, 2)
        return F.softplus(wide(self.step(rank)) + wide(self.step_bias)), to_state, to_out
