"""Networks whose gates read their own last output, in heads: Elman, LSTM, GRU and sLSTM.

The kernel after FlashRNN (Pöppel et al., 2024, arXiv 2412.07752). `Call` is what engines receive;
`gated_rnn` chooses an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tilewise.kernels import Choice, Engine, choose
from tilewise.kernels.gated_rnn import definition, native
from tilewise.kernels.gated_rnn import torch as torch_engine
from tilewise.kernels.gated_rnn.call import KINDS, Call, Kind

ENGINES: Mapping[str, Engine] = {
    "native": native,
    "torch": torch_engine,
    "definition": definition,
}


def gated_rnn(call: Call, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """Run `call` on the named engine, or for "auto" on the first that accepts it.

    Returns the outputs `[B, H, N, d]` and the final states `[S, H, P, d]`.
    """
    return ENGINES[choose(ENGINES, call, engine).engine].run(call)


def explain(call: Call, engine: str = "auto") -> Choice:
    """The engine that `gated_rnn` would run, and why each other one would not."""
    return choose(ENGINES, call, engine)


__all__ = ["ENGINES", "KINDS", "Call", "Kind", "explain", "gated_rnn"]
