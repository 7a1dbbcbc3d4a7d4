"""Gated linear attention: a decay for every step and channel, that depends on the token."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.api import scan
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import mixer
from tilewise.recurrence.short_conv import ShortConv, convolved


@mixer("gla")
class GLA(Mixer):
    """Gated linear attention (Yang et al., 2023, arXiv 2312.06635).

    Queries, keys and values without an activation; each key channel decays by `sigmoid(gate)^(1 / temper)` of a
    low-rank projection of the token. Outputs are normalised by head and gated by `silu` of another projection.

    Args:
        width: of the inputs. heads: their number. key: channels of keys as a share of the width; values have all of
            it.
        rank: of the decay's projection. temper: how slowly decays move, 16 in the paper.
        conv: width of short convolutions of queries, keys and values, and `silu` after them; 0 leaves both out, as
            the paper does.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        key: float = 0.5,
        rank: int = 16,
        temper: float = 16.0,
        conv: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.temper = heads, temper
        keys = int(width * key)
        self.head_dim = check_width(keys, heads, "width * key")
        self.query, self.key = nn.Linear(width, keys, bias=False), nn.Linear(width, keys, bias=False)
        self.value, self.gate = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.convs = nn.ModuleList(ShortConv(size, conv) for size in ((keys, keys, width) if conv else ()))
        self.decay = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, keys))
        self.norm = HeadNorm(heads, check_width(width, heads))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        packing = {"mask": mask, "cu_seqlens": cu_seqlens}
        parts = [part(x) for part in (self.query, self.key, self.value)]
        parts, tails = convolved(self.convs, parts, None if state is None else state.tails, **packing)
        q, k, v = (to_heads(F.silu(part) if tails else part, self.heads) for part in parts)
        decay = F.logsigmoid(wide(to_heads(self.decay(x), self.heads))) / self.temper
        out, after = scan(
            q, k, v, decay=decay, state=None if state is None else state.scan, return_state=True, **packing
        )  # fmt: skip
        return self.out(from_heads(self.norm(out)) * F.silu(self.gate(x))), MixerState(after, tails)
