"""The peeling decoder of sparse Walsh-Hadamard spectra.

`Call` is what engines receive; `peel_bins` chooses an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from tilewise.kernels import Choice, Engine, choose
from tilewise.kernels.peel_bins import definition, native
from tilewise.kernels.peel_bins import torch as torch_engine
from tilewise.kernels.peel_bins.call import Call, Peeled

ENGINES: Mapping[str, Engine] = {
    "native": native,
    "torch": torch_engine,
    "definition": definition,
}


def peel_bins(call: Call, engine: str = "auto") -> Peeled:
    """Run `call` on the named engine, or for "auto" on the first that accepts it."""
    return ENGINES[choose(ENGINES, call, engine).engine].run(call)


def explain(call: Call, engine: str = "auto") -> Choice:
    """The engine that `peel_bins` would run, and why each other one would not."""
    return choose(ENGINES, call, engine)


__all__ = ["ENGINES", "Call", "Peeled", "explain", "peel_bins"]
