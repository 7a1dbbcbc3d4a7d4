"""The Triton engine: GPUs; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1 before Tilewise is imported).

Chunks of tokens as products of matrices, forward and backward, with the states kept before each chunk of a part of
every sequence; `call.chunk` is how many tokens a part has. Few tokens, as in decoding, go one after the other with
the state in registers. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewise.kernels.gpu import INTERPRETED, absent, padded, too_wide
from tilewise.kernels.scan import op
from tilewise.kernels.scan.call import Call

FEW = 16  # tokens of a sequence, for which chunks do not pay
TILE = 64  # tokens of a chunk, if its keys are not too wide
# Numbers that a program holds of its state, and of a chunk's keys, which decays by channel multiply.
MOST_STATE, MOST_KEYS, MOST_DECAYING = 4096, 8192, 4096
WIDEST = 128  # values' channels of a program that holds no state
AT_ONCE = 1 << 26  # numbers kept of the chunks of a part: 256 MiB
# Of products: bfloat16 has fewer digits than those that are left by one in tf32; three of those give float32's.
PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32x3", torch.float32: "tf32x3"}


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
    from tilewise.kernels.scan import triton_chunks, triton_steps

    make = call.q.new_zeros if call.offsets is not None else call.q.new_empty
    out = make((*call.q.shape[:3], call.v.shape[3]), dtype=torch.float32 if INTERPRETED else call.q.dtype)
    state = _first_state(call)
    if call.q.shape[2] and call.sequences:
        given = _given(call)
        if call.q.shape[2] < FEW * (1 if call.offsets is None else call.sequences):
            _start(triton_steps.steps, _by_states(call), given, state=state, out=out)
        else:
            for part in _parts(call):
                kept = _states(call, part, given, state)
                grid = (part.slots, call.q.shape[1])
                _start(triton_chunks.outputs, grid, given, **part.given(), **kept, out=out)
    return out.to(call.q.dtype), state


def backward(call: Call, d_out: Tensor, d_state: Tensor) -> op.Gradients:
    """Gradients of q, k, v, decay, beta and state."""
    from tilewise.kernels.scan import triton_gradients

    make = torch.zeros_like if call.offsets is not None else torch.empty_like
    found = {
        f"d_{name}": None if x is None else make(x, dtype=torch.float32, memory_format=torch.contiguous_format)
        for name, x in (("q", call.q), ("k", call.k), ("v", call.v), ("decay", call.decay), ("beta", call.beta))
    }  # fmt: skip
    d_state = d_state.float().clone(memory_format=torch.contiguous_format)
    if call.q.shape[2] and call.sequences:
        given = _given(call) | {"d_out": d_out.float().contiguous()}
        *parts, last = _parts(call)
        states = [_first_state(call)]
        for part in parts:
            states.append(states[-1].clone())
            _states(call, part, given, states[-1])
        for part in (last, *reversed(parts)):
            kept = _states(call, part, given, states.pop())
            room = {"d_kept": _of_states(call, part), "d_own": _of_chunks(call, part)}
            every = {**given, **part.given(), **kept, **room}
            heads, width = call.k.shape[1], min(padded(call.v.shape[3]), WIDEST)
            grid = (part.slots, heads, -(-call.v.shape[3] // width))
            _start(triton_gradients.d_values, grid, every, BLOCK_V=width)
            _start(triton_gradients.d_states, _by_states(call), every, d_state=d_state)
            _start(triton_gradients.d_keys, (part.slots, heads), every, **found)
            _start(triton_gradients.d_queries, (part.slots, heads), every, **found)
    d_q, d_k, d_v = (found[f"d_{name}"].to(call.q.dtype) for name in "qkv")  # type: ignore[union-attr]
    return d_q, d_k, d_v, found["d_decay"], found["d_beta"], None if call.state is None else d_state


@dataclass(frozen=True, eq=False)
class _Part:
    """Some tokens of every sequence, and the slots of their chunks: see `triton_chunks`."""

    skip: int
    part: int
    per: int
    slots: int
    firsts: Tensor | None
    owners: Tensor | None

    def given(self) -> dict[str, Any]:
        """What kernels are told of it."""
        return {name: getattr(self, name) for name in ("skip", "part", "per", "firsts", "owners")}


def _parts(call: Call) -> Iterator[_Part]:
    """In the order of time, with the same number of tokens of every sequence that has as many.

    Nothing is asked of a GPU: of packed sequences, only it knows the lengths.
    """
    n, s, tile, offsets = call.q.shape[2], call.sequences, _tile(call), call.offsets
    d_k, d_v = call.k.shape[3], call.v.shape[3]
    most = max(1, AT_ONCE // (call.k.shape[1] * (d_k * d_v + tile * (d_v + tile))))
    part = -(-n // tile) * tile if call.chunk is None else max(1, call.chunk // tile) * tile
    if call.chunk is None and (part // tile * s if offsets is None else n // tile + s) > most:
        part = max(1, most // s) * tile
    for skip in range(0, n, part):
        per = -(-min(part, n - skip) // tile)
        if offsets is None:
            yield _Part(skip, part, per, per * s, None, None)
            continue
        slots = min(n // tile + s, per * s)
        counts = ((offsets.diff() - skip).clamp(0, part) + tile - 1) // tile
        ends = counts.cumsum(0)
        owners = torch.searchsorted(ends, torch.arange(slots, device=ends.device), right=True)
        yield _Part(skip, part, per, slots, ends - counts, owners.clamp(max=s - 1))


def _states(call: Call, part: _Part, given: dict[str, Any], state: Tensor) -> dict[str, Tensor | None]:
    """What is kept of every slot; `state` becomes that after the part."""
    from tilewise.kernels.scan import triton_chunks

    heads, tile, kept = call.k.shape[1], _tile(call), _of_states(call, part)
    inverses = values = None
    if call.rule == "delta":
        inverses, values = state.new_empty(part.slots, heads, tile, tile), _of_chunks(call, part)
        _start(triton_chunks.invert, (part.slots, heads), given, **part.given(), inverses=inverses)
    made = {"inverses": inverses, "kept": kept, "values": values}
    _start(triton_chunks.states, _by_states(call), given, **part.given(), **made, state=state)
    return made


def _of_states(call: Call, part: _Part) -> Tensor:
    shape = (part.slots, *call.state_shape()[1:])
    return torch.empty(shape, dtype=torch.float32, device=call.q.device)


def _of_chunks(call: Call, part: _Part) -> Tensor:
    shape = (part.slots, call.k.shape[1], _tile(call), call.v.shape[3])
    return torch.empty(shape, dtype=torch.float32, device=call.q.device)


def _first_state(call: Call) -> Tensor:
    """In float32, to be written over."""
    if call.state is not None:
        return call.state.float().clone(memory_format=torch.contiguous_format)
    return torch.zeros(call.state_shape(), dtype=torch.float32, device=call.q.device)


def _start(kernel: Any, grid: tuple[int, ...], given: dict[str, Any], **more: Any) -> None:
    """Run a kernel on those of the arguments that it has."""
    every = given | more
    start(kernel, grid, {name: every[name] for name in kernel.arg_names}, 8 if every["BLOCK_K"] > 32 else 4)


def start(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int) -> None:
    """Run a kernel."""
    with torch.cuda.device_of(arguments["k"]):
        kernel[grid](**arguments, num_warps=warps, num_stages=1, enable_fp_fusion=True)


def _given(call: Call) -> dict[str, Any]:
    """What kernels read and their sizes. The interpreter cannot read bfloat16."""
    tensors = {"q": call.q, "k": call.k, "v": call.v}
    if INTERPRETED:
        tensors = {name: x.float() for name, x in tensors.items()}
    strides = {
        f"{name}_{axis}": stride for name, x in tensors.items() for axis, stride in zip("bhnd", x.stride())
    }
    decay, beta = (None if x is None else x.float().contiguous() for x in (call.decay, call.beta))
    tile = _tile(call)
    sizes = {
        "n": call.q.shape[2], "heads": call.k.shape[1], "group": call.q.shape[1] // call.k.shape[1],
        "scale": float(call.scale), "D_K": call.k.shape[3], "D_V": call.v.shape[3],
        "BLOCK_K": padded(call.k.shape[3]), "BLOCK_V": _width(call), "C": tile, "LEVELS": tile.bit_length() - 1,
        "DECAY": "none" if decay is None else "channel" if call.by_channel else "scalar",
        "DELTA": call.rule == "delta",
        "PRECISION": PRECISION[call.q.dtype] if torch.version.hip is None else "ieee",
    }  # fmt: skip
    return {**tensors, **strides, "decay": decay, "beta": beta, "offsets": call.offsets, **sizes}


def _by_states(call: Call) -> tuple[int, int]:
    """A program for each head of each sequence and each block of the values' channels."""
    return call.sequences * call.k.shape[1], _blocks(call)


def _tile(call: Call) -> int:
    """Tokens of a chunk."""
    most = (MOST_DECAYING if call.by_channel else MOST_KEYS) // padded(call.k.shape[3])
    return max(16, min(TILE, padded(call.q.shape[2]), most))


def _width(call: Call) -> int:
    """Values' channels of a program."""
    return max(16, min(padded(call.v.shape[3]), 64, MOST_STATE // padded(call.k.shape[3])))


def _blocks(call: Call) -> int:
    return -(-call.v.shape[3] // _width(call))


op.IMPLEMENTATIONS["triton"] = op.Implementation(forward, backward)
