"""What is kept of a block's attention between denoising steps, and the rules that say when it is computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tilewise.tiles import Partial, TileMap


@dataclass(frozen=True, eq=False)
class OutsideState:
    """What the queries of one block got from the keys outside it, for one layer.

    Attributes:
        partial: over the keys outside that are reused: all of them, or with a sparse method those that it did not
            choose. `out [B, H_q, N, D_v]` in the values' dtype, `lse` float32 `[B, H_q, N]`; carries no gradient.
        outside: how many keys lie outside the block, which tells blocks apart.
        step: the denoising step attended last, 0 for the first of a block.
        computed: int64 `[B, H_q]`, the step at which each head's partial was computed.
        decoded: int64 `[B]`, tokens of the block that were decoded since some head's partial was computed.
        chosen: the tiles outside that are computed in every step; None without a sparse method.
    """

    partial: Partial
    outside: int
    step: int
    computed: Tensor
    decoded: Tensor
    chosen: TileMap | None = None

    def check(self, shape: tuple[int, ...], dtype: torch.dtype, outside: int, sparse: bool) -> None:
        """Raise ValueError unless the state was kept for such a call: `shape` `[B, H_q, N, D_v]` of its output."""
        have = tuple(self.partial.out.shape)
        if have != shape or self.partial.out.dtype != dtype or self.partial.lse.shape != shape[:3]:
            raise ValueError(
                f"state was kept for outputs {list(have)} in {self.partial.out.dtype}, this call gives"
                f" {list(shape)} in {dtype}; state must be None for a new block"
            )
        if self.outside != outside:
            raise ValueError(
                f"state was kept for the block after {self.outside} keys, this one comes after {outside};"
                " state must be None for a new block"
            )
        if (self.chosen is not None) != sparse:
            raise ValueError(f"state was kept {'without' if sparse else 'with'} a sparse method")


class Refresh(Protocol):
    """Says when what was kept is computed again."""

    def due(self, state: OutsideState) -> Tensor:
        """Bool `[B|1, H_q|1]`. `state` is the kept one, with `step` and `decoded` of the step about to be taken."""


@dataclass(frozen=True)
class Decoded:
    """A sequence is computed again once `threshold` of its tokens were decoded since the last time.

    The paper's rule for language models: a token that turns from a mask into a word changes its own query and,
    through the layers, those of its neighbours. With the authors' threshold of 2 and one token decoded in each
    step, every other step computes it.
    """

    threshold: int = 2

    def __post_init__(self) -> None:
        _at_least_one("threshold", self.threshold)

    def due(self, state: OutsideState) -> Tensor:
        return (state.decoded >= self.threshold).unsqueeze(1)


@dataclass(frozen=True)
class Every:
    """Computed again every so many steps."""

    steps: int

    def __post_init__(self) -> None:
        _at_least_one("steps", self.steps)

    def due(self, state: OutsideState) -> Tensor:
        return state.step - state.computed >= self.steps


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads that were found to change are computed again, the others reused; for one layer.

    The authors' rule for video, whose few steps change every token: `calibrate` finds once, on some examples, in
    which steps a head has to be computed again. Steps that are not listed compute every head.

    Args:
        changing: bool `[H_q]` by step, True for heads to compute again.
    """

    changing: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        for step, heads in self.changing.items():
            if not isinstance(heads, Tensor) or heads.dtype != torch.bool or heads.ndim != 1:
                given = f"{heads.dtype} {list(heads.shape)}" if isinstance(heads, Tensor) else type(heads)
                raise TypeError(f"changing[{step!r}] must be a bool tensor [H_q], got {given}")

    @classmethod
    def calibrate(
        cls, partials: Sequence[Partial], similarity: float = 0.85, lse_change: float = 0.05
    ) -> Heads:
        """From what the keys outside gave at step 0, 1, ...; examples lie along the batch axis.

        A head changes at a step when its outputs' cosine similarity to what would be kept by then is below
        `similarity`, or its lse differs by more than `lse_change`, both averaged over examples and queries.
        """
        if not partials:
            raise ValueError("partials must hold at least the first step's, got none")
        kept, changing = partials[0], {}
        for step, new in enumerate(partials[1:], 1):
            alike, change = stability(kept, new)
            heads = (alike < similarity) | (change > lse_change)
            kept = pick(heads.unsqueeze(0), new, kept)
            changing[step] = heads
        return cls(changing)

    def due(self, state: OutsideState) -> Tensor:
        heads = state.computed.shape[1]
        changing = self.changing.get(state.step)
        if changing is None:
            return torch.ones(1, heads, dtype=torch.bool, device=state.computed.device)
        if len(changing) != heads:
            raise ValueError(f"changing[{state.step}] speaks of {len(changing)} heads, the call has {heads}")
        return changing.to(state.computed.device).unsqueeze(0)


def stability(kept: Partial, new: Partial) -> tuple[Tensor, Tensor]:
    """How alike two partials of the same block are, per head, averaged over batch and queries.

    Returns the cosine similarity of outputs and the absolute difference of lse, float32 `[H_q]` each.
    """
    if kept.out.shape != new.out.shape:
        raise ValueError(
            f"partials must be of one shape, got {list(kept.out.shape)} and {list(new.out.shape)}"
        )
    alike = cosine_similarity(kept.out.float(), new.out.float(), dim=-1).mean((0, 2))
    change = torch.where(kept.lse == new.lse, 0, (kept.lse - new.lse).abs())  # -inf where there is nothing
    return alike, change.mean((0, 2))


def pick(due: Tensor, new: Partial, old: Partial) -> Partial:
    """`new` for the heads that are due, bool `[B|1, H_q]`, else `old`."""
    due = due.unsqueeze(2)
    return Partial(torch.where(due.unsqueeze(3), new.out, old.out), torch.where(due, new.lse, old.lse))


def _at_least_one(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
