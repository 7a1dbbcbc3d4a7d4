"""Launching kernels of the Triton engine: block sizes, tuning, and what is fixed when they are compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tilewise.kernels.attend_tiles.triton_layout import Layout
from tilewise.kernels.gpu import padded


class Config(NamedTuple):
    """Queries and keys in a block, warps, and stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


ROOMY = 160 * 1024  # bytes of shared memory that the first candidates may take; A100 and H100 have them
# Candidates by the largest head_dim they are for, best guess first: for 16-bit inputs, then for float32. The last
# takes at most 99 KiB, but for float32 beyond 256. Without a bias the compiler spills little of any.
Table = tuple[Mapping[int, tuple[Config, ...]], Mapping[int, tuple[Config, ...]]]
FORWARD: Table = (
    {
        64: (Config(128, 64, 4, 3), Config(128, 128, 8, 3), Config(64, 64, 4, 2)),
        128: (Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(64, 32, 4, 2)),
        256: (Config(128, 32, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 4, 2)),
        512: (Config(32, 32, 8, 2), Config(16, 16, 4, 2)),
    },
    {
        64: (Config(64, 32, 8, 2), Config(32, 32, 4, 2)),
        128: (Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
        256: (Config(32, 32, 8, 2), Config(32, 16, 8, 2)),
        512: (Config(16, 16, 8, 2),),
    },
)
BACKWARD: Table = (
    {
        64: (Config(64, 128, 8, 2), Config(64, 64, 4, 2)),
        128: (Config(64, 64, 8, 2), Config(32, 64, 4, 2)),
        256: (Config(32, 32, 8, 2),),
        512: (Config(16, 32, 8, 1), Config(16, 16, 4, 1)),
    },
    {
        64: (Config(32, 64, 8, 2), Config(32, 32, 4, 2)),
        128: (Config(32, 32, 8, 2),),
        256: (Config(16, 32, 8, 2), Config(16, 16, 8, 2)),
        512: (Config(16, 16, 8, 2),),
    },
)
INTERPRETER = Config(64, 64, 4, 1)

_TUNED: dict[tuple[str, ...], Any] = {}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is settled when they are first imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def roomy(device: torch.device) -> bool:
    """Whether a program may take as much shared memory on this device as the first candidates need."""
    if device.type != "cuda":
        return True
    has = torch.cuda.get_device_properties(device)
    return getattr(has, "shared_memory_per_block_optin", has.shared_memory_per_block) >= ROOMY


def stored(dtype: torch.dtype) -> torch.dtype:
    """What kernels compute and write as: the interpreter cannot multiply bfloat16, nor round to it."""
    return torch.float32 if dtype == torch.bfloat16 and interpreted() else dtype


def constants(layout: Layout) -> dict[str, Any]:
    """What all kernels of a call are compiled for."""
    import triton.language as tl

    q, d_v = layout.call.q, layout.call.v.shape[3]
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    # PyTorch's switch for TF32 has an old and a new name; only the new one may always be read.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D": q.shape[3],
        "D_V": d_v,
        "BLOCK_D": padded(q.shape[3]),
        "BLOCK_V": padded(d_v),
        "AXES": layout.view.pos.shape[3],
        "DOT": types[stored(q.dtype)],
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def candidates(layout: Layout, table: Table, most_m: int, most_n: int) -> list[Config]:
    """Block sizes for a call, best guess first, no larger than what holds `most_m` queries and `most_n` keys."""
    d = max(layout.call.q.shape[3], layout.call.v.shape[3])
    by_dim = table[layout.call.q.dtype == torch.float32]
    found = (INTERPRETER,) if interpreted() else by_dim[min(size for size in by_dim if d <= size)]
    if not roomy(layout.call.q.device):
        found = found[-1:]
    cut = (
        one._replace(block_m=min(one.block_m, padded(most_m)), block_n=min(one.block_n, padded(most_n)))
        for one in found
    )
    return list(dict.fromkeys(cut))


def launch(
    kernel: Any,
    programs: Callable[[int, int], int],
    tried: Sequence[Config],
    flags: Callable[[Config], dict[str, bool]],
    fixed: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> None:
    """Run `kernel` with that one of the configs `tried` which is fastest here.

    `programs` says how many programs there are for given blocks of queries and keys, `flags` what else a config
    settles, `fixed` are further constants. Tuning happens once for each choice of all of these. The first config
    is taken untried in the interpreter, and where bits must repeat: configs add in different orders.
    """
    import triton

    if not programs(tried[0].block_m, tried[0].block_n):
        return
    settled = [{"BLOCK_M": one.block_m, "BLOCK_N": one.block_n, **flags(one)} for one in tried]
    if interpreted() or len(tried) == 1 or torch.are_deterministic_algorithms_enabled():
        meta = {**settled[0], "num_warps": tried[0].warps, "num_stages": tried[0].stages}
        start(kernel, programs(tried[0].block_m, tried[0].block_n), {**arguments, **fixed, **meta})
        return
    given = [x is None for x in (arguments["softcap"], arguments["bias"].ptr, arguments["view"].dense)]
    key = (kernel.__name__, str(arguments["q"].ptr.device), repr(settled), repr(fixed), repr(given))
    if key not in _TUNED:
        choices = [
            triton.Config(meta, num_warps=one.warps, num_stages=one.stages)
            for meta, one in zip(settled, tried)
        ]
        _TUNED[key] = triton.autotune(configs=choices, key=[])(kernel)
    start(_TUNED[key], lambda meta: (programs(meta["BLOCK_M"], meta["BLOCK_N"]),), {**arguments, **fixed})


def start(kernel: Any, programs: int | Callable, arguments: Mapping[str, Any]) -> None:
    """Start a kernel. Joining products and sums, which older Tritons do by default, is said outright."""
    kernel[programs if callable(programs) else (programs,)](**arguments, enable_fp_fusion=True)
