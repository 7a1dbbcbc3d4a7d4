"""The functions of the recurrence room: scan, and which engine it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilewise.kernels import Choice
from tilewise.kernels import scan as kernel
from tilewise.recurrence.checks import check_beta, check_decay, check_offsets, check_state, check_tensors
from tilewise.recurrence.gates import running_peak, stabilised
from tilewise.recurrence.state import State

NORMALIZE = (None, "sum", "bounded")


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    log_beta: Tensor | None = None,
    rule: str = "add",
    normalize: str | None = None,
    scale: float | None = None,
    state: State | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    engine: str = "auto",
    return_state: bool = False,
    layout: str = "bhnd",
) -> Tensor | tuple[Tensor, State]:
    """A recurrence whose state is a matrix for each head: linear attention and its relatives, in linear time.

    With `S' = diag(exp(decay_t)) S_{t-1}`:

        rule "add"    S_t = S' + beta_t k_t v_t^T
        rule "delta"  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
        output        o_t = scale * S_t^T q_t

    Linear attention is rule "add" alone; RetNet and Lightning Attention add a decay per head, Mamba-2's dual form
    and mLSTM one per step, GLA one per step and channel. DeltaNet is rule "delta", Gated DeltaNet adds a decay per
    step, KDA one per step and channel.

    Args:
        q: `[B, H_q, N, D_k]`, float16, bfloat16, float32 or float64, any strides. k: `[B, H, N, D_k]`;
            v: `[B, H, N, D_v]`. H_q is a multiple of H; query head h reads the state of head h // (H_q // H).
        decay: log decays in [-inf, 0]: `[H]`, `[B|1, H|1, N]` or per channel of the keys `[B|1, H|1, N, D_k]`; None
            is 0.
        beta: `[B|1, H|1, N]`, in [0, 2] for rule "delta"; None is 1. log_beta: the same as its log, of any size
            (exponential gates); the state is then kept divided by its running maximum.
        normalize: "sum" divides by `scale * n_t^T q_t`, with n the recurrence over values of 1 (linear attention's
            denominator; a query that has seen nothing gets 0); "bounded" by the larger of its magnitude and 1
            (xLSTM). Rule "add" only.
        scale: None is 1/sqrt(D_k).
        state: from an earlier call with the same settings; None is an empty one.
        mask: bool `[B, N]`, False for padding on either side: it leaves the state alone and gets output 0.
        cu_seqlens: int `[S + 1]` for sequences packed in a batch of one: sequence i is tokens cu_seqlens[i] to
            cu_seqlens[i + 1] - 1, each with a state of its own. Empty ones are legal.
        chunk: tokens between two states that are kept for the backward pass, so that memory is
            N / chunk * D_k * D_v a head; None leaves it to the engine. Results differ by rounding alone.
        engine: "auto", or the name of an engine, which then runs or raises.
        return_state: also return the state after the last token.
        layout: "bhnd", or "bnhd" for `[B, N, H, D]` inputs and output (a stride view, never a copy). decay and beta
            stay as above.

    Returns:
        `[B, H_q, N, D_v]` in q's dtype, or that and a `State`. Accumulated in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument that does not fit (a positive decay, a state of another shape or rule,
            offsets that do not cover the tokens); the message names it and what is accepted. Nothing is changed.
    """
    call, then = _bind(
        q, k, v, decay, beta, log_beta, rule, normalize, scale, state, mask, cu_seqlens, chunk, layout
    )
    out, after = kernel.scan(call, engine)
    out, made = then.finish(out, after)
    if layout == "bnhd":
        out = out.transpose(1, 2)
    return (out, made) if return_state else out


def explain(q: Tensor, k: Tensor, v: Tensor, *, engine: str = "auto", **options) -> Choice:
    """The engine that `scan` with the same arguments would run, and why each other one would not."""
    names = ("decay", "beta", "log_beta", "normalize", "scale", "state", "mask", "cu_seqlens", "chunk")
    given = {name: options.pop(name, None) for name in names}
    given |= {"rule": options.pop("rule", "add"), "layout": options.pop("layout", "bhnd")}
    options.pop("return_state", None)
    if options:
        raise TypeError(f"explain takes the arguments of scan, got {', '.join(options)}")
    return kernel.explain(_bind(q, k, v, **given)[0], engine)


@dataclass(frozen=True, eq=False)
class _Then:
    """What is left to do with the kernel's result."""

    rule: str
    normalize: str | None
    mask: Tensor | None
    peak: Tensor | None  # [B, H, N]
    last: Tensor | None  # [S, H]
    dtype: torch.dtype

    def finish(self, out: Tensor, after: Tensor) -> tuple[Tensor, State]:
        sums = None
        if self.normalize is not None:
            sums, after = after[..., -1], after[..., :-1]
            below, out = out[..., -1:], out[..., :-1]
            if self.normalize == "bounded":
                least = below.new_ones(()) if self.peak is None else self._least(below)
                out = out / torch.maximum(below.abs(), least)
            else:
                nothing = below == 0
                out = (out / below.masked_fill(nothing, 1)).masked_fill(nothing, 0)
        elif self.peak is not None:
            out = out * self._per_query(self.peak.exp(), out)
        out = out.to(self.dtype)
        if self.mask is not None:
            out = out.masked_fill(~self.mask.view(self.mask.shape[0], 1, -1, 1), 0)
        return out, State(after, sums, self.last, self.rule)

    def _least(self, below: Tensor) -> Tensor:
        """1, as what is kept divided by exp(peak) has it."""
        return self._per_query((-self.peak).exp(), below)  # type: ignore[operator]

    @staticmethod
    def _per_query(x: Tensor, like: Tensor) -> Tensor:
        return x.repeat_interleave(like.shape[1] // x.shape[1], 1).unsqueeze(3).to(like.dtype)


def _bind(
    q, k, v, decay, beta, log_beta, rule, normalize, scale, state, mask, cu_seqlens, chunk, layout
) -> tuple[kernel.Call, _Then]:
    """Check the arguments; the kernel's call, and what is left to do with its result."""
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd', got {layout!r}")
    if layout == "bnhd":
        q, k, v = (x.transpose(1, 2) if isinstance(x, Tensor) and x.ndim == 4 else x for x in (q, k, v))
    if rule not in kernel.RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, kernel.RULES))}, got {rule!r}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(map(repr, NORMALIZE))}, got {normalize!r}")
    if rule == "delta" and (normalize is not None or log_beta is not None):
        raise ValueError(
            "rule 'delta' takes no normalize and no log_beta: its state is no weighted sum of values"
        )
    if beta is not None and log_beta is not None:
        raise ValueError("give beta or log_beta, not both")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk must be None or an integer >= 1, got {chunk!r}")
    check_tensors(q, k, v)
    offsets = check_offsets(cu_seqlens, mask, q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    decay = check_decay(decay, k, wide)
    beta = check_beta(beta, "beta", rule, k, wide)
    log_beta = check_beta(log_beta, "log_beta", rule, k, wide)
    sequences = q.shape[0] if offsets is None else offsets.shape[0] - 1
    check_state(state, sequences, k, v, rule, normalize, log_beta is not None)
    if mask is not None:
        hidden = ~mask.view(mask.shape[0], 1, -1)
        if log_beta is not None:
            log_beta = log_beta.masked_fill(hidden, -torch.inf)
        else:
            beta = torch.ones(k.shape[:3], dtype=wide, device=k.device) if beta is None else beta
            beta = beta.masked_fill(hidden, 0)
        if decay is not None:
            decay = decay.masked_fill(hidden if decay.ndim == 3 else hidden.unsqueeze(3), 0)
        # What padding holds may be anything, and 0 times infinity is no number.
        k, v = (x.masked_fill(hidden.unsqueeze(3), 0) for x in (k, v))
    peak = last = None
    if log_beta is not None:
        if decay is not None and decay.ndim == 4:
            raise ValueError("log_beta takes decays per head or per step, not per channel")
        decay, beta, peak, last = _peaks(decay, log_beta, state, offsets)
    matrix = None if state is None else state.matrix
    out_dtype = q.dtype
    if normalize is not None:
        v = torch.cat((v, v.new_ones(*v.shape[:3], 1)), 3)
        if state is not None and state.sums is not None and matrix is not None:
            matrix = torch.cat((matrix, state.sums.unsqueeze(3)), 3)
    scale = k.shape[3] ** -0.5 if scale is None else float(scale)
    call = kernel.Call(q, k, v, decay, beta, matrix, offsets, rule, scale, chunk)
    return call, _Then(rule, normalize, mask, peak, last, out_dtype)


def _peaks(decay: Tensor | None, log_beta: Tensor, state: State | None, offsets: Tensor | None):
    """Decays and betas of the state divided by its running maximum; that maximum everywhere and at the end."""
    n = log_beta.shape[2]
    first = torch.zeros(n, dtype=torch.bool, device=log_beta.device)
    if offsets is None:
        initial = log_beta.new_full((*log_beta.shape[:2], 1), -torch.inf)
        if state is not None and state.peak is not None:
            initial = state.peak.to(log_beta.dtype).unsqueeze(2)
        starts = initial.expand(-1, -1, n)
        first[:1] = True
    else:
        # Empty sequences have no first token; of those that begin at the same place only the last is not empty.
        owner = torch.searchsorted(
            offsets[1:].contiguous(), torch.arange(n, device=offsets.device), right=True
        )
        owner = owner.clamp(max=max(0, offsets.shape[0] - 2))
        initial = log_beta.new_full((offsets.shape[0] - 1, log_beta.shape[1]), -torch.inf)
        if state is not None and state.peak is not None:
            initial = state.peak.to(log_beta.dtype)
        starts = initial[owner].mT.unsqueeze(0)  # [1, h, n]
        first[offsets[:-1][offsets[:-1] < offsets[1:]]] = True
    step = torch.zeros_like(log_beta) if decay is None else decay
    reset = step.masked_fill(first, -torch.inf)
    entered = torch.where(first, torch.maximum(log_beta.detach(), step.detach() + starts), log_beta.detach())
    peak = running_peak(reset, entered)
    before = torch.cat((peak[..., :1], peak[..., :-1]), 2)
    before = torch.where(first, starts, before)
    made, weight = stabilised(step, log_beta, peak, before)
    if offsets is None:
        last = peak[..., -1] if n else initial[..., 0]
    else:
        ends = (offsets[1:] - 1).clamp(min=0)
        empty = (offsets[1:] == offsets[:-1]).view(-1, 1)
        last = torch.where(empty, initial, peak[0].mT[ends]) if n else initial
    return made, weight, peak, last


def empty_state(
    sequences: int,
    heads: int,
    d_k: int,
    d_v: int,
    *,
    rule: str = "add",
    normalize: str | None = None,
    gated: bool = False,
) -> State:
    """A `State` before any token, float32: what `state=None` stands for, as tensors. `gated` is for `log_beta`."""
    made = State(torch.zeros(sequences, heads, d_k, d_v), rule=rule)
    if normalize is not None:
        made = replace(made, sums=torch.zeros(sequences, heads, d_k))
    return replace(made, peak=torch.full((sequences, heads), -torch.inf)) if gated else made
