"""Lightning attention and TransNormerLLM: linear attention whose heads forget at fixed rates of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.api import scan
from tilewise.recurrence.mixer import Mixer, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import Block, ModelConfig, SequenceModel, mixer
from tilewise.recurrence.positions import positions
from tilewise.recurrence.state import Carried, State


def slopes(heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    """How fast each head of a layer forgets, float32 `[heads]`: each token multiplies the state by exp(-slope).

    Head h of n has 2^(-8 (h + 1) / n), as ALiBi's; layer l of L has that times 1 - l / (L - 1), so that later
    layers see further and the last one nearly everything (its factor is 1e-5). When n is no power of two, the
    slopes of the power of two below it come first and every other one of the power above fills up, as in the
    authors' code.

    Raises ValueError for heads or layers below 1 and a layer outside them.
    """
    for name, value in (("heads", heads), ("layers", layers)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if not 0 <= layer < layers:
        raise ValueError(f"layer must be from 0 to {layers - 1}, got {layer!r}")

    def of(n: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / n) for h in range(n)]

    low = 1 << int(math.log2(heads))
    found = torch.tensor(of(low) + of(2 * low)[::2][: heads - low])
    return found * ((1 - layer / (layers - 1) if layers > 1 else 1) + 1e-5)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float = 1.0,
    state: State | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    engine: str = "auto",
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """Causal linear attention with a fixed decay for each head, tile by tile (Qin et al., 2024, arXiv 2401.04658).

    `o_t = scale * sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s`. Within a tile that is a small masked
    attention, between tiles a state is carried, and the backward pass does the same from the end: time and work per
    token do not depend on the length. It is `scan` with `decay=-slopes`, which says what the other arguments,
    dtypes and errors are.

    Args:
        q, k, v: `[B, H, N, D]`. slopes: `[H]`, none below 0; `slopes()` gives TransNormerLLM's, zeros forget
            nothing.

    Returns:
        `[B, H, N, D_v]`, or that and a `State`.

    Differs from the paper: on CPUs, by the library's own kernel, with tiles of 64 tokens.
    """
    return scan(
        q, k, v, decay=-slopes, scale=scale, state=state, mask=mask, cu_seqlens=cu_seqlens, engine=engine,
        return_state=return_state,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LightningState(Carried):
    """The recurrence's state, and how many tokens each sequence has had, int64 `[S]`."""

    scan: State
    seen: Tensor


class LRPE(nn.Module):
    """Linearised relative positions (Qin et al., 2023, arXiv 2307.09270): scores become
    `sum_d q_d k_d cos(theta_d (t - s))`, with a learned theta for each channel.

    `[B, H, N, D]` and positions `[B, N]` to `[B, H, N, 2 D]`: x cos and x sin. Angles are taken in float64, since
    float32 has no exact angle far into a sequence.
    """

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        rates = 10000.0 ** (-2 * torch.arange(heads * dim) / (heads * dim))
        self.theta = nn.Parameter(rates.view(heads, 1, dim))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        angle = self.theta.double() * places[:, None, :, None].double()
        return torch.cat((x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)), -1)


@mixer("lightning")
class Lightning(Mixer):
    """The gated linear attention of TransNormerLLM (Qin et al., 2024, arXiv 2405.17381).

    `out((norm(lightning_attention(silu(q), silu(k), v))) * u)` with q, k, v and u linear in the token, and an RMS
    norm over all channels without a scale of its own (SRMSNorm) in place of a denominator.

    Args:
        width: of the inputs. heads: their number. layer, layers: which of how many layers this is, for the slopes.
        lrpe: turn queries and keys by their positions (the paper: in the first layer); their size doubles.
        decay: False forgets nothing, as linear attention before it.

    Raises ValueError for sizes that do not divide and layers that are none.
    """

    slopes: Tensor

    def __init__(
        self,
        width: int,
        heads: int = 4,
        layer: int = 0,
        layers: int = 1,
        lrpe: bool = False,
        decay: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        dim = check_width(width, heads)
        self.query, self.key, self.value, self.gate = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.lrpe = LRPE(heads, dim) if lrpe else None
        self.out = nn.Linear(width, width, bias=False)
        self.register_buffer("slopes", slopes(heads, layer, layers) * decay, persistent=False)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        places, seen = positions(x, None if state is None else state.seen, mask, cu_seqlens)
        q, k, v = (to_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        q, k = F.silu(q), F.silu(k)
        if self.lrpe is not None:
            q, k = self.lrpe(q, places), self.lrpe(k, places)
        out, after = lightning_attention(
            q, k, v, wide(self.slopes), scale=k.shape[-1] ** -0.5, state=None if state is None else state.scan,
            mask=mask, cu_seqlens=cu_seqlens, return_state=True,
        )  # fmt: skip
        out = from_heads(out)
        out = F.rms_norm(out, out.shape[-1:], eps=1e-5)
        return self.out(out * self.gate(x)), LightningState(after, seen)


class SGLU(nn.Module):
    """TransNormerLLM's channel mixer, a gated linear unit without an activation: `down(gate(x) * up(x))`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))


class TNL(SequenceModel):
    """TransNormerLLM (Qin et al., 2024, arXiv 2405.17381): `Lightning` mixers with the slopes of their layers,
    LRPE in the first, SGLU channel mixers, and norms without scales.

    Args:
        vocabulary: tokens known. width: of the residual stream. layers: their number. heads: of each mixer.
        hidden: of the channel mixers; None is 8/3 of the width. decay: False forgets nothing.

    Called as `SequenceModel`. Raises ValueError for sizes below 1 or that do not divide.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int = 4,
        hidden: int | None = None,
        decay: bool = True,
    ) -> None:
        super().__init__(
            ModelConfig(vocabulary, width, ("lightning",) * layers, {"lightning": {"heads": heads}}, 0)
        )
        hidden = round(8 * width / 3) if hidden is None else hidden
        self.blocks = nn.ModuleList()
        for layer in range(layers):
            made = Lightning(width, heads, layer, layers, lrpe=layer == 0, decay=decay)
            block = Block(width, made, SGLU(width, hidden))
            block.norm, block.channel_norm = (_plain_norm(width) for _ in range(2))
            self.blocks.append(block)
        self.norm = _plain_norm(width)


def _plain_norm(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=1e-5, elementwise_affine=False)
