"""The meaning of the selective scan: one step after the other in plain PyTorch, any dtype up to float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.selective_scan.call import Call


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs `[batch, N, channels]` in x's dtype, and the states after the last tokens `[Q, channels, S]`."""
    wide = call.wide
    zeros = torch.zeros(call.state_shape(), dtype=wide, device=call.x.device)
    before = zeros if call.state is None else call.state.to(wide)
    rows: list[list[Tensor]] = [[] for _ in range(call.x.shape[0])]
    after = []
    for number, (b, start, end) in enumerate(call.spans()):
        state = before[number]  # [c, s]
        for t in range(start, end):
            x, delta = call.x[b, t].to(wide), call.delta[b, t].to(wide)
            to_state, to_out = (_of_channels(m[b, :, t].to(wide), state.shape[0]) for m in (call.B, call.C))
            state = (delta.unsqueeze(1) * call.A.to(wide)).exp() * state + (delta * x).unsqueeze(1) * to_state
            y = (state * to_out).sum(1)
            rows[b].append(y if call.D is None else y + call.D.to(wide) * x)
        after.append(state)
    outs = [torch.stack(own) for own in rows if own]
    out = torch.stack(outs).to(call.x.dtype) if outs else call.x.new_zeros(call.x.shape)
    return out, torch.stack(after) if after else zeros


def _of_channels(groups: Tensor, channels: int) -> Tensor:
    """`[groups, S]` as the channels read it, `[channels, S]`."""
    return groups.repeat_interleave(channels // groups.shape[0], 0)
