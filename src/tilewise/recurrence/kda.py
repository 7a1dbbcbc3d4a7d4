"""Kimi Delta Attention: the delta rule whose every key channel forgets at its own pace."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.api import scan
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import mixer
from tilewise.recurrence.short_conv import ShortConv, convolved


@mixer("kda")
class KDA(Mixer):
    """Kimi Delta Attention, of Kimi Linear (Kimi Team, 2025, arXiv 2510.26692).

    `S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T`, `o_t = S_t^T q_t / sqrt(D)`: Gated DeltaNet
    with a decay for each channel of the keys, `log a_t = -exp(log_rate) softplus(step(x_t) + bias)`, `step` of low
    rank and one rate for each head. Queries, keys and values pass a short convolution and `silu`, queries and keys
    have length 1, `beta` is a sigmoid. Outputs have an RMS norm by head, shared by the heads as in their open code,
    and a sigmoid gate of low rank.

    Args:
        width: of the inputs. heads: their number.
        rank: of the decay's and the gate's projections; None is the size of a head, as in the paper.
        conv: width of the short convolutions; 0 leaves them out.
        fine: False gives a head's channels one decay, the mean of their steps, everything else kept: the control.

    Differs from the open code in how short convolutions and linear layers are initialised.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self, width: int, heads: int = 4, rank: int | None = None, conv: int = 4, fine: bool = True
    ) -> None:
        super().__init__()
        dim = check_width(width, heads)
        rank = dim if rank is None else rank
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be None or an integer >= 1, got {rank!r}")
        self.heads, self.fine = heads, fine
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.convs = nn.ModuleList(ShortConv(width, conv) for _ in range(3 if conv else 0))
        self.beta = nn.Linear(width, heads, bias=False)
        raised = nn.Linear(rank, width)
        self.step = nn.Sequential(nn.Linear(width, rank, bias=False), raised)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        nn.init.constant_(raised.bias, -4.0)  # slow at first: rates times softplus(-4) are 0.02 to 0.3
        self.gate = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
        self.norm, self.out = HeadNorm(1, dim), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        packing = {"mask": mask, "cu_seqlens": cu_seqlens}
        parts = [part(x) for part in (self.query, self.key, self.value)]
        parts, tails = convolved(self.convs, parts, None if state is None else state.tails, **packing)
        q, k, v = (to_heads(F.silu(part), self.heads) for part in parts)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out, after = scan(
            q, k, v, decay=self.decay(x), beta=wide(self.beta(x)).sigmoid().mT, rule="delta",
            state=None if state is None else state.scan, return_state=True, **packing,
        )  # fmt: skip
        out = from_heads(self.norm(out)) * wide(self.gate(x)).sigmoid().to(x.dtype)
        return self.out(out), MixerState(after, tails)

    def decay(self, x: Tensor) -> Tensor:
        """Log decays of each channel of the keys, `[B, H, N, D]`."""
        step = to_heads(wide(self.step(x)), self.heads)
        if not self.fine:
            step = step.mean(-1, keepdim=True).expand_as(step)
        return -(self.log_rate.exp().view(-1, 1, 1) * F.softplus(step))
