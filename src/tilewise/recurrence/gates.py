"""Input gates given as logs: a running maximum keeps them, and the state, within range."""

from __future__ import annotations

import torch
from torch import Tensor


def running_peak(decay: Tensor | None, log_beta: Tensor) -> Tensor:
    """`m_t = max(decay_t + m_{t-1}, log_beta_t)` along the last axis, from m = -inf; shapes and result `[..., N]`.

    In log N steps of whole tensors; sums are of the decays between two tokens only, so none is lost however long
    the sequence. A decay of -inf forgets all before it. Takes no gradient: what it scales does not depend on it.
    """
    peak = log_beta.detach()
    steps = torch.zeros_like(peak) if decay is None else decay.detach().to(peak.dtype).expand_as(peak)
    shift, n = 1, peak.shape[-1]
    while shift < n:
        peak = torch.cat(
            (peak[..., :shift], torch.maximum(peak[..., shift:], steps[..., shift:] + peak[..., :-shift])), -1
        )
        if decay is not None:
            steps = torch.cat((steps[..., :shift], steps[..., shift:] + steps[..., :-shift]), -1)
        shift *= 2
    return peak


def stabilised(decay: Tensor | None, log_beta: Tensor, peak: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and betas of the state divided by exp(peak), `[..., N]` both; none is above 0 and 1.

    `before` is the peak before each token.
    """
    some = peak > -torch.inf
    step = torch.zeros_like(peak) if decay is None else decay.to(peak.dtype)
    floor = torch.where(some, peak, 0.0)
    # Where the peak is not the token's own it is the one before, decayed: nothing is left to move, and the sum,
    # of numbers as large as the peak, would only round. That cost 6 times the error of a loop at gates of 300.
    carried = log_beta.detach() < peak
    moved = torch.where(carried, step - step.detach(), torch.where(some, step + before - floor, 0.0))
    moved = moved - moved.detach().clamp(min=0)  # rounding can leave a sum that should be 0 a little above it
    return moved, torch.where(some, (log_beta - floor).exp(), 0.0)
