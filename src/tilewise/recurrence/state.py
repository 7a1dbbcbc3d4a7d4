"""What a recurrence carries from one call to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T", bound="Carried")


@dataclass(frozen=True, eq=False)
class Carried:
    """A state: a dataclass of tensors, other states and tuples of them, the sequences along the first axis of
    each."""

    def detach(self: T) -> T:
        """The same without a graph, for truncated backpropagation."""
        return self.map(Tensor.detach)

    def to(self: T, *args: Any, **kwargs: Any) -> T:
        """As `Tensor.to`, of every tensor."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def select(self: T, sequences: Tensor) -> T:
        """The states of these sequences, as beam search and batching want them."""
        return self.map(lambda x: x[sequences])

    @property
    def bytes(self) -> int:
        """What it holds."""
        sizes: list[int] = []
        self.map(lambda x: sizes.append(x.numel() * x.element_size()) or x)  # type: ignore[func-returns-value]
        return sum(sizes)

    def map(self: T, change: Callable[[Tensor], Tensor]) -> T:
        """The same with every tensor changed."""

        def changed(part: Any) -> Any:
            if isinstance(part, Tensor):
                return change(part)
            if isinstance(part, Carried):
                return part.map(change)
            return tuple(map(changed, part)) if isinstance(part, tuple) else part

        return replace(self, **{f.name: changed(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, eq=False)
class State(Carried):
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
