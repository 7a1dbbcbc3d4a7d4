"""The Walsh-Hadamard transform of rows, and its relatives of sizes that are not powers of two.

`Call` is what engines receive; `fwht` chooses an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tilewise.kernels import Choice, Engine, choose
from tilewise.kernels.fwht import definition, native
from tilewise.kernels.fwht import torch as torch_engine
from tilewise.kernels.fwht.call import Call

ENGINES: Mapping[str, Engine] = {
    "native": native,
    "torch": torch_engine,
    "definition": definition,
}


def fwht(call: Call, engine: str = "auto") -> Tensor:
    """Run `call` on the named engine, or for "auto" on the first that accepts it; `[rows, n]`."""
    return ENGINES[choose(ENGINES, call, engine).engine].run(call)


def explain(call: Call, engine: str = "auto") -> Choice:
    """The engine that `fwht` would run, and why each other one would not."""
    return choose(ENGINES, call, engine)


__all__ = ["ENGINES", "Call", "explain", "fwht"]
