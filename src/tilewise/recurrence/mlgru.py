"""The token mixer of MatMul-free language models: a gated recurrence of each channel, with ternary projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.recurrence.mixer import Mixer, check_width, wide
from tilewise.recurrence.model import LINEARS, ModelConfig, mixer
from tilewise.recurrence.per_channel import running
from tilewise.recurrence.state import Carried


@dataclass(frozen=True, eq=False)
class MLGRUState(Carried):
    """What `MLGRU` carries: `hidden [S, C]`, float32 or wider."""

    hidden: Tensor


@mixer("mlgru")
class MLGRU(Mixer):
    """The MatMul-free linear GRU (Zhu et al., 2024, arXiv 2406.02528).

        f = sigmoid(F x),  c = silu(C x),  h_t = f h_{t-1} + (1 - f) c,  out = O (sigmoid(G x) h)

    F, C, G and O are `BitLinear`: the layer has no product of matrices but with 0 and +-1, and none of tokens with
    each other. Between tokens only channels are scaled and added.

    Differs from the authors' code, which normalises the gate by RMS; here, as in the paper's equations, what is
    gated is h, and O's own norm is the only one. Biases of F begin so that channels remember from 1 to about 64
    tokens; there are no lower bounds of forget gates by layer.

    Args:
        width: of the inputs. expand: channels as a multiple of the width.
        linear: "ternary", or "dense" for ordinary linear layers in their place: the control.

    Raises ValueError for sizes below 1 and other kinds of layers.
    """

    def __init__(self, width: int, expand: int = 1, linear: str = "ternary") -> None:
        super().__init__()
        check_width(expand, 1, "expand")
        if linear not in LINEARS:
            raise ValueError(f"linear must be one of {', '.join(map(repr, LINEARS))}, got {linear!r}")
        made, channels = LINEARS[linear], width * expand
        self.forget, self.candidate = made(width, channels), made(width, channels, bias=False)
        self.gate, self.out = made(width, channels), made(channels, width, bias=False)
        with torch.no_grad():
            self.forget.bias.copy_(torch.empty(channels).uniform_(0, 6).exp2().log())
            self.gate.bias.zero_()

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        if state is None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = MLGRUState(wide(x.new_zeros(sequences, self.out.in_features)))
        forget = wide(self.forget(x)).sigmoid()
        add = (1 - forget) * F.silu(wide(self.candidate(x)))
        hidden, after = running(forget, add, state.hidden, mask=mask, cu_seqlens=cu_seqlens)
        out = self.out(hidden.to(x.dtype) * self.gate(x).sigmoid())
        if mask is not None:
            out = out.masked_fill(~mask.unsqueeze(2), 0)
        return out, MLGRUState(after)


def matmul_free(vocabulary: int, width: int, layers: int = 2, linear: str = "ternary") -> ModelConfig:
    """A MatMul-free language model (Zhu et al., 2024, arXiv 2406.02528): MLGRU and gated channel mixers of
    `BitLinear`.

    Embeddings are looked up, the output layer is ternary too, and so no product of floating matrices is left:
    `packed(SequenceModel(...))` runs in integers. `linear="dense"` is the same model of ordinary layers.

    Raises ValueError for sizes below 1.
    """
    check_width(layers, 1, "layers")
    return ModelConfig(
        vocabulary, width, ("mlgru",) * layers, {"mlgru": {"linear": linear}}, tied=False, linear=linear
    )
