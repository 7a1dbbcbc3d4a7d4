"""The Triton engine: GPUs; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1 before Tilewise is imported).

After FlashFFTConv (Fu et al., 2023, arXiv 2311.05908): gates, transform, product, transform back, skip and
gate are one kernel, whose transforms are products of matrices. The backward pass is the same kernel over
gradients that run from the last token to the first; the kernel's own gradient is taken by `torch.fft`. "auto"
prefers the torch engine: this one has not been measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.kernels.gpu import INTERPRETED, absent, too_wide
from tilewise.kernels.long_conv import op
from tilewise.kernels.long_conv.call import Call
from tilewise.kernels.long_conv.monarch import factor, whole
from tilewise.kernels.long_conv.plan import Plan, plan
from tilewise.kernels.long_conv.windows import unfolded

SHORTEST = 256  # window
# Longest window: its matrices have to fit in 227 KiB, and three products for float32's digits take twice as much.
# bfloat16 has fewer digits than those that are left by one.
LONGEST = {torch.bfloat16: 4096, torch.float16: 2048, torch.float32: 2048}
PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32x3", torch.float32: "tf32x3"}
FEWEST = 16  # tokens: a transform errs more than their sums
AT_ONCE = 1 << 24  # numbers transformed together for the kernel's gradient


def refuse(call: Call) -> str | None:
    """Why this call cannot run here."""
    if reason := absent(call.x) or too_wide(call.x):
        return reason
    if call.x.shape[2] < FEWEST:
        return f"transforms {FEWEST} tokens or more, the call has {call.x.shape[2]}"
    if call.sparse:
        return "leaves out no frequencies"
    if call.taps > (most := LONGEST[call.x.dtype] // 2):
        return f"reaches back over up to {most} tokens in this dtype, the kernel over {call.taps}"
    return None


def run(call: Call) -> Tensor:
    """Outputs of `call`."""
    return op.run(call, "triton")


def forward(call: Call, like: torch.dtype | None = None) -> Tensor:
    """The operator's forward on this engine; windows and precision are those of `like`, None is x's dtype."""
    like = call.x.dtype if like is None else like
    out = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)
    if not out.numel():
        return out
    cut = _plan(call, LONGEST[like])
    units = call.x.shape[0] * cut.windows(call.x.shape[2])
    made = _room(out)
    start(
        (-(-units // 2), call.x.shape[1]), **_tensors(call, cut), out=made, **_sizes(call, cut, units, like)
    )
    return made if made is out else out.copy_(made)


def backward(call: Call, d_out: Tensor, for_kernel: bool) -> op.Gradients:
    """Gradients of x, kernel, gate_in, gate_out, skip and before."""
    gate_in, gate_out, before = call.gate_in, call.gate_out, call.before
    if not call.x.numel():
        given = (call.x, call.kernel if for_kernel else None, gate_in, gate_out, call.skip, before)
        return tuple(None if x is None else torch.zeros_like(x) for x in given)  # type: ignore[return-value]
    like = call.x.dtype
    u, d_z, d_gate_out, d_gate_in = call.x.float(), d_out.float(), None, None
    if gate_in is not None:
        u = u * gate_in
    if gate_out is not None:
        d_gate_out = (d_z * forward(replace(call, x=u, gate_in=None, gate_out=None), like)).to(gate_out.dtype)
        d_z = d_z * gate_out
    # A token got from later ones what a convolution that starts at the end would give it.
    lead = 0 if before is None else call.taps - 1
    turned = F.pad(d_z.flip(2), (0, lead))
    d_all = forward(Call(turned, call.kernel, skip=call.skip, causal=call.causal), like).flip(2)
    d_u, d_before = d_all[..., lead:], None if before is None else d_all[..., :lead].contiguous()
    d_skip = None if call.skip is None else (d_z * u).sum((0, 2))
    d_kernel = _of_taps(call, u, d_z) if for_kernel else None
    d_x = d_u
    if gate_in is not None:
        d_gate_in, d_x = (d_u * call.x).to(gate_in.dtype), d_u * gate_in
    return d_x.to(like).contiguous(), d_kernel, d_gate_in, d_gate_out, d_skip, d_before


def _of_taps(call: Call, u: Tensor, d_z: Tensor) -> Tensor:
    """The kernel's gradient: what each tap carried from tokens to later ones; channels a few at a time."""
    lead, found = 0 if call.before is None else call.taps - 1, []
    length = u.shape[2] if not call.causal else 1 << (u.shape[2] + lead + call.taps - 2).bit_length()
    for at in torch.arange(u.shape[1]).split(max(1, AT_ONCE // (u.shape[0] * length))):
        part = slice(int(at[0]), int(at[-1]) + 1)
        read = u[:, part] if call.before is None else torch.cat((call.before[:, part], u[:, part]), 2)
        written = torch.fft.rfft(F.pad(d_z[:, part], (lead, 0)), length)
        product = (torch.fft.rfft(read, length).conj_physical() * written).sum(0)
        found.append(torch.fft.irfft(product, length)[:, : call.taps])
    return unfolded(call, torch.cat(found))


def start(grid: tuple[int, int], **arguments: Any) -> None:
    """Run the kernel."""
    from tilewise.kernels.long_conv import triton_windows

    with torch.cuda.device_of(arguments["x"]):
        triton_windows.convolve[grid](**arguments)


def _plan(call: Call, longest: int) -> Plan:
    def exact(n: int) -> bool:
        return SHORTEST <= n <= longest and n & (n - 1) == 0

    return plan(call, shortest=SHORTEST, exact=exact, rows=2, longest=longest)


def _room(out: Tensor) -> Tensor:
    return out.float() if INTERPRETED else out  # the interpreter cannot write bfloat16


def _tensors(call: Call, cut: Plan) -> dict[str, Any]:
    """All that the kernel reads, and the strides of what may lie anyhow."""
    rows = {"x": call.x, "gate_in": call.gate_in, "gate_out": call.gate_out, "before": call.before}
    if INTERPRETED:
        rows = {name: None if one is None else one.float() for name, one in rows.items()}
    strides: dict[str, int] = {}
    for name, one in rows.items():
        prefix = name.removeprefix("gate_")
        steps = (0, 0, 0) if one is None else one.stride()
        strides |= {f"{prefix}_{axis}": step for axis, step in zip("bcn", steps)}
    first, between, second = _matrices(cut.length, call.x.device)
    a = factor(cut.length)
    taps = F.pad(call.folded().float(), (0, cut.length - cut.taps))
    spectrum = torch.fft.fft(taps, norm="forward").unflatten(1, (cut.length // a, a)).mT
    skip = None if call.skip is None else call.skip.float().contiguous()
    matrices = {"spectrum": _parts(spectrum), "first": first, "between": between, "second": second}
    return {**rows, **strides, **matrices, "skip": skip}


def _sizes(call: Call, cut: Plan, units: int, like: torch.dtype) -> dict[str, Any]:
    a, n = factor(cut.length), call.x.shape[2]
    return {
        "n": n, "windows": cut.windows(n), "units": units, "lead": cut.lead, "step": cut.step,
        "earlier": call.kernel.shape[1] - 1, "channels": call.x.shape[1], "CIRCULAR": not call.causal, "A": a,
        "B": cut.length // a, "PRECISION": PRECISION[like] if torch.version.hip is None else "ieee",
        "num_warps": 8 if cut.length > 1024 else 4, "enable_fp_fusion": True,
    }  # fmt: skip


@lru_cache(maxsize=16)
def _matrices(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    made = whole(length, torch.complex64, device)
    return _parts(made.first), _parts(made.between), _parts(made.second)


def _parts(x: Tensor) -> Tensor:
    """Real and imaginary parts, `[..., 2, rows, columns]`."""
    return torch.stack((x.real, x.imag), -3).contiguous()


op.IMPLEMENTATIONS["triton"] = op.Implementation(forward, backward)
