"""SageAttention2: dense attention with quantised queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tilewise.attention.api import attend
from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.precisions import Quantised, accuracy
from tilewise.tiles import Mask, Partial


@dataclass(frozen=True)
class SageAttention2(Quantised, Method):
    """Every visible tile, in few bits (Zhang et al., 2024, arXiv 2411.10958).

    Its settings are those of `tilewise.attention.Quantised`, the stage it is, which works with any choice of tiles.
    Queries and keys are rounded to integers after smoothing, in groups of the paper's kernel ("thread" is the
    published version's granularity, "warp" the report's first). The paper's SageAttn2-4b is
    `SageAttention2("int4", "fp8", smooth_q=True)`, its SageAttn2-8b `SageAttention2("int8", "fp8", smooth_q=True)`;
    `smooth_v` is of the report's first version. `adaptive` chooses between the two layer by layer.

    The default is what a CPU gains by: int8 products of queries and keys, weights and values as they are. 4 bits
    and E4M3 are computed with the arithmetic there is, rounded exactly, for their error. Differs from the paper:
    sums are float32 throughout, where the paper's GPUs add FP8 products in 22 bits.

    Supports prefill and chunked prefill; no training, and no decoding, which would round the whole cache for every
    token. Looks ahead at the prompt: the mean key and the scales are those of all tokens, so later tokens move the
    rounding of earlier ones, and nothing else.
    """

    name = "sage2"
    modes = ("prefill", "chunked prefill")
    reads = "q, k"
    exact = False

    @property
    def lookahead(self) -> str:
        return "prompt"

    def plan(self, q, k, view, scale) -> Plan:
        return Plan((Pass(view, precision=self),), view)


def adaptive(
    quality: Mapping[int, float],
    share: float = 0.5,
    *,
    low: SageAttention2 | None = None,
    high: SageAttention2 | None = None,
) -> dict[int, SageAttention2]:
    """SageAttention2's adaptive quantisation: 8 bits for the layers that 4 bits serve worst.

    Args:
        quality: of each layer in 4 bits, larger is better: `output_quality` is the paper's measure. It sees each
            layer alone; where errors of the first layers travel through all others, `tilewise.models.logit_quality`
            judges better. The paper also tells timesteps of a diffusion model apart; number (layer, timestep) pairs
            for that.
        share: of the layers in 8 bits, 0 to 1, rounded to whole layers.
        low, high: the paper's 4-bit and 8-bit versions when None.

    Returns a method for each layer, which `tilewise.patch` takes. Raises ValueError for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share!r}")
    low = low or SageAttention2("int4", "fp8", smooth_q=True)
    high = high or SageAttention2("int8", "fp8", smooth_q=True)
    worst = sorted(quality, key=lambda layer: (quality[layer], layer))[: round(share * len(quality))]
    return {layer: high if layer in worst else low for layer in quality}


def output_quality(
    layers: Mapping[int, tuple[Tensor, Tensor, Tensor]],
    method: Method,
    *,
    mask: Mask | Tensor | str | None = "causal",
    scale: float | None = None,
) -> dict[int, float]:
    """How near each layer's attention comes to the exact one: cosine similarity times (1 - relative L1 distance).

    Args:
        layers: (q, k, v) by layer, as `tilewise.models.capture` gives them.
        method: what is judged. mask, scale: as in `attend`.
    """
    quality = {}
    for layer, (q, k, v) in layers.items():
        outs = [attend(q, k, v, each, mask=mask, scale=scale) for each in (method, None)]
        cosine, distance, _ = accuracy(*(x.out if isinstance(x, Partial) else x for x in outs))
        quality[layer] = cosine * (1 - distance)
    return quality
