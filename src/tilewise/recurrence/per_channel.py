"""A linear recurrence of each channel for itself, in log N steps of whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.recurrence.checks import check_offsets

BLOCK = 32  # tokens between two carried states; see elementwise for what was measured


def elementwise(keep: Tensor, add: Tensor, initial: Tensor | None = None) -> Tensor:
    """`h_t = keep_t h_{t-1} + add_t` for each channel.

    Only products of factors are formed and never a quotient, so strong gates stay finite: 0 forgets everything. The
    backward pass is the same recurrence from the other end and keeps `keep` and `h` alone.

    On one core at `[4, 2048, 256]`, forward and backward: 49 ms in float32, `tilewise.recurrence.scan` with a head
    for each channel 701 ms, log N steps over the whole length 117 ms, a loop over tokens 3,170 ms.

    Args:
        keep, add: floating `[B, N, C]`; factors beyond [-1, 1] may overflow. initial: `[B, C]`; None is 0.

    Returns:
        `[B, N, C]` in add's dtype; computed in float32 or wider. Raises ValueError for shapes that do not fit.
    """
    if keep.shape != add.shape or add.ndim != 3:
        raise ValueError(
            f"keep and add must both be [B, N, C], got {tuple(keep.shape)} and {tuple(add.shape)}"
        )
    if initial is None:
        initial = add.new_zeros(add.shape[0], add.shape[2])
    elif initial.shape != (add.shape[0], add.shape[2]):
        raise ValueError(
            f"initial must be [{add.shape[0]}, {add.shape[2]}], got shape {tuple(initial.shape)}"
        )
    wide = torch.promote_types(add.dtype, torch.float32)
    return _Elementwise.apply(keep.to(wide), add.to(wide), initial.to(wide)).to(add.dtype)


def running(
    keep: Tensor, add: Tensor, before: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`elementwise` over sequences that go on from `before [S, C]`: outputs `[B, N, C]` and what comes after, `[S,
    C]`.

    `mask` and `cu_seqlens` are as in `tilewise.recurrence.scan`: padding leaves the state alone, and packed
    sequences each have their own. float32 or wider. Raises ValueError, TypeError for arguments that do not fit.
    """
    offsets = check_offsets(cu_seqlens, mask, add.unsqueeze(1))
    if mask is not None:
        hidden = ~mask.unsqueeze(2)
        keep, add = keep.masked_fill(hidden, 1), add.masked_fill(hidden, 0)
    if offsets is None:
        out = elementwise(keep, add, before)
        return out, (out[:, -1] if out.shape[1] else before)
    # A sequence's first token forgets the one before it in the pack, and takes what the sequence had.
    there = offsets[:-1] < offsets[1:]
    first = offsets[:-1][there]
    taken = keep[0, first] * before[there].to(add.dtype)
    out = elementwise(keep.index_fill(1, first, 0), add.index_add(1, first, taken.unsqueeze(0)))
    if not out.shape[1]:
        return out, before
    last = out[0, (offsets[1:] - 1).clamp(min=0)]
    return out, torch.where(there.unsqueeze(1), last, before.to(out.dtype))


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep: Tensor, add: Tensor, initial: Tensor) -> Tensor:
        out = _run(keep, add, initial)
        ctx.save_for_backward(keep, out, initial)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        keep, out, initial = ctx.saved_tensors
        # What reaches h_t: its own gradient, and keep_{t+1} times what reaches h_{t+1}.
        later = torch.cat((keep[:, 1:], torch.zeros_like(keep[:, :1])), 1)
        reaches = _run(later.flip(1), grad.flip(1), torch.zeros_like(initial)).flip(1)
        before = torch.cat((initial.unsqueeze(1), out[:, :-1]), 1)[:, : out.shape[1]]
        first = reaches[:, 0] * keep[:, 0] if out.shape[1] else torch.zeros_like(initial)
        return reaches * before, reaches, first


def _run(keep: Tensor, add: Tensor, initial: Tensor) -> Tensor:
    b, n, c = add.shape
    if n == 0:
        return add.clone()
    block = min(BLOCK, 1 << (n - 1).bit_length())
    short = -n % block
    if short:
        keep, add = (torch.nn.functional.pad(x, (0, 0, 0, short)) for x in (keep, add))
    keep, add = (x.unflatten(1, (-1, block)) for x in (keep, add))  # [b, blocks, block, c]
    shift = 1
    while shift < block:
        add = torch.cat((add[:, :, :shift], add[:, :, shift:] + keep[:, :, shift:] * add[:, :, :-shift]), 2)
        keep = torch.cat((keep[:, :, :shift], keep[:, :, shift:] * keep[:, :, :-shift]), 2)
        shift *= 2
    carried = [initial]
    for i in range(add.shape[1] - 1):
        carried.append(add[:, i, -1] + keep[:, i, -1] * carried[-1])
    out = add + keep * torch.stack(carried, 1).unsqueeze(2)
    return out.flatten(1, 2)[:, :n]
