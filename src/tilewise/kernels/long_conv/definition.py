"""The meaning of the long convolution: the sum over all taps in plain PyTorch, any dtype up to float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.long_conv.call import Call


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Tensor:
    """Outputs `[B, C, N]` in x's dtype."""
    wide, n = call.wide, call.x.shape[2]
    u = call.x.to(wide)
    if call.gate_in is not None:
        u = u * call.gate_in.to(wide)
    kernel = call.kernel.to(wide)
    if call.sparse and n:  # the kernel without the frequencies that do not count
        places = torch.arange(kernel.shape[1], device=u.device) % n
        whole = u.new_zeros(kernel.shape[0], n).index_add(1, places, kernel)
        kernel = torch.fft.ifft(torch.fft.fft(whole) * call.counts()).real
    z = torch.zeros_like(u)
    for k in range(kernel.shape[1] if n else 0):
        z = z + kernel[:, k : k + 1] * _earlier(call, u, k)
    if call.skip is not None:
        z = z + call.skip.to(wide).unsqueeze(1) * u
    if call.gate_out is not None:
        z = z * call.gate_out.to(wide)
    return z.to(call.x.dtype)


def _earlier(call: Call, u: Tensor, k: int) -> Tensor:
    """u k tokens earlier, `[B, C, N]`."""
    n = u.shape[2]
    if not call.causal:
        return u.roll(k, 2)
    missing = min(k, n)
    if call.before is None:
        front = u.new_zeros(*u.shape[:2], missing)
    else:
        front = call.before[:, :, call.before.shape[2] - k :][:, :, :missing].to(u.dtype)
    return torch.cat((front, u[:, :, : n - missing]), 2)
