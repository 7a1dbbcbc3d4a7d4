"""The long convolution as a function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.convolution.checks import check_kernel, check_sparsity
from tilewise.convolution.frequency import FrequencySparsity
from tilewise.convolution.prepared import PreparedKernel
from tilewise.convolution.ragged import by_length, last_inputs, sequences
from tilewise.convolution.state import ConvState
from tilewise.kernels import Choice
from tilewise.kernels import long_conv as kernel_op
from tilewise.recurrence.checks import DTYPES, check_floating, check_offsets


def long_conv(
    x: Tensor,
    kernel: Tensor | PreparedKernel,
    *,
    causal: bool = True,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    skip: Tensor | None = None,
    state: ConvState | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sparsity: FrequencySparsity | None = None,
    engine: str = "auto",
    return_state: bool = False,
) -> Tensor | tuple[Tensor, ConvState]:
    """Every channel convolved with its own kernel, as long as the sequence if need be (FlashFFTConv, Fu et
    al., 2023, arXiv 2311.05908).

    With `u = gate_in * x`:

        y_t = gate_out_t * (sum_k kernel_k u_{t - k} + skip * u_t)

    Args:
        x: `[B, C, N]`, float16, bfloat16, float32 or float64, any strides (`[B, N, C]` is `x.mT`).
        kernel: `[C, K]`, any K >= 1, floating, or what `prepare` made of it. A kernel shorter than N costs as
            much as its own length asks for (a partial convolution).
        causal: True: inputs before the first token are those of `state`, or 0. False: circular, t - k counts
            modulo N; a longer kernel goes around.
        gate_in, gate_out: `[B|1, C|1, N|1]`; None is 1. skip: `[C]`; None is 0.
        state: from an earlier causal call; None is zeros.
        mask: bool `[B, N]`, False for padding anywhere: tokens behind it follow those before it, and it gets
            0.
        cu_seqlens: int `[S + 1]` for sequences packed in a batch of one. Sequences of like length are
            computed together.
        sparsity: frequencies of the kernel that count, of a circular convolution; None: all of them.
        engine: "auto", or the name of an engine, which then runs or raises.
        return_state: also return the inputs that later tokens of a causal convolution can still reach.

    Returns:
        `[B, C, N]` in x's dtype, or that and a `ConvState`. Computed in float32 (float64 for float64 inputs).

    Causal and split anywhere, with states handed on, it gives what the whole would, to rounding. A causal
    result is computed through transforms of whole windows: later tokens change earlier outputs by rounding, never
    more.

    Raises:
        ValueError, TypeError: shapes, dtypes and values that do not fit; the message names the argument and
            what is accepted. Nothing is changed.
    """
    call, offsets, taken = _bind(
        x, kernel, causal, gate_in, gate_out, skip, state, mask, cu_seqlens, sparsity, return_state
    )
    if mask is None and offsets is None:
        out = kernel_op.long_conv(call, engine)
        if not return_state:
            return out
        return out, ConvState(_last(_inputs(call), call.before, call.kernel.shape[1] - 1))
    rows = sequences(mask, offsets, x.shape[2])

    def run(x: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, before: Tensor | None) -> Tensor:
        part = replace(call, x=x, gate_in=gate_in, gate_out=gate_out, before=before, transform=None)
        if taken is not None:
            part = replace(part, transform=taken.of(x.shape[2], before is not None))
        if part.sparse and x.shape[2] % part.rows:
            raise ValueError(f"rows of sparsity must divide every length, got {part.rows} and {x.shape[2]}")
        return kernel_op.long_conv(part, engine)

    out = by_length(run, rows, [call.x, call.gate_in, call.gate_out], call.before, exact=not causal)
    if not return_state:
        return out
    return out, ConvState(last_inputs(_inputs(call), rows, call.before, call.kernel.shape[1] - 1))


def two_sided_conv(
    x: Tensor,
    after: Tensor,
    before: Tensor,
    *,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    skip: Tensor | None = None,
    engine: str = "auto",
) -> Tensor:
    """A convolution that looks both ways: `y_t = gate_out_t * (sum_k after_k u_{t-k} + sum_k before_k
    u_{t+1+k} + skip * u_t)`, `u = gate_in * x`, and nothing beyond the ends.

    Args:
        x: `[B, C, N]`. after: `[C, K]`, what a token leaves to itself and later ones. before: `[C, M]`, to
            earlier ones, the nearest first. Others as for `long_conv`.

    It is one circular convolution over N zeros more, in which earlier tokens are the far end of a kernel.
    Raises as `long_conv` does.
    """
    check_kernel(after)
    check_kernel(before)
    n = x.shape[-1]
    after, before = after[:, :n], before[:, :n].to(after.dtype)
    reach = n + max(after.shape[1], before.shape[1])
    size = 1 << max(0, reach - 1).bit_length()

    def padded(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        return F.pad(part.expand(part.shape[0], part.shape[1], n), (0, size - n))

    middle = after.new_zeros(after.shape[0], size - after.shape[1] - before.shape[1])
    kernel = torch.cat((after, middle, before.flip(1)), 1)
    made = long_conv(
        F.pad(x, (0, size - n)), kernel, causal=False, gate_in=padded(gate_in), gate_out=padded(gate_out),
        skip=skip, engine=engine,
    )  # fmt: skip
    return cast(Tensor, made)[..., :n]


def explain_conv(
    x: Tensor, kernel: Tensor | PreparedKernel, *, engine: str = "auto", **options: Any
) -> Choice:
    """The engine that `long_conv` with the same arguments would run, and why each other one would not."""
    names = (
        "causal",
        "gate_in",
        "gate_out",
        "skip",
        "state",
        "mask",
        "cu_seqlens",
        "sparsity",
        "return_state",
    )
    if unknown := sorted(set(options) - set(names)):
        raise TypeError(f"explain_conv takes the arguments of long_conv, got {', '.join(unknown)}")
    given = {"causal": True, "return_state": False} | options
    call, _, _ = _bind(x, kernel, *(given.get(name) for name in names))
    return kernel_op.explain(call, engine)


def _bind(
    x, kernel, causal, gate_in, gate_out, skip, state, mask, cu_seqlens, sparsity, return_state
) -> tuple[kernel_op.Call, Tensor | None, PreparedKernel | None]:
    """The kernel's call of checked arguments, the offsets of packed sequences, and the prepared kernel."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"x must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 3:
        raise ValueError(f"x must be [B, C, N], got shape {tuple(x.shape)}")
    b, channels, n = x.shape
    taken = kernel if isinstance(kernel, PreparedKernel) else None
    if taken is not None:
        if (taken.causal, taken.sparsity) != (causal, sparsity):
            raise ValueError(
                f"the kernel was prepared for causal={taken.causal}, sparsity={taken.sparsity}, the call has"
                f" causal={causal}, sparsity={sparsity}"
            )
        kernel = taken.kernel
    check_kernel(kernel)
    if kernel.shape[0] != channels:
        raise ValueError(f"kernel must be [{channels}, K], got shape {tuple(kernel.shape)}")
    check_floating("kernel", kernel, x, "x")
    offsets = check_offsets(cu_seqlens, mask, x)
    whole = n if mask is None and offsets is None else 0
    rows, kept, band = check_sparsity(sparsity, causal, whole)
    if sparsity is not None and (mask is not None or offsets is not None):
        rows, kept, band = sparsity.rows, sparsity.kept, sparsity.band
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gate_in, gate_out = (
        _gate(name, gate, x) for name, gate in (("gate_in", gate_in), ("gate_out", gate_out))
    )
    if skip is not None:
        check_floating("skip", skip, x, "x")
        if tuple(skip.shape) != (channels,):
            raise ValueError(f"skip must be [{channels}], got shape {tuple(skip.shape)}")
        skip = skip.to(wide)
    count = b if offsets is None else offsets.shape[0] - 1
    before = _before(state, (count, channels, kernel.shape[1] - 1), causal, return_state, x)
    if mask is not None:  # what padding holds may be anything, and 0 times infinity is no number
        hidden = ~mask.unsqueeze(1)
        x = x.masked_fill(hidden, 0)
        gate_in, gate_out = (g if g is None else g.masked_fill(hidden, 0) for g in (gate_in, gate_out))
    transform = None
    if taken is not None and mask is None and offsets is None:
        transform = taken.of(n, before is not None)
    made = kernel_op.Call(
        x, kernel.to(wide), gate_in, gate_out, skip, before, transform, causal, rows, kept, band
    )
    return made, offsets, taken


def _gate(name: str, gate: Tensor | None, x: Tensor) -> Tensor | None:
    if gate is None:
        return None
    check_floating(name, gate, x, "x")
    if gate.ndim != 3 or any(have not in (1, want) for have, want in zip(gate.shape, x.shape)):
        b, channels, n = x.shape
        raise ValueError(f"{name} must be [{b}|1, {channels}|1, {n}|1], got shape {tuple(gate.shape)}")
    return gate.to(x.dtype).expand(x.shape)


def _before(
    state: ConvState | None, shape: tuple[int, ...], causal: bool, return_state: bool, x: Tensor
) -> Tensor | None:
    """The inputs before the first token as the kernel wants them."""
    if not causal and (state is not None or return_state):
        raise ValueError("a circular convolution (causal=False) has no state: it reads all of its inputs")
    if state is None:
        return None
    if not isinstance(state, ConvState):
        raise TypeError(f"state must be None or the ConvState of an earlier call, got {type(state).__name__}")
    check_floating("the state", state.inputs, x, "x")
    if tuple(state.inputs.shape) != shape:
        raise ValueError(f"the state must be {list(shape)}, got {list(state.inputs.shape)}")
    return state.inputs.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _inputs(call: kernel_op.Call) -> Tensor:
    """Gated inputs, as engines compute them."""
    u = call.x.to(call.wide)
    return u if call.gate_in is None else u * call.gate_in


def _last(u: Tensor, before: Tensor | None, count: int) -> Tensor:
    """The last `count` inputs, those before the first token among them; nothing else is held."""
    n = u.shape[2]
    if n >= count:
        return u[..., n - count :].clone()
    front = u.new_zeros(*u.shape[:2], count - n) if before is None else before[..., n:]
    return torch.cat((front, u), 2)
