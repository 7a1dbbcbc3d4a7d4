"""Lists made of rows of booleans."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(keep: Tensor, most: int) -> Tensor:
    """The places of True in each row of `keep [..., N]`, the last `most`: int32 `[..., most]`, -1 behind them.

    In linear time. Counted is what is kept alone, which takes a quarter of the time where that is 5 % of a row;
    inside torch.compile, which cannot know how much that is, all is.
    """
    rows = keep.reshape(keep.shape[:-1].numel(), keep.shape[-1])
    if torch.compiler.is_compiling():
        count = rows.cumsum(-1, dtype=torch.int32)
        at = count - 1 - (count[:, -1:] - most).clamp(min=0)
        place = torch.arange(rows.shape[1], dtype=torch.int32, device=keep.device).expand_as(at)
        listed = torch.full((len(rows), most + 1), -1, dtype=torch.int32, device=keep.device)
        listed = listed.scatter(1, torch.where(rows & (at >= 0), at, most).long(), place)
        return listed[:, :most].reshape(*keep.shape[:-1], most)
    row, place = rows.nonzero().unbind(-1)
    total = rows.sum(-1)
    # Where each row's list begins among all that is kept, those before its last `most` left out.
    begin = total.cumsum(0) - total.clamp(max=most)
    at = torch.arange(len(row), device=keep.device) - begin[row]
    listed = torch.full((len(rows), most + 1), -1, dtype=torch.int32, device=keep.device)
    listed[row, torch.where(at < 0, most, at)] = place.int()
    return listed[:, :most].reshape(*keep.shape[:-1], most)
