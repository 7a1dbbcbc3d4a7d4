"""The Triton engine: GPUs; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1 before Tilewise is imported).

A program for each head of each sequence and each block of the values' channels goes through the tokens one after
the other, its part of the state in registers: the same loop for every rule and decay, and for decoding. It reads
what it must once, but multiplies no matrices. The backward pass keeps states `call.chunk` tokens apart and computes
those between again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.kernels.gpu import INTERPRETED, absent, too_wide
from tilewise.kernels.scan import op
from tilewise.kernels.scan.call import Call

EVERY = 32  # tokens between two kept states, where the call does not say
MOST = 8192  # numbers of the state that a program holds


def refuse(call: Call) -> str | None:
    """Why this call cannot run here."""
    q = call.q
    if reason := absent(q) or too_wide(q):
        return reason
    if call.k.shape[3] > 512:
        return "keys of more than 512 channels do not fit in a block"
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs and final states of `call`."""
    return op.run(call, "triton")


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator's forward on this engine."""
    out, after, _ = _forward(call, keep=False)
    return out.to(call.q.dtype), after


def backward(call: Call, d_out: Tensor, d_state: Tensor) -> op.Gradients:
    """Gradients of q, k, v, decay, beta and state."""
    from tilewise.kernels.scan import triton_steps

    (b, heads, n, d_k), d_v = call.k.shape, call.v.shape[3]
    group, blocks = call.q.shape[1] // heads, _blocks(call)
    _, _, kept = _forward(call, keep=True)
    make = call.q.new_zeros if call.offsets is not None else call.q.new_empty

    def room(*shape: int) -> Tensor:
        return make(shape, dtype=torch.float32)

    d_q, d_k_ = room(blocks, b, heads * group, n, d_k), room(blocks, b, heads, n, d_k)
    d_v_, d_first = room(b, heads, n, d_v), torch.empty_like(d_state, dtype=torch.float32)
    d_decay = None if call.decay is None else room(blocks, *call.decay.shape)
    d_beta = None if call.beta is None else room(blocks, *call.beta.shape)
    if not n or not call.sequences:
        d_first = d_state.float().clone()
    else:
        every, padded_k, width = _every(call), _padded(d_k), _width(call)
        scratch = room(call.sequences * heads * blocks, every, padded_k, width)
        start(
            triton_steps.backward, call, offsets=call.offsets, kept=kept, d_out=d_out.float().contiguous(),
            d_last=d_state.float().contiguous(), d_q=d_q, d_k=d_k_, d_v=d_v_, d_decay=d_decay, d_beta=d_beta,
            d_first=d_first, scratch=scratch, tokens=b * heads * n,
        )  # fmt: skip
    sums = [None if x is None else x.sum(0) for x in (d_decay, d_beta)]
    made = [d_q.sum(0).to(call.q.dtype), d_k_.sum(0).to(call.k.dtype), d_v_.to(call.v.dtype)]
    return (*made, *sums, None if call.state is None else d_first)  # type: ignore[return-value]


def _forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs and final states in float32, and the states that the backward pass begins from."""
    from tilewise.kernels.scan import triton_steps

    shape = (*call.q.shape[:3], call.v.shape[3])
    make = call.q.new_zeros if call.offsets is not None else call.q.new_empty
    out = make(shape, dtype=torch.float32)
    after = call.q.new_empty(call.state_shape(), dtype=torch.float32)
    first = None if call.state is None else call.state.float().contiguous()
    if not call.q.shape[2] or not call.sequences:
        return out, after.zero_() if first is None else first.clone(), None
    kept = None
    if keep:
        kept = after.new_empty(
            _slots(call) * (1 if call.offsets is not None else call.sequences), *after.shape[1:]
        )
    start(triton_steps.forward, call, first=first, offsets=call.offsets, out=out, last=after, kept=kept)
    return out, after, kept


def start(kernel: Any, call: Call, **arguments: Any) -> None:
    """Run a kernel with a program for each head of each sequence and each block of the values' channels."""
    grid = (call.sequences * call.k.shape[1], _blocks(call))
    with torch.cuda.device_of(call.q):
        kernel[grid](**_given(call), **arguments, **_sizes(call))


def _given(call: Call) -> dict[str, Any]:
    """What both kernels read. The interpreter cannot read bfloat16."""
    tensors = {"q": call.q, "k": call.k, "v": call.v}
    if INTERPRETED:
        tensors = {name: x.float() for name, x in tensors.items()}
    strides = {
        f"{name}_{axis}": stride for name, x in tensors.items() for axis, stride in zip("bhnd", x.stride())
    }
    decay, beta = (None if x is None else x.float().contiguous() for x in (call.decay, call.beta))
    return {**tensors, **strides, "decay": decay, "beta": beta}


def _sizes(call: Call) -> dict[str, Any]:
    return {
        "n": call.q.shape[2], "heads": call.k.shape[1], "group": call.q.shape[1] // call.k.shape[1],
        "every": _every(call), "slots": _slots(call), "scale": float(call.scale), "D_K": call.k.shape[3],
        "D_V": call.v.shape[3], "BLOCK_K": _padded(call.k.shape[3]), "BLOCK_V": _width(call),
        "CHANNELS": call.by_channel, "DELTA": call.rule == "delta", "enable_fp_fusion": True,
    }  # fmt: skip


def _every(call: Call) -> int:
    return min(EVERY if call.chunk is None else call.chunk, max(1, call.q.shape[2]))


def _slots(call: Call) -> int:
    """Kept states of a sequence, or of all packed ones."""
    n, every = call.q.shape[2], _every(call)
    return -(-n // every) if call.offsets is None else n // every + call.sequences + 1


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _width(call: Call) -> int:
    """Values' channels of a program."""
    return max(8, min(_padded(call.v.shape[3]), 64, MOST // _padded(call.k.shape[3])))


def _blocks(call: Call) -> int:
    return -(-call.v.shape[3] // _width(call))


op.IMPLEMENTATIONS["triton"] = op.Implementation(forward, backward)
