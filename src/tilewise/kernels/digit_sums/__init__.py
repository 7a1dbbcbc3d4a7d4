"""Points whose digits are sums of columns: digital nets and lattices.

`Call` is what engines receive; `digit_sums` chooses an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tilewise.kernels import Choice, Engine, choose
from tilewise.kernels.digit_sums import definition, native
from tilewise.kernels.digit_sums import torch as torch_engine
from tilewise.kernels.digit_sums.call import Call

ENGINES: Mapping[str, Engine] = {
    "native": native,
    "torch": torch_engine,
    "definition": definition,
}


def digit_sums(call: Call, engine: str = "auto") -> Tensor:
    """Run `call` on the named engine, or for "auto" on the first that accepts it; `[copies, n, d]`."""
    return ENGINES[choose(ENGINES, call, engine).engine].run(call)


def explain(call: Call, engine: str = "auto") -> Choice:
    """The engine that `digit_sums` would run, and why each other one would not."""
    return choose(ENGINES, call, engine)


__all__ = ["ENGINES", "Call", "digit_sums", "explain"]
