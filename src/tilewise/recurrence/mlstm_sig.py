"""mLSTM with sigmoid input gates: a matrix memory that needs neither a normaliser nor a running maximum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.api import scan
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import mixer


@mixer("mlstm-sig")
class MLSTMSig(Mixer):
    """mLSTMsig of Tiled Flash Linear Attention (Beck et al., 2025, arXiv 2503.14376).

    `C_t = sigmoid(f_t) C_{t-1} + sigmoid(i_t) k_t v_t^T` for every head, read by `q_t / sqrt(D_k)`, normalised by
    head and gated by `sigmoid` of another projection. The sigmoid input gate never exceeds 1, so what exponential
    gates need to stay in range (a normaliser and a running maximum) falls away.

    Args:
        width: of the inputs. heads: their number. key: channels of keys as a share of the width, half in the paper.
        chunk: tokens between two states kept for the backward pass; memory of states is N / chunk of them, results
            do not change beyond rounding. None leaves it to the engine.
        input_bias: where the input gate's bias begins; -10 in the paper, which found lower ones to train steadily.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        key: float = 0.5,
        chunk: int | None = None,
        input_bias: float = -10.0,
    ) -> None:
        super().__init__()
        self.heads, self.chunk = heads, chunk
        keys = int(width * key)
        check_width(keys, heads, "width * key")
        self.query, self.key = nn.Linear(width, keys, bias=False), nn.Linear(width, keys, bias=False)
        self.value, self.gate = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.input, self.forget = nn.Linear(width, heads), nn.Linear(width, heads)
        self.norm, self.out = HeadNorm(heads, check_width(width, heads)), nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.input.bias.fill_(input_bias)
            self.forget.bias.copy_(torch.linspace(3, 6, heads))
            self.input.weight.zero_()
            self.forget.weight.zero_()

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        q, k, v = (to_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        out, after = scan(
            q, k, v, decay=F.logsigmoid(wide(self.forget(x))).mT, beta=wide(self.input(x)).sigmoid().mT,
            state=None if state is None else state.scan, mask=mask, cu_seqlens=cu_seqlens, chunk=self.chunk,
            return_state=True,
        )  # fmt: skip
        return self.out(from_heads(self.norm(out)) * self.gate(x).sigmoid()), MixerState(after)
