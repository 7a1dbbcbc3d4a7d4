"""Linear recurrences with a matrix for a state, by the additive or the delta rule, with decays.

The kernel of linear attention, retention, gated and delta networks, mLSTM and Mamba-2. `Call` is what engines
receive; `scan` chooses an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tilewise.kernels import Choice, Engine, choose
from tilewise.kernels.scan import definition, native
from tilewise.kernels.scan import torch as torch_engine
from tilewise.kernels.scan import triton as triton_engine
from tilewise.kernels.scan.call import RULES, Call

ENGINES: Mapping[str, Engine] = {
    "triton": triton_engine,
    "native": native,
    "torch": torch_engine,
    "definition": definition,
}


def scan(call: Call, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """Run `call` on the named engine, or for "auto" on the first that accepts it.

    Returns the outputs `[B, H_q, N, D_v]` and the final states `[S, H, D_k, D_v]`.
    """
    return ENGINES[choose(ENGINES, call, engine).engine].run(call)


def explain(call: Call, engine: str = "auto") -> Choice:
    """The engine that `scan` would run, and why each other one would not."""
    return choose(ENGINES, call, engine)


__all__ = ["ENGINES", "RULES", "Call", "explain", "scan"]
