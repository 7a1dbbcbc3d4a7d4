"""Forward and backward of the long convolution over windows, by any transform that turns it into a
product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.kernels.long_conv import op
from tilewise.kernels.long_conv.call import Call
from tilewise.kernels.long_conv.plan import Plan

AT_ONCE = 1 << 18  # numbers of all windows that are transformed together: 1 MiB of float32


@dataclass(frozen=True)
class Transform:
    """A transform by which circular convolution is a product of numbers.

    Attributes:
        forward: real `[..., L]` to complex numbers. inverse: the reverse, for L. counts: those numbers that
            count, from bool `[L]` by frequency to the shape of a transform.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor, int], Tensor]
    counts: Callable[[Tensor], Tensor]


def forward(call: Call, plan: Plan, transform: Transform) -> Tensor:
    """Outputs; channels a few at a time, so that temporaries stay small."""
    out = call.x.new_empty(call.x.shape)
    if not out.numel():
        return out
    for part, to in _parts(call, plan):
        u = _gated(part)
        z = _read(
            transform.inverse(
                _windows(part, plan, u, transform) * _kernel(part, plan, transform), plan.length
            ),
            plan,
            part,
        )
        if part.skip is not None:
            z = z + part.skip.unsqueeze(1) * u
        out[:, to] = z if part.gate_out is None else z * part.gate_out
    return out


def backward(call: Call, plan: Plan, transform: Transform, d_out: Tensor, for_kernel: bool) -> op.Gradients:
    """Gradients; what the forward pass computed is computed again, so that it kept its inputs alone."""

    def fresh(one: Tensor | None) -> Tensor | None:
        return None if one is None else torch.zeros(one.shape, dtype=one.dtype, device=one.device)

    d_x, d_kernel = torch.zeros(call.x.shape, dtype=call.x.dtype, device=call.x.device), None
    d_gate_in, d_gate_out, d_skip, d_before = map(
        fresh, (call.gate_in, call.gate_out, call.skip, call.before)
    )
    d_taps = torch.zeros_like(call.folded()) if for_kernel else None
    for part, to in _parts(call, plan) if d_x.numel() else ():
        u, d_z = _gated(part), d_out[:, to].to(call.wide)
        kernel, read = _kernel(part, plan, transform), None
        if for_kernel or part.gate_out is not None:
            read = _windows(part, plan, u, transform)
        if part.gate_out is not None and d_gate_out is not None and read is not None:
            z = _read(transform.inverse(read * kernel, plan.length), plan, part)
            if part.skip is not None:
                z = z + part.skip.unsqueeze(1) * u
            d_gate_out[:, to] = (d_z * z).to(call.x.dtype)
            d_z = d_z * part.gate_out
        written = transform.forward(_spread(d_z, plan))
        if d_taps is not None and read is not None:
            d_taps[to] = transform.inverse(
                _summed(part, plan, read.conj_physical() * written, transform), plan.length
            )[..., : plan.taps]
        d_all = _overlapped(transform.inverse(written * kernel.conj_physical(), plan.length), plan)
        d_u = _of_inputs(d_all, plan, part)
        if d_before is not None:
            d_before[:, to] = d_all[..., : plan.lead]
        if part.skip is not None and d_skip is not None:
            d_skip[to] = (d_z * u).sum((0, 2))
            d_u = d_u + part.skip.unsqueeze(1) * d_z
        if part.gate_in is not None and d_gate_in is not None:
            d_gate_in[:, to] = (d_u * part.x).to(call.x.dtype)
            d_u = d_u * part.gate_in
        d_x[:, to] = d_u.to(call.x.dtype)
    if d_taps is not None:
        d_kernel = unfolded(call, d_taps)
    return d_x, d_kernel, d_gate_in, d_gate_out, d_skip, d_before


def _parts(call: Call, plan: Plan) -> Iterator[tuple[Call, slice]]:
    """Some channels at a time, the call of each."""
    b, channels, n = call.x.shape
    size = max(1, AT_ONCE // max(1, b * plan.windows(n) * plan.length))
    for start in range(0, channels, size):
        at = slice(start, start + size)
        gate_in, gate_out, before = (
            None if part is None else part[:, at] for part in (call.gate_in, call.gate_out, call.before)
        )
        skip = None if call.skip is None else call.skip[at]
        yield Call(
            call.x[:, at], call.kernel[at], gate_in, gate_out, skip, before, None, call.causal, call.rows,
            call.kept, call.band,
        ), at  # fmt: skip


def _gated(call: Call) -> Tensor:
    u = call.x.to(call.wide)
    return u if call.gate_in is None else u * call.gate_in


def _kernel(call: Call, plan: Plan, transform: Transform) -> Tensor:
    """`[C, 1, ...]`, of all windows."""
    taps = call.folded()
    made = transform.forward(F.pad(taps, (0, plan.length - taps.shape[1])).unsqueeze(1))
    return made * transform.counts(call.counts()) if call.sparse else made


def _windows(call: Call, plan: Plan, u: Tensor, transform: Transform) -> Tensor:
    """Transforms of the inputs, `[B, C, windows, ...]`."""
    n = u.shape[2]
    count = plan.windows(n)
    behind = (count - 1) * plan.step + plan.length - plan.lead - n
    if not plan.lead and count == 1:
        return transform.forward(F.pad(u, (0, behind)).unsqueeze(2) if behind else u.unsqueeze(2))
    if call.causal:
        front = u.new_zeros(*u.shape[:2], plan.lead) if call.before is None else call.before
    else:
        front = u[..., n - plan.lead :]
    return transform.forward(F.pad(torch.cat((front, u), 2), (0, behind)).unfold(2, plan.length, plan.step))


def _read(made: Tensor, plan: Plan, call: Call) -> Tensor:
    """Outputs of windows `[B, C, windows, L]` in a row, `[B, C, N]`."""
    return made[..., plan.lead : plan.lead + plan.step].flatten(2)[..., : call.x.shape[2]]


def _spread(d_z: Tensor, plan: Plan) -> Tensor:
    """Outputs' gradients where windows give them, `[B, C, windows, L]`, zeros elsewhere."""
    n = d_z.shape[2]
    blocks = F.pad(d_z, (0, plan.windows(n) * plan.step - n)).unflatten(2, (-1, plan.step))
    return F.pad(blocks, (plan.lead, plan.length - plan.lead - plan.step))


def _overlapped(made: Tensor, plan: Plan) -> Tensor:
    """The sum of windows `[B, C, windows, L]` where they lie, from the first one's start."""
    count, layers = made.shape[2], -(-plan.length // plan.step)
    total = made.new_zeros(*made.shape[:2], count + layers - 1, plan.step)
    for layer in range(layers):
        piece = made[..., layer * plan.step : (layer + 1) * plan.step]
        total[:, :, layer : layer + count, : piece.shape[3]] += piece
    return total.flatten(2)


def _of_inputs(d_all: Tensor, plan: Plan, call: Call) -> Tensor:
    """Gradients of the inputs themselves, `[B, C, N]`."""
    n = call.x.shape[2]
    d_u = d_all[..., plan.lead : plan.lead + n]
    if not call.causal and plan.lead:
        d_u = d_u.clone()
        d_u[..., n - plan.lead :] += d_all[..., : plan.lead]
    return d_u


def _summed(call: Call, plan: Plan, products: Tensor, transform: Transform) -> Tensor:
    """Over batch and windows, without what does not count."""
    made = products.sum((0, 2))
    return made * transform.counts(call.counts()) if call.sparse else made


def unfolded(call: Call, d_taps: Tensor) -> Tensor:
    """The gradient of the whole kernel from that of the taps that can be reached."""
    n, size = call.x.shape[2], call.kernel.shape[1]
    if call.causal or size <= n or not n:
        return F.pad(d_taps, (0, size - d_taps.shape[1]))
    return d_taps.repeat(1, -(-size // n))[:, :size]
