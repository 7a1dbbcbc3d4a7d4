"""Attention sinks plus a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.tiles import TileMap
from tilewise.tiles.visibility import FAR, HIDDEN

NARROW = 16  # keys per tile over the sinks, of which there are few


@dataclass(frozen=True)
class SinkWindow(Method):
    """The first `sink` tokens a query may see, and the last `window` up to itself, exactly to the token.

    Two passes over disjoint keys, merged. What StreamingLLM (Xiao et al., 2023) keeps; unlike it, true positions
    are kept rather than positions within the kept tokens. Reads nothing, so it costs nothing to choose, and
    cannot retrieve anything from the middle.

    Args:
        sink: tokens kept at the start of the sequence (of each document, after padding), >= 0.
        window: tokens kept up to and including the query's own, >= 1.
    """

    sink: int = 4
    window: int = 1024
    name = "sink-window"

    def __post_init__(self) -> None:
        if not isinstance(self.sink, int) or self.sink < 0:
            raise ValueError(f"sink must be an integer >= 0, got {self.sink!r}")
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be an integer >= 1, got {self.window!r}")

    def plan(self, q, k, view, scale) -> Plan:
        n_q, n_k = q.shape[2], k.shape[2]
        if not n_k or not self.sink:
            return Plan((Pass(view.limit(lo=view.q_pos - self.window + 1)),), view)
        shown = view.k_pos.masked_fill(view.k_pos == HIDDEN, FAR)
        first = torch.maximum(view.lo[..., 0], shown.amin(-1, keepdim=True).amin(1, keepdim=True))
        last_sink = first + self.sink - 1
        recent = torch.maximum(view.q_pos - self.window, last_sink) + 1
        cut = (128, NARROW)
        every = torch.ones(1, 1, -(-n_q // cut[0]), -(-n_k // cut[1]), dtype=torch.bool, device=q.device)
        sinks = Pass(view.limit(hi=last_sink), TileMap.from_mask(every, cut))
        return Plan((sinks, Pass(view.limit(lo=recent))), view)
