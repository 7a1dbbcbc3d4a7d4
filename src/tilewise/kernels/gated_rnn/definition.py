"""The meaning of the gated networks: one step after the other in plain PyTorch, any dtype up to float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.kernels.gated_rnn.call import Call


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs `[B, H, N, d]` in the dtype of wx, and the states after the last tokens `[S, H, P, d]`."""
    wide = call.wide
    zeros = torch.zeros(call.state_shape(), dtype=wide, device=call.wx.device)
    before = zeros if call.state is None else call.state.to(wide)
    rows: list[list[Tensor]] = [[] for _ in range(call.wx.shape[0])]
    after = []
    for number, (b, start, end) in enumerate(call.spans()):
        state = before[number].unbind(1)  # of each part, [h, d]
        for t in range(start, end):
            if call.mask is not None and not call.mask[b, t]:
                rows[b].append(torch.zeros_like(state[0]))
                continue
            x = call.wx[b, :, t].to(wide)  # [h, g, d]
            r = (call.R.to(wide) @ state[0][:, None, :, None]).squeeze(3)
            if call.bias is not None:
                r = r + call.bias.to(wide)
            state = STEPS[call.kind](x.unbind(1), r.unbind(1), *state)
            rows[b].append(state[0])
        after.append(torch.stack(state, 1))
    b, heads, n, _, d = call.wx.shape
    outs = [torch.stack(own, 1) for own in rows if own]
    out = torch.stack(outs).to(call.wx.dtype) if outs else call.wx.new_zeros(b, heads, n, d)
    return out, torch.stack(after) if after else zeros


def _elman(x, r, h):
    return (torch.tanh(x[0] + r[0]),)


def _lstm(x, r, h, c):
    i, f, z, o = (a + b for a, b in zip(x, r))
    c = f.sigmoid() * c + i.sigmoid() * z.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x, r, h):
    reset, update = (x[0] + r[0]).sigmoid(), (x[1] + r[1]).sigmoid()
    new = torch.tanh(x[2] + reset * r[2])
    return ((1 - update) * new + update * h,)


def _slstm(x, r, h, c, n, m):
    i, f, z, o = (a + b for a, b in zip(x, r))
    decayed = torch.where(n == 0, -torch.inf, F.logsigmoid(f) + m)
    peak = torch.where(decayed >= i, decayed, i)
    write, keep = (i - peak).exp(), (decayed - peak).exp()
    c, n = keep * c + write * z.tanh(), keep * n + write
    return o.sigmoid() * c / n, c, n, peak


STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "elman": _elman,
    "lstm": _lstm,
    "gru": _gru,
    "slstm": _slstm,
}
