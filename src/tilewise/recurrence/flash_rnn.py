"""FlashRNN: LSTM, GRU, Elman and sLSTM layers whose recurrent matrices are block-diagonal, a block for each
head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.gated import GATES, GatedState, gated_rnn
from tilewise.recurrence.mixer import HeadNorm, Mixer, check_width, from_heads
from tilewise.recurrence.model import mixer
from tilewise.recurrence.short_conv import ShortConv, convolved
from tilewise.recurrence.state import Carried

KEEPS = 1  # the gate by which a cell keeps its state: f of lstm and slstm, z of gru


@dataclass(frozen=True, eq=False)
class FlashRNNState(Carried):
    """What a `FlashRNN` carries: the network's state, and the last inputs of its short convolution."""

    cell: GatedState
    tails: tuple[Tensor, ...] = ()


class GateInputs(nn.Module):
    """What tokens give the gates, `[B, N, width]` to `[B, H, N, G, D]`: one linear layer, or one for each
    head.

    Args:
        width, heads, gates: sizes. dense: whether every head reads the whole token, or its own channels
            alone, as
            the sLSTM of xLSTM does: `heads` times fewer weights and operations.
    """

    def __init__(self, width: int, heads: int, gates: int, dense: bool = True) -> None:
        super().__init__()
        self.heads, self.gates, self.dense = heads, gates, dense
        reads = width if dense else width // heads
        self.weight = nn.Parameter(torch.empty(heads, gates * width // heads, reads))
        nn.init.uniform_(self.weight, -(reads**-0.5), reads**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.dense:
            made = F.linear(x, self.weight.flatten(0, 1))
            return made.unflatten(2, (self.heads, self.gates, -1)).transpose(1, 2)
        b, n, width = x.shape
        own = x.reshape(b * n, self.heads, width // self.heads).transpose(0, 1)
        made = torch.bmm(own, self.weight.mT)  # [h, b * n, g * d]
        return made.view(self.heads, b, n, self.gates, width // self.heads).transpose(0, 1)


class FlashRNN(Mixer):
    """A gated network in heads (Pöppel et al., 2024, arXiv 2412.07752), as a mixer.

    A linear layer gives what each token adds to the gates, `tilewise.recurrence.gated_rnn` runs the cell, an
    RMS norm by head and a linear layer follow. The mixers "elman", "lstm", "gru" and "slstm" are this one
    with their cell.

    Args:
        width: of the inputs and of all heads' outputs. heads: their number; the recurrent weights of a head
            are `width / heads` squared for each gate, so all of them shrink with the number of heads.
        cell: "elman", "lstm", "gru" or "slstm".
        inputs: "dense", heads read the whole token; "heads", each its own channels alone.
        conv: width of a short convolution of the inputs, and `silu` after it; 0 leaves it out.
        keep_bias: at first, of the gate that keeps the state (f; z of "gru"), so that a new layer remembers.

    Differs from the paper in nothing of the cells. The layer around them is ours: the paper leaves it open,
    and the layer of torch.nn has no norm and no output layer. The inputs have no bias beside that of the
    recurrent sums.

    Raises ValueError for sizes that do not divide, an unknown cell and other inputs.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        cell: str = "slstm",
        inputs: str = "dense",
        conv: int = 0,
        keep_bias: float = 1.0,
    ) -> None:
        super().__init__()
        if cell not in GATES:
            raise ValueError(f"cell must be one of {', '.join(map(repr, GATES))}, got {cell!r}")
        if inputs not in ("dense", "heads"):
            raise ValueError(f"inputs must be 'dense' or 'heads', got {inputs!r}")
        dim, gates = check_width(width, heads), GATES[cell]
        self.cell = cell
        self.convs = nn.ModuleList([ShortConv(width, conv)] if conv else [])
        self.inputs = GateInputs(width, heads, gates, inputs == "dense")
        self.weights = nn.Parameter(torch.empty(heads, gates, dim, dim))
        self.bias = nn.Parameter(torch.zeros(heads, gates, dim))
        self.norm = HeadNorm(heads, dim)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.uniform_(self.weights, -(dim**-0.5), dim**-0.5)
        if gates > KEEPS:
            nn.init.constant_(self.bias[:, KEEPS], keep_bias)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        packing = {"mask": mask, "cu_seqlens": cu_seqlens}
        (x,), tails = convolved(self.convs, [x], None if state is None else state.tails, **packing)
        gates = self.inputs(F.silu(x) if tails else x)
        out, after = gated_rnn(
            gates, self.weights, self.bias, cell=self.cell, state=None if state is None else state.cell,
            return_state=True, **packing,
        )  # fmt: skip
        return self.out(from_heads(self.norm(out))), FlashRNNState(after, tails)


for _cell in GATES:
    mixer(_cell)(partial(FlashRNN, cell=_cell))
