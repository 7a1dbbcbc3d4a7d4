"""The long convolution: every channel with a kernel as long as the sequence, gated, causal or circular.

The kernel after FlashFFTConv (Fu et al., 2023, arXiv 2311.05908). `Call` is what engines receive; `long_conv`
chooses an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tilewise.kernels import Choice, Engine, choose
from tilewise.kernels.long_conv import definition, monarch, native
from tilewise.kernels.long_conv import torch as torch_engine
from tilewise.kernels.long_conv import triton as triton_engine
from tilewise.kernels.long_conv.call import Call

ENGINES: Mapping[str, Engine] = {
    "native": native,
    "torch": torch_engine,
    "monarch": monarch,
    "triton": triton_engine,
    "definition": definition,
}


def long_conv(call: Call, engine: str = "auto") -> Tensor:
    """Run `call` on the named engine, or for "auto" on the first that accepts it: `[B, C, N]`."""
    return ENGINES[choose(ENGINES, call, engine).engine].run(call)


def explain(call: Call, engine: str = "auto") -> Choice:
    """The engine that `long_conv` would run, and why each other one would not."""
    return choose(ENGINES, call, engine)


__all__ = ["ENGINES", "Call", "explain", "long_conv"]
