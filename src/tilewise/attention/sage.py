"""SageAttention2: dense attention with quantised queries and keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tilewise.attention.api import attend
from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.precisions import Quantised, accuracy
from tilewise.tiles import Mask, Partial


@dataclass(frozen=True)
class SageAttention2(Method):
    """Every visible tile, in few bits (Zhang et al., 2024, arXiv 2411.10958).

    `tilewise.attention.Quantised` says what the settings mean; it is a stage and works with any choice of tiles.
    Queries and keys are rounded to integers after smoothing, in groups of the paper's kernel ("thread" is the
    published version's granularity, "warp" the report's first). The paper's SageAttn2-4b is
    `SageAttention2("int4", "fp8", smooth_q=True)`, its SageAttn2-8b `SageAttention2("int8", "fp8", smooth_q=True)`;
    `smooth_v` is of the report's first version. `adaptive` chooses between the two layer by layer.

    The default is what a CPU gains by: int8 products of queries and keys, weights and values as they are. 4 bits
    and E4M3 are computed with the arithmetic there is, rounded exactly, for their error. Differs from the paper:
    sums are float32 throughout, where the paper's GPUs add FP8 products in 22 bits.

    Supports prefill, chunked prefill and decoding; no training. Looks ahead at the prompt: the mean key and the
    scales are those of all tokens, so later tokens move the rounding of earlier ones, and nothing else.
    """

    name = "sage2"
    modes = ("prefill", "chunked prefill", "decode")
    reads = "q, k"
    exact = False

    qk: Literal["int8", "int4"] = "int8"
    pv: Literal["native", "fp8"] = "native"
    smooth_q: bool = False
    smooth_k: bool = True
    smooth_v: bool = False
    group: Literal["token", "thread", "warp", "block", "tensor"] = "thread"

    def __post_init__(self) -> None:
        self.precision()

    @property
    def lookahead(self) -> str:
        return "prompt"

    def precision(self) -> Quantised:
        """The stage that this method is made of."""
        return Quantised(self.qk, self.pv, self.smooth_q, self.smooth_k, self.smooth_v, self.group)

    def plan(self, q, k, view, scale) -> Plan:
        return Plan((Pass(view, precision=self.precision()),), view)


def adaptive(
    layers: Mapping[int, Iterable[tuple[Tensor, Tensor, Tensor]]],
    share: float = 0.5,
    *,
    low: SageAttention2 | None = None,
    high: SageAttention2 | None = None,
    mask: Mask | Tensor | str | None = "causal",
    scale: float | None = None,
) -> dict[int, SageAttention2]:
    """SageAttention2's adaptive quantisation: 8 bits for the layers that 4 bits serve worst.

    Each layer's output in `low` is compared with the exact one on its own samples; the paper's measure is cosine
    similarity times (1 - relative L1 distance). The `share` of layers with the smallest gets `high`, the others
    `low`. What comes back is a mapping that `tilewise.patch` takes.

    Args:
        layers: (q, k, v) samples by layer, as an observer of `tilewise.patch` sees them.
        share: of the layers, 0 to 1, rounded to whole layers. The paper also tells timesteps of a diffusion
            model apart; give each (layer, timestep) a number of its own for that.
        low, high: the paper's 4-bit and 8-bit versions when None.
        mask, scale: as in `attend`.

    Raises ValueError for a share outside 0..1 and for a layer without samples.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share!r}")
    low = low or SageAttention2("int4", "fp8", smooth_q=True)
    high = high or SageAttention2("int8", "fp8", smooth_q=True)
    quality = {layer: _quality(samples, layer, low, mask, scale) for layer, samples in layers.items()}
    worst = sorted(quality, key=lambda layer: (quality[layer], layer))[: round(share * len(quality))]
    return {layer: high if layer in worst else low for layer in quality}


def _quality(samples, layer: int, method: SageAttention2, mask, scale) -> float:
    """Mean cosine similarity times (1 - relative L1 distance) over a layer's samples."""
    measured = []
    for q, k, v in samples:
        outs = [attend(q, k, v, each, mask=mask, scale=scale) for each in (method, None)]
        cosine, distance, _ = accuracy(*(x.out if isinstance(x, Partial) else x for x in outs))
        measured.append(cosine * (1 - distance))
    if not measured:
        raise ValueError(f"layer {layer} has no samples")
    return sum(measured) / len(measured)
