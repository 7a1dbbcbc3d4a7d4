"""The selective scan as a function: small state spaces, one for each channel, steered by every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.kernels import Choice
from tilewise.kernels import selective_scan as kernel
from tilewise.recurrence.checks import DTYPES, check_floating, check_offsets, check_values
from tilewise.recurrence.state import Carried


@dataclass(frozen=True, eq=False)
class SelectiveState(Carried):
    """What `selective_scan` carries: `channels [Q, channels, S]` of each sequence, float32, float64 for float64
    inputs."""

    channels: Tensor


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    state: SelectiveState | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    engine: str = "auto",
    return_state: bool = False,
) -> Tensor | tuple[Tensor, SelectiveState]:
    """Diagonal state spaces whose step, input and output depend on the token (Gu and Dao, 2023, arXiv 2312.00752).

    Channel c has S states of its own:

        h_t = exp(delta_t A_c) h_{t-1} + delta_t x_t B_t,   y_t = C_t . h_t + D_c x_t

    Args:
        x: `[batch, N, channels]`, float16, bfloat16, float32 or float64, any strides (`[batch, channels, N]` is
            `x.mT`).
        delta: step sizes, at least 0 (after softplus), `[batch|1, N, channels]`, any floating dtype.
        A: rates, at most 0, `[channels, S]`.
        B, C: `[batch|1, N, S]`, or `[batch|1, groups, N, S]`, where channel c reads group
            c // (channels // groups).
        D: `[channels]`; None adds nothing.
        state: from an earlier call; None is zeros.
        mask: bool `[batch, N]`, False for padding on either side: it leaves the state alone and gets output 0.
        cu_seqlens: int `[Q + 1]` for sequences packed in a batch of one, as in `tilewise.recurrence.scan`.
        engine: "auto", or the name of an engine, which then runs or raises.
        return_state: also return the state after the last token.

    Returns:
        `[batch, N, channels]` in x's dtype, or that and a `SelectiveState`. Accumulated in float32 (float64 for
        float64 inputs).

    Raises:
        ValueError, TypeError: shapes, dtypes and values that do not fit (a positive rate, a negative step, a state
            of another shape); the message names the argument and what is accepted. Nothing is changed.
    """
    call = _bind(x, delta, A, B, C, D, state, mask, cu_seqlens)
    out, after = kernel.selective_scan(call, engine)
    if mask is not None:
        out = out.masked_fill(~mask.unsqueeze(2), 0)
    return (out, SelectiveState(after)) if return_state else out


def explain_selective(*given: Tensor, engine: str = "auto", **options) -> Choice:
    """The engine that `selective_scan` with the same arguments would run, and why each other one would not."""
    names = ("D", "state", "mask", "cu_seqlens")
    if unknown := sorted(set(options) - {*names, "return_state"}):
        raise TypeError(f"explain_selective takes the arguments of selective_scan, got {', '.join(unknown)}")
    return kernel.explain(_bind(*given, *(options.get(name) for name in names)), engine)


def _bind(x, delta, A, B, C, D, state, mask, cu_seqlens) -> kernel.Call:
    """The kernel's call of checked arguments."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"x must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 3:
        raise ValueError(f"x must be [batch, N, channels], got shape {tuple(x.shape)}")
    for name, part in (("delta", delta), ("A", A), ("B", B), ("C", C), ("D", D)):
        if part is not None or name != "D":
            check_floating(name, part, x, "x")
    batch, n, channels = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if A.ndim != 2 or A.shape[0] != channels or not A.shape[1]:
        raise ValueError(f"A must be [{channels}, S], got shape {tuple(A.shape)}")
    if D is not None and tuple(D.shape) != (channels,):
        raise ValueError(f"D must be [{channels}], got shape {tuple(D.shape)}")
    if delta.ndim != 3 or delta.shape[0] not in (1, batch) or delta.shape[1:] != x.shape[1:]:
        raise ValueError(f"delta must be [{batch}|1, {n}, {channels}], got shape {tuple(delta.shape)}")
    check_values("A", A, None, 0.0, "are rates of decay, so none is above 0")
    check_values("delta", delta, 0.0, torch.inf, "are step sizes, so none is below 0")
    delta = delta.to(delta.dtype if delta.dtype == x.dtype else wide).expand(x.shape)
    B, C = (_groups(name, part.to(x.dtype), x, A.shape[1]) for name, part in (("B", B), ("C", C)))
    if B.shape[1] != C.shape[1]:
        raise ValueError(f"B and C must have the same groups, got {B.shape[1]} and {C.shape[1]}")
    offsets = check_offsets(cu_seqlens, mask, x.unsqueeze(1))
    if (
        mask is not None
    ):  # no step is taken; what padding holds may be anything, and 0 times infinity is no number
        hidden = ~mask.unsqueeze(2)
        x, delta = x.masked_fill(hidden, 0), delta.masked_fill(hidden, 0)
        B, C = (part.masked_fill(hidden.unsqueeze(1), 0) for part in (B, C))
    sequences = batch if offsets is None else offsets.shape[0] - 1
    before = _channels(state, (sequences, *A.shape), x)
    wide_d = None if D is None else D.to(wide)
    return kernel.Call(x, delta, A.to(wide), B, C, wide_d, before, offsets)


def _channels(state: SelectiveState | None, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    """The states before the first token as the kernel wants them."""
    if state is None:
        return None
    if not isinstance(state, SelectiveState):
        raise TypeError(
            f"state must be None or the SelectiveState of an earlier call, got {type(state).__name__}"
        )
    check_floating("the state", state.channels, x, "x")
    if tuple(state.channels.shape) != shape:
        raise ValueError(f"the state must be {list(shape)}, got {list(state.channels.shape)}")
    return state.channels.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _groups(name: str, part: Tensor, x: Tensor, states: int) -> Tensor:
    """B or C as `[batch, groups, N, S]`."""
    batch, n, channels = x.shape
    made = part.unsqueeze(1) if part.ndim == 3 else part
    if made.ndim != 4 or made.shape[0] not in (1, batch) or tuple(made.shape[2:]) != (n, states):
        raise ValueError(
            f"{name} must be [{batch}|1, {n}, {states}] or [{batch}|1, groups, {n}, {states}], got shape"
            f" {tuple(part.shape)}"
        )
    if not made.shape[1] or channels % made.shape[1]:
        raise ValueError(f"groups of {name} must divide the {channels} channels, got {made.shape[1]}")
    return made.expand(batch, -1, -1, -1)
