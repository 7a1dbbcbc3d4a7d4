"""Gated networks as a function: Elman, LSTM, GRU and sLSTM, head by head, each reading its own last
output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.kernels import Choice
from tilewise.kernels import gated_rnn as kernel
from tilewise.recurrence.checks import DTYPES, check_offsets
from tilewise.recurrence.state import Carried

GATES = {name: kind.gates for name, kind in kernel.KINDS.items()}  # that each cell has


@dataclass(frozen=True, eq=False)
class GatedState(Carried):
    """What `gated_rnn` carries; hand it to the next call.

    Attributes:
        parts: float32 (float64 for float64 inputs) `[S, H, P, D]` for each of S sequences: h for "elman" and
            "gru"; h and c for "lstm"; for "slstm" h, c, n and m, the last two the sum of weights and the log
            that it and c are divided by.
        cell: that it belongs to.
    """

    parts: Tensor
    cell: str = "lstm"


def gated_rnn(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    *,
    cell: str = "lstm",
    state: GatedState | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    engine: str = "auto",
    return_state: bool = False,
    layout: str = "bhnd",
) -> Tensor | tuple[Tensor, GatedState]:
    """A recurrence that is not linear, in heads that do not see each other (Pöppel et al., 2024, arXiv
    2412.07752).

    A token gives gate g `x_g`, for all tokens at once from a linear layer; the network's own last output
    gives it `r_g = weights_g h + bias_g`. With `s_g = x_g + r_g` and S the sigmoid:

        "elman"  one gate          h = tanh(s)
        "lstm"   gates i, f, z, o  c = S(s_f) c + S(s_i) tanh(s_z);  h = S(s_o) tanh(c)
        "gru"    gates r, z, n     n = tanh(x_n + S(s_r) r_n);  h = (1 - S(s_z)) n + S(s_z) h
        "slstm"  gates i, f, z, o  c = S(s_f) c + e^s_i tanh(s_z);  n = S(s_f) n + e^s_i;  h = S(s_o) c / n

    sLSTM keeps c and n divided by their largest weight so far, so e^s_i may be of any size. Because gates
    read h, such networks keep track of states (parity, permutations), which recurrences linear in their state
    with factors in [0, 1] cannot; and because they do, tokens can only be taken one after the other.

    Args:
        x: `[B, H, N, G, D]`, float16, bfloat16, float32 or float64, any strides: G gates of D units for H
            heads.
        weights: `[H, G, D, D]`; `weights[h, g, j]` reads the last output of head h for gate g of unit j. All
            heads side by side are one layer whose recurrent matrices are block-diagonal. bias: `[H, G, D]`.
        cell: "elman", "lstm", "gru" or "slstm", as above. The order of gates and, with one head, the results
            are those of `torch.nn`.
        state: from an earlier call with the same cell; None is zeros, for "slstm" nothing seen.
        mask: bool `[B, N]`, False for padding on either side: it leaves the state alone and gets output 0.
        cu_seqlens: int `[S + 1]` for sequences packed in a batch of one, as `tilewise.recurrence.scan` takes
            them.
        engine: "auto", or the name of an engine, which then runs or raises.
        return_state: also return the state after the last token.
        layout: "bhnd", or "bnhd" for x `[B, N, H, G, D]` and the output likewise (a stride view, never a
            copy).

    Returns:
        The outputs h, `[B, H, N, D]` in x's dtype, or those and a `GatedState`. Sums are float32 (float64 for
        float64 inputs).

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what is accepted.
    """
    call = _bind(x, weights, bias, cell, state, mask, cu_seqlens, layout)
    out, after = kernel.gated_rnn(call, engine)
    if layout == "bnhd":
        out = out.transpose(1, 2)
    return (out, GatedState(after, cell)) if return_state else out


def explain_gated(
    x: Tensor, weights: Tensor, bias: Tensor | None = None, *, engine: str = "auto", **options
) -> Choice:
    """The engine that `gated_rnn` with the same arguments would run, and why each other one would not."""
    given = {name: options.pop(name, None) for name in ("state", "mask", "cu_seqlens")}
    given |= {"cell": options.pop("cell", "lstm"), "layout": options.pop("layout", "bhnd")}
    options.pop("return_state", None)
    if options:
        raise TypeError(f"explain_gated takes the arguments of gated_rnn, got {', '.join(options)}")
    return kernel.explain(_bind(x, weights, bias, **given), engine)


def _bind(x, weights, bias, cell, state, mask, cu_seqlens, layout) -> kernel.Call:
    """Check the arguments; the kernel's call."""
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd', got {layout!r}")
    if cell not in GATES:
        raise ValueError(f"cell must be one of {', '.join(map(repr, GATES))}, got {cell!r}")
    if layout == "bnhd" and isinstance(x, Tensor) and x.ndim == 5:
        x = x.transpose(1, 2)
    _check_tensors(x, weights, bias, GATES[cell])
    offsets = check_offsets(cu_seqlens, mask, x)
    sequences = x.shape[0] if offsets is None else offsets.shape[0] - 1
    wanted = [sequences, x.shape[1], len(kernel.KINDS[cell].parts), x.shape[4]]
    _check_state(state, cell, wanted, x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = None if state is None else state.parts.to(wide)
    return kernel.Call(x, weights, bias, parts, mask, offsets, cell)


def _check_tensors(x: Tensor, weights: Tensor, bias: Tensor | None, gates: int) -> None:
    for name, given in (("x", x), ("weights", weights), ("bias", bias)):
        if given is None and name == "bias":
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        if given.dtype not in DTYPES or given.dtype != x.dtype or given.device != x.device:
            raise TypeError(
                "x, weights and bias must share one floating dtype and device, got x"
                f" {x.dtype} on {x.device} and {name} {given.dtype} on {given.device}"
            )
    if x.ndim != 5 or x.shape[3] != gates or not x.shape[1] or not x.shape[4]:
        raise ValueError(
            f"x must be [B, H, N, {gates}, D] with at least one head and unit, got {tuple(x.shape)}"
        )
    heads, d = x.shape[1], x.shape[4]
    if weights.shape != (heads, gates, d, d):
        raise ValueError(f"weights must be {[heads, gates, d, d]} for this x, got {list(weights.shape)}")
    if bias is not None and bias.shape != (heads, gates, d):
        raise ValueError(f"bias must be {[heads, gates, d]} for this x, got {list(bias.shape)}")


def _check_state(state: GatedState | None, cell: str, wanted: list[int], x: Tensor) -> None:
    if state is None:
        return
    if not isinstance(state, GatedState):
        raise TypeError(
            f"state must be None or the GatedState of an earlier call, got {type(state).__name__}"
        )
    if state.cell != cell:
        raise ValueError(f"the state was made by cell {state.cell!r}, the call has cell {cell!r}")
    if list(state.parts.shape) != wanted:
        raise ValueError(f"the state's parts must be {wanted}, got {list(state.parts.shape)}")
    if state.parts.device != x.device:
        raise TypeError(f"the state is on {state.parts.device}, the call on {x.device}")
