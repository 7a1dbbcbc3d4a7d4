"""The meaning of the scan: one step after the other in plain PyTorch, any dtype up to float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.scan.call import Call


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs `[B, H_q, N, D_v]` in q's dtype, and the states after the last tokens `[S, H, D_k, D_v]`."""
    wide = call.wide
    zeros = torch.zeros(call.state_shape(), dtype=wide, device=call.q.device)
    before = zeros if call.state is None else call.state.to(wide)
    rows: list[list[Tensor]] = [[] for _ in range(call.q.shape[0])]
    after = []
    for number, (b, start, end) in enumerate(call.spans()):
        state = before[number]  # [h, d_k, d_v]
        for t in range(start, end):
            state = _step(call, state, b, t)
            queries = call.q[b, :, t].to(wide).unflatten(0, (state.shape[0], -1))  # [h, g, d_k]
            rows[b].append((call.scale * queries @ state).flatten(0, 1))
        after.append(state)
    shape = (*call.q.shape[:3], call.v.shape[3])
    outs = [torch.stack(own, 1) for own in rows if own]
    out = torch.stack(outs).to(call.q.dtype) if outs else call.q.new_zeros(shape)
    return out, torch.stack(after) if after else zeros


def _step(call: Call, state: Tensor, b: int, t: int) -> Tensor:
    k, v = call.k[b, :, t].to(state.dtype), call.v[b, :, t].to(state.dtype)
    if call.decay is not None:
        factor = call.decay[b, :, t].to(state.dtype).exp()  # [h] or [h, d_k]
        state = factor.reshape(factor.shape[0], -1, 1) * state
    if call.rule == "delta":
        v = v - (k.unsqueeze(1) @ state).squeeze(1)
    if call.beta is not None:
        v = v * call.beta[b, :, t].to(state.dtype).unsqueeze(1)
    return state + k.unsqueeze(2) * v.unsqueeze(1)
