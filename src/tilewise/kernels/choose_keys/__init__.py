"""Which keys each query reads: the highest scores of an indexer, or those above a quantile, as compact lists.

Scores are sums over heads of rectified products, of all keys or of those in blocks that were chosen before; never
more than some rows of them are held. `Call` is what engines receive; `choose_keys` picks an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tilewise.kernels import Choice, Engine, choose
from tilewise.kernels.choose_keys import definition, native
from tilewise.kernels.choose_keys import torch as torch_engine
from tilewise.kernels.choose_keys.call import Call

ENGINES: Mapping[str, Engine] = {"native": native, "torch": torch_engine, "definition": definition}


def choose_keys(call: Call, engine: str = "auto") -> Tensor:
    """The keys of each query, ascending, -1 behind them: int32 `[B, lists, N_q, W]`, see `Call`.

    W is `top`, or `most` where that is given, or the number of keys if there are fewer.
    """
    return ENGINES[choose(ENGINES, call, engine).engine].run(call)


def explain(call: Call, engine: str = "auto") -> Choice:
    """The engine that `choose_keys` would run, and why each other one would not."""
    return choose(ENGINES, call, engine)


__all__ = ["ENGINES", "Call", "choose_keys", "explain"]
