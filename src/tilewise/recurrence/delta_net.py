"""DeltaNet: the state is corrected by what it got wrong; with decays, Gated DeltaNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.kernels.scan import RULES
from tilewise.recurrence.api import scan
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import mixer
from tilewise.recurrence.short_conv import ShortConv, convolved


@mixer("delta-net")
class DeltaNet(Mixer):
    """The delta rule over sequence length (Yang et al., 2024, arXiv 2406.06484).

    Each token writes `beta (v - what its key finds)` under its key, so a key that comes again replaces its value.
    Keys and queries pass a short convolution and `silu`, and have length 1; `beta` is a sigmoid of the token.

    Args:
        width: of the inputs. heads: their number. conv: width of the short convolutions; 0 leaves them out.
        reach: beta lies in (0, reach); 2 also allows reflections, with which parity can be tracked.
        rule: "add" writes `beta v` without looking what the key finds, everything else kept: linear attention, the
            control.

    Raises ValueError for sizes that do not divide, a reach outside (0, 2] and other rules.
    """

    gated = False

    def __init__(
        self, width: int, heads: int = 4, conv: int = 4, reach: float = 1.0, rule: str = "delta"
    ) -> None:
        super().__init__()
        if not 0 < reach <= 2:
            raise ValueError(f"reach must lie in (0, 2], got {reach!r}")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
        self.heads, self.reach, self.rule = heads, reach, rule
        dim = check_width(width, heads)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.convs = nn.ModuleList(ShortConv(width, conv) for _ in range(3 if conv else 0))
        self.beta = nn.Linear(width, heads, bias=False)
        self.norm, self.out = HeadNorm(heads, dim), nn.Linear(width, width, bias=False)
        if self.gated:
            self.gate, self.step = nn.Linear(width, width, bias=False), nn.Linear(width, heads)
            self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
            nn.init.constant_(self.step.bias, -4.0)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        packing = {"mask": mask, "cu_seqlens": cu_seqlens}
        parts = [part(x) for part in (self.query, self.key, self.value)]
        parts, tails = convolved(self.convs, parts, None if state is None else state.tails, **packing)
        q, k, v = (to_heads(F.silu(part), self.heads) for part in parts)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = self.reach * wide(self.beta(x)).sigmoid().mT
        out, after = scan(
            q, k, v, decay=self._decay(x), beta=beta, rule=self.rule, state=None if state is None else state.scan,
            return_state=True, **packing,
        )  # fmt: skip
        out = from_heads(self.norm(out))
        if self.gated:
            out = out * F.silu(self.gate(x))
        return self.out(out), MixerState(after, tails)

    def _decay(self, x: Tensor) -> Tensor | None:
        """Log decays `[B, H, N]`, as Mamba-2's: a rate of the head times a step of the token."""
        if not self.gated:
            return None
        return -(self.log_rate.exp() * F.softplus(wide(self.step(x)))).mT


@mixer("gated-delta-net")
class GatedDeltaNet(DeltaNet):
    """DeltaNet with a decay for every step and head, and gated outputs (Yang et al., 2024, arXiv 2412.06464)."""

    gated = True
