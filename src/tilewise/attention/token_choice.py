"""What methods share that choose tokens for each query."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tilewise.attention.plans import Pass, Plan
from tilewise.attention.reads import Lists
from tilewise.kernels import Choice
from tilewise.tiles import Visibility


def lists_plan(index: Tensor, view: Visibility, choices: tuple[Choice, ...] = ()) -> Plan:
    """The plan that reads lists `[B, H, N_q, K]` of keys chosen among those that `view` shows, -1 for none.

    Where a boolean grid hid keys, the lists know it already. `choices` say which engines chose them.
    """
    own = replace(view, dense=None, simple=None)
    return Plan((Pass(own, reads=Lists(index)),), view, choices=choices)


def shared(view: Visibility, heads: int, groups: int) -> int:
    """How many lists serve `heads` query heads where `groups` would do: all of them if each has its own mask."""
    told = max(x.shape[1] for x in (view.lo, view.pos, view.dense) if x is not None)
    return max(groups, told) if told in (1, groups) else heads
