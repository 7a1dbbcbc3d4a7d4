"""The selective scan: diagonal state spaces of many channels, steered by every token.

The kernel of Mamba. `Call` is what engines receive; `selective_scan` chooses an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tilewise.kernels import Choice, Engine, choose
from tilewise.kernels.selective_scan import definition, native
from tilewise.kernels.selective_scan import torch as torch_engine
from tilewise.kernels.selective_scan.call import Call

ENGINES: Mapping[str, Engine] = {
    "native": native,
    "torch": torch_engine,
    "definition": definition,
}


def selective_scan(call: Call, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """Run `call` on the named engine, or for "auto" on the first that accepts it.

    Returns the outputs `[batch, N, channels]` and the final states `[Q, channels, S]`.
    """
    return ENGINES[choose(ENGINES, call, engine).engine].run(call)


def explain(call: Call, engine: str = "auto") -> Choice:
    """The engine that `selective_scan` would run, and why each other one would not."""
    return choose(ENGINES, call, engine)


__all__ = ["ENGINES", "Call", "explain", "selective_scan"]
