"""Linear attention: the sum of what keys and values make, read by queries; the control of all that forget."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.api import scan
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState, check_width, from_heads, to_heads
from tilewise.recurrence.model import mixer
from tilewise.recurrence.short_conv import ShortConv, convolved

FEATURES: dict[str | None, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
    "softmax": lambda x: x.softmax(-1),
    None: lambda x: x,
}


@mixer("linear")
class LinearAttention(Mixer):
    """Linear attention (Katharopoulos et al., 2020, arXiv 2006.16236): `o_t = sum_s (f(q_t) . f(k_s)) v_s`.

    Args:
        width: of the inputs. heads: their number.
        features: f, the map of each head's queries and keys: "elu" (the paper's, elu(x) + 1), "relu", "silu",
            "softmax" over channels, or None for none.
        normalize: "sum" divides by `sum_s f(q_t) . f(k_s)`, for maps that are never negative; None gives each
            head's output an RMS norm in its place, as later work does.
        conv: width of short convolutions of queries, keys and values; 0 leaves them out, as the paper does.

    Raises ValueError for sizes that do not divide and for other maps and normalisers.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        features: str | None = "elu",
        normalize: str | None = "sum",
        conv: int = 0,
    ) -> None:
        super().__init__()
        dim = check_width(width, heads)
        if features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(map(repr, FEATURES))}, got {features!r}")
        if normalize not in (None, "sum"):
            raise ValueError(f"normalize must be None or 'sum', got {normalize!r}")
        if normalize == "sum" and features in (None, "silu"):
            raise ValueError(f"normalize 'sum' takes features that are never negative, got {features!r}")
        self.heads, self.features, self.normalize = heads, features, normalize
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.convs = nn.ModuleList(ShortConv(width, conv) for _ in range(3 if conv else 0))
        self.norm = HeadNorm(heads, dim) if normalize is None else nn.Identity()
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        packing = {"mask": mask, "cu_seqlens": cu_seqlens}
        parts = [part(x) for part in (self.query, self.key, self.value)]
        parts, tails = convolved(self.convs, parts, None if state is None else state.tails, **packing)
        q, k, v = (to_heads(part, self.heads) for part in parts)
        q, k = (FEATURES[self.features](part) for part in (q, k))
        out, after = scan(
            q, k, v, normalize=self.normalize, state=None if state is None else state.scan, return_state=True,
            **packing,
        )  # fmt: skip
        return self.out(from_heads(self.norm(out))), MixerState(after, tails)
