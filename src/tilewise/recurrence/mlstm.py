"""mLSTM: a matrix for a memory, written by exponential gates and read through a normaliser."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.api import scan
from tilewise.recurrence.mixer import Mixer, MixerState, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import ModelConfig, mixer


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """x kept smoothly within -cap and cap: `cap * tanh(x / cap)`."""
    return cap * torch.tanh(x / cap)


@mixer("mlstm")
class MLSTM(Mixer):
    """The mLSTM layer of xLSTM 7B (Beck et al., 2025, arXiv 2503.13427).

    With `i_t`, `f_t` linear in the token and soft-capped:

        C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T,  n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
        h_t = C_t^T q_t / max(|n_t^T q_t|, 1)

    with q_t divided by sqrt(D_k). C and n are kept divided by `exp(m_t)`, m_t the running maximum of
    `log sigmoid(f_t) + m_{t-1}` and `i_t`, so nothing overflows. h has a layer norm by head and a sigmoid gate.

    Args:
        width: of the inputs and of all values. heads: their number.
        key: channels of queries and keys as a share of the width. cap: of the gates.
        input_bias: of i at first: -10, so that a new layer writes little. forget_bias: of f at first, evenly from
            the first to the last head.

    Differs from the paper's code by no 1e-6 added to the denominator.

    Raises ValueError for sizes that do not divide and a cap that is not positive.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        key: float = 0.5,
        cap: float = 15.0,
        input_bias: float = -10.0,
        forget_bias: tuple[float, float] = (3.0, 6.0),
    ) -> None:
        super().__init__()
        if not cap > 0:
            raise ValueError(f"cap must be above 0, got {cap!r}")
        keys = int(width * key)
        self.heads, self.cap = heads, cap
        self.dim = check_width(width, heads)
        check_width(keys, heads, "width * key")
        self.query, self.key = nn.Linear(width, keys, bias=False), nn.Linear(width, keys, bias=False)
        self.value, self.gate = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.input, self.forget = nn.Linear(width, heads), nn.Linear(width, heads)
        self.scale = nn.Parameter(torch.ones(heads, 1, self.dim))
        self.out = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.input.bias.fill_(input_bias)
            self.forget.bias.copy_(torch.linspace(*forget_bias, heads))

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        q, k, v = (to_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        write, keep = (soft_cap(wide(part(x)), self.cap).mT for part in (self.input, self.forget))
        out, after = scan(
            q, k, v, decay=F.logsigmoid(keep), log_beta=write, normalize="bounded", mask=mask,
            cu_seqlens=cu_seqlens, state=None if state is None else state.scan, return_state=True,
        )  # fmt: skip
        out = F.layer_norm(wide(out), (self.dim,), eps=1e-6).to(x.dtype) * self.scale
        return self.out(from_heads(out) * self.gate(x).sigmoid()), MixerState(after)


def xlstm_7b(vocabulary: int = 50_304, width: int = 4096, blocks: int = 32, heads: int = 8) -> ModelConfig:
    """The layout of xLSTM 7B, at its own size or a small one (Beck et al., 2025, arXiv 2503.13427).

    Every block is RMS norm, mLSTM and RMS norm, SwiGLU of 8/3 of the width rounded up to 64, each added to the
    stream; embeddings and the output layer are apart, logits are soft-capped at 30. Give it to `SequenceModel`.
    """
    hidden = -(-round(8 * width / 3) // 64) * 64
    return ModelConfig(
        vocabulary,
        width,
        ("mlstm",) * blocks,
        {"mlstm": {"heads": heads}},
        hidden,
        tied=False,
        logit_cap=30.0,
    )
