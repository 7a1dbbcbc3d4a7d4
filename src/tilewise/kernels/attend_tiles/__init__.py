"""Attention over chosen tiles: softmax(scale * q k^T + bias) v over the visible keys of the tiles kept.

The one kernel that every attention method runs on. `Call` is what engines receive; `attend` chooses an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from tilewise.kernels import Choice, Engine, choose
from tilewise.kernels.attend_tiles import definition, flex, native, sdpa, triton
from tilewise.kernels.attend_tiles import torch as torch_engine
from tilewise.kernels.attend_tiles.call import Call
from tilewise.tiles import Partial

ENGINES: Mapping[str, Engine] = {
    "native": native,
    "sdpa": sdpa,
    "triton": triton,
    "torch": torch_engine,
    "flex": flex,
    "definition": definition,
}


def attend(call: Call, engine: str = "auto") -> Partial:
    """Run `call` on the named engine, or for "auto" on the first that accepts it.

    Returns a Partial; its lse is None when `call.need_lse` is False and the engine has none to give.
    """
    return ENGINES[choose(ENGINES, call, engine).engine].run(call)


def explain(call: Call, engine: str = "auto") -> Choice:
    """The engine that `attend` would run, and why each other one would not."""
    return choose(ENGINES, call, engine)


__all__ = ["ENGINES", "Call", "attend", "explain"]
