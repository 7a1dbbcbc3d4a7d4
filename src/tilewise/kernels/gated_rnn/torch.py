"""The torch engine: all sequences and heads at once, one token after the other; any device and dtype.

The backward pass is written out: through time with what the forward pass kept, then the gradient of R as one
product over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.kernels.gated_rnn import op
from tilewise.kernels.gated_rnn.call import KINDS, Call
from tilewise.kernels.gated_rnn.steps import STEPS


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs and final states of `call`."""
    return op.run(call, "torch")


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's forward on this engine."""
    rows = _Rows.of(call)
    turned = call.R.to(call.wide).flatten(1, 2).mT  # [h, d, g * d]
    bias = 0 if call.bias is None else call.bias.to(call.wide).unsqueeze(1)  # [h, 1, g, d]
    parts = _first_state(call)
    step = STEPS[call.kind].forward
    outs, kept = [], []
    for t in range(rows.length):
        x = rows.take(call.wx, t)  # [h, s, g, d]
        r = (parts[0] @ turned).unflatten(2, x.shape[2:]) + bias
        made, keep = step(x.unbind(2), r.unbind(2), parts)
        if call.keep:
            kept.append(torch.stack((*keep, parts[0]), 2))
        seen = rows.seen(t)
        outs.append(made[0] if seen is None else torch.where(seen, made[0], 0))
        parts = made if seen is None else tuple(torch.where(seen, new, old) for new, old in zip(made, parts))
    out, kept_all = call.new_out(), call.wx.new_zeros(call.kept_shape(), dtype=call.wide)
    rows.put(out, outs)
    if call.keep:
        rows.put(kept_all[..., : call.wx.shape[4]].transpose(1, 2), kept)
    return out, torch.stack(parts, 2).transpose(0, 1).contiguous(), kept_all


def backward(call: Call, kept: Tensor, d_out: Tensor | None, d_after: Tensor | None) -> op.Gradients:
    """The operator's backward on this engine."""
    rows = _Rows.of(call)
    heads, gates, d = call.R.shape[:3]
    kept = kept[..., :d].transpose(1, 2)  # [b, h, n, k, d]
    matrix = call.R.to(call.wide).flatten(1, 2)  # [h, g * d, d]
    step = STEPS[call.kind].backward
    zero = matrix.new_zeros(heads, call.sequences, d)
    d_parts = [zero] * len(KINDS[call.kind].parts)
    if d_after is not None:
        d_parts = list(d_after.to(call.wide).transpose(0, 1).unbind(2))
    d_x, d_r, befores = [], [], []
    for t in reversed(range(rows.length)):
        *own, before = rows.take(kept, t).unbind(2)
        made = list(d_parts)
        if d_out is not None:
            made[0] = made[0] + rows.take(d_out, t)
        x, r, made = step(own, before, made)
        seen = rows.seen(t)
        by_x, by_r = torch.stack(list(x), 2), torch.stack(list(r), 2)  # [h, s, g, d]
        if seen is not None:  # what was kept of tokens that are passed over may be anything
            by_x, by_r = (torch.where(seen.unsqueeze(2), y, 0) for y in (by_x, by_r))
            before = torch.where(seen, before, 0)
            made = [torch.where(seen, new, old) for new, old in zip(made, d_parts)]
        made[0] = made[0] + by_r.flatten(2) @ matrix
        d_parts = made
        d_x.append(by_x)
        d_r.append(by_r)
        befores.append(before)
    d_wx = op.new_gradient(call.wx)
    rows.put(d_wx, d_x[::-1])
    d_matrix, d_bias = torch.zeros_like(matrix), matrix.new_zeros(heads, gates, d)
    if befores:
        by_gate = torch.cat(d_r, 1)  # [h, t * s, g, d]
        d_matrix, d_bias = by_gate.flatten(2).mT @ torch.cat(befores, 1), by_gate.sum(1)
    return (
        d_wx,
        d_matrix.view(call.R.shape).to(call.R.dtype),
        None if call.bias is None else d_bias.to(call.bias.dtype),
        None
        if call.state is None
        else torch.stack(d_parts, 2).transpose(0, 1).to(call.state.dtype).contiguous(),
    )


def _first_state(call: Call) -> tuple[Tensor, ...]:
    """Each part as `[H, S, d]`."""
    if call.state is not None:
        return call.state.to(call.wide).transpose(0, 1).unbind(2)
    s, heads, parts, d = call.state_shape()
    return (torch.zeros(heads, s, d, dtype=call.wide, device=call.wx.device),) * parts


@dataclass(frozen=True, eq=False)
class _Rows:
    """Where the tokens of all sequences lie, step by step."""

    length: int  # of the longest
    wide: torch.dtype
    mask: Tensor | None  # [s, length, 1]
    places: Tensor | None = (
        None  # [s, length], of packed sequences; behind a sequence's end they mean nothing
    )
    lengths: tuple[int, ...] = ()  # of packed sequences

    @classmethod
    def of(cls, call: Call) -> _Rows:
        mask = None if call.mask is None else call.mask.unsqueeze(2)
        if call.offsets is None:
            return cls(call.wx.shape[2], call.wide, mask)
        lengths = call.offsets[1:] - call.offsets[:-1]
        longest = int(lengths.max()) if len(lengths) else 0
        steps = torch.arange(longest, device=call.wx.device)
        places = (call.offsets[:-1, None] + steps).clamp(max=max(0, call.wx.shape[2] - 1))
        return cls(
            longest, call.wide, (steps < lengths[:, None]).unsqueeze(2), places, tuple(lengths.tolist())
        )

    def take(self, x: Tensor, t: int) -> Tensor:
        """Token t of each sequence, `[B, H, N, ...]` to `[H, S, ...]`."""
        found = x[:, :, t] if self.places is None else x[0].index_select(1, self.places[:, t]).transpose(0, 1)
        return found.transpose(0, 1).to(self.wide)

    def seen(self, t: int) -> Tensor | None:
        """Which sequences have a token t, `[S, 1]`; None where all have."""
        return None if self.mask is None else self.mask[:, t]

    def put(self, to: Tensor, steps: list[Tensor]) -> None:
        """Write `[H, S, ...]` of every step to `[B, H, N, ...]`; tokens that belong to no sequence get 0."""
        if not steps:
            to.zero_()
            return
        made = torch.stack(steps, 2).transpose(0, 1).to(to.dtype)  # [s, h, t, ...]
        if self.places is None:
            to.copy_(made)
            return
        to.zero_()
        for places, row, length in zip(self.places, made, self.lengths):
            to[0].index_copy_(1, places[:length], row[:, :length])


op.IMPLEMENTATIONS["torch"] = op.Implementation(forward, backward)
