"""Checks of the arguments of the scans; each error names the argument, what was given and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.recurrence.state import State

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of queries, keys and values."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, H, N, D], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES or x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"q, k and v must share one floating dtype and device, got q {q.dtype} on {q.device} and {name}"
                f" {x.dtype} on {x.device}"
            )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            "q [B, H_q, N, D_k], k [B, H, N, D_k] and v [B, H, N, D_v] do not fit: got"
            f" {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads of q must be a multiple of those of k, got {q.shape[1]} and {k.shape[1]}")


def check_offsets(cu_seqlens: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The offsets of packed sequences as int64, or None."""
    b, n = q.shape[0], q.shape[2]
    if mask is not None:
        if cu_seqlens is not None:
            raise ValueError(
                "packed sequences (cu_seqlens) have no padding: give mask or cu_seqlens, not both"
            )
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError("mask must be a boolean tensor, True for tokens and False for padding")
        if tuple(mask.shape) != (b, n):
            raise ValueError(f"mask must be [{b}, {n}], got shape {tuple(mask.shape)}")
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError("cu_seqlens must be an integer tensor [S + 1]")
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must be [S + 1], got shape {tuple(cu_seqlens.shape)}")
    if b != 1:
        raise ValueError(f"packed sequences (cu_seqlens) are a batch of one, got {b}")
    offsets = cu_seqlens.to(q.device, torch.int64)
    if not torch.compiler.is_compiling():
        ends = offsets.tolist()
        if ends[0] != 0 or ends[-1] != n or any(a > b for a, b in zip(ends, ends[1:])):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {n} tokens that there are, got {_short(ends)}"
            )
    return offsets


def check_decay(decay: Tensor | None, k: Tensor, wide: torch.dtype) -> Tensor | None:
    """Log decays as `[B, H, N]` or `[B, H, N, D_k]` in the dtype that is accumulated in."""
    if decay is None:
        return None
    b, heads, n, d_k = k.shape
    check_floating("decay", decay, k)
    given = tuple(decay.shape)
    if decay.ndim == 1:
        decay = decay.view(1, -1, 1)
    shape = (b, heads, n) if decay.ndim == 3 else (b, heads, n, d_k)
    made = _expand(decay, shape)
    if made is None or (len(given) == 1 and given[0] != heads):
        raise ValueError(
            f"decay must be [{heads}], [{b}|1, {heads}|1, {n}] or [{b}|1, {heads}|1, {n}, {d_k}], got shape {given}"
        )
    check_values("decay", decay, None, 0.0, "are logs of factors in [0, 1], so none is above 0")
    return made.to(wide)


def check_beta(beta: Tensor | None, name: str, rule: str, k: Tensor, wide: torch.dtype) -> Tensor | None:
    """Strengths of the update as `[B, H, N]` in the dtype that is accumulated in."""
    if beta is None:
        return None
    check_floating(name, beta, k)
    made = _expand(beta, tuple(k.shape[:3]))
    if made is None:
        b, heads, n = k.shape[:3]
        raise ValueError(f"{name} must be [{b}|1, {heads}|1, {n}], got shape {tuple(beta.shape)}")
    if rule == "delta":
        check_values(
            name, beta, 0.0, 2.0, "of rule 'delta' lies in [0, 2]: beyond, the state grows without bound"
        )
    return made.to(wide)


def check_state(
    state: State | None, sequences: int, k: Tensor, v: Tensor, rule: str, normalize: str | None, gated: bool
) -> None:
    """Whether a state belongs to calls like this one."""
    if state is None:
        return
    if not isinstance(state, State):
        raise TypeError(f"state must be None or the State of an earlier call, got {type(state).__name__}")
    if state.rule != rule:
        raise ValueError(f"the state was made by rule {state.rule!r}, the call has rule {rule!r}")
    wanted = (sequences, k.shape[1], k.shape[3], v.shape[3])
    if tuple(state.matrix.shape) != wanted:
        raise ValueError(f"the state's matrix must be {list(wanted)}, got {list(state.matrix.shape)}")
    if (state.sums is None) != (normalize is None):
        had, has = (
            "with" if there else "without" for there in (state.sums is not None, normalize is not None)
        )
        raise ValueError(f"the state was made {had} normalize, the call is {has} it")
    if (state.peak is None) != (not gated):
        had, has = ("with" if there else "without" for there in (state.peak is not None, gated))
        raise ValueError(f"the state was made {had} log_beta, the call is {has} it")
    if state.matrix.device != k.device:
        raise TypeError(f"the state is on {state.matrix.device}, the call on {k.device}")


def check_floating(name: str, x: Tensor, like: Tensor, than: str = "the keys") -> None:
    """TypeError unless x is a floating tensor on the device of `like`, which messages call `than`."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.device != like.device:
        raise TypeError(f"{name} is on {x.device}, {than} on {like.device}")


def _expand(x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """x broadcast to shape along batch and heads, and along tokens where it has one for all; None if it cannot."""
    if x.ndim != len(shape) or any(have not in (1, want) for have, want in zip(x.shape, shape)):
        return None
    return x.expand(shape)


def check_values(name: str, x: Tensor, least: float | None, most: float, says: str) -> None:
    """ValueError unless all of x lies in [least, most] (None: any lower end); on a GPU the check does not wait."""
    if torch.compiler.is_compiling() or not x.numel():
        return
    low, high = (-torch.inf, x.detach().max()) if least is None else x.detach().aminmax()
    if x.is_cuda:  # no wait for the device
        torch._assert_async(high <= most, f"{name} {says}")
        return
    if not high <= most or (least is not None and not low >= least):
        found = f"up to {float(high):g}" if least is None else f"from {float(low):g} to {float(high):g}"
        raise ValueError(f"{name} {says}; got values {found}")


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"{numbers[:4]}...{numbers[-2:]}"
