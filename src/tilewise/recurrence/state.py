"""What a recurrence carries from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class State:
    """The state of `scan` after the last token, for training, prefill and decoding alike; hand it to the next call.

    Attributes:
        matrix: float32 (float64 for float64 inputs) `[S, H, D_k, D_v]`, one for each of S sequences.
        sums: `[S, H, D_k]`, the same recurrence over values of 1, where outputs are normalised by it; else None.
        peak: `[S, H]`, the log by which `matrix` and `sums` are scaled down, where input gates are given as logs;
            -inf before any token; else None.
        rule: by which it was made.
    """

    matrix: Tensor
    sums: Tensor | None = None
    peak: Tensor | None = None
    rule: str = "add"

    def detach(self) -> State:
        """The same without a graph, for truncated backpropagation."""
        return self._map(Tensor.detach)

    def to(self, *args, **kwargs) -> State:
        """As `Tensor.to`, of every part."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def select(self, sequences: Tensor) -> State:
        """The states of these sequences, as beam search and batching want them."""
        return self._map(lambda x: x[sequences])

    @property
    def bytes(self) -> int:
        """What it holds."""
        parts = [getattr(self, f.name) for f in fields(self)]
        return sum(x.numel() * x.element_size() for x in parts if isinstance(x, Tensor))

    def _map(self, change) -> State:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(x) for name, x in parts.items() if isinstance(x, torch.Tensor)})
