"""SeerAttention: tiles chosen by a gate that has learnt what the model's own attention looks at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tilewise.attention.gates.block_gate import BlockGate
from tilewise.attention.gates.sizes import positive
from tilewise.attention.scores import mass
from tilewise.attention.selects import Own, TopK
from tilewise.attention.stages import AsGiven, Layout, Recipe, Select, Skip, Tiles


@dataclass(frozen=True)
class Learned:
    """Score: the softmax over a row's tiles of a gate's logits. Grouped heads: each query head for itself."""

    gate: BlockGate
    looks = "tile"

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        return mass(self.gate(self.gate.pool(layout)), among)


@dataclass(frozen=True)
class Above:
    """Select: every tile whose score is at least `threshold`; forced tiles whatever theirs. 0 takes every tile."""

    threshold: float
    looks = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, (int, float)) or not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {self.threshold!r}")

    def select(self, scores: Tensor, among: Tensor, forced: Tensor) -> Tensor:
        return (scores >= self.threshold) & among | forced


@dataclass(frozen=True)
class SeerAttention(Recipe):
    """Tiles chosen by a learned gate (Gao et al., 2024, arXiv 2410.13276).

    A `BlockGate` guesses each tile's largest attention weight from pooled queries and keys; it is trained on what
    the frozen model's attention does (`block_lesson`, `BlockLoss`, `fit`). Each row of tiles reads its `top_k`
    best, or all whose share of the guesses is at least `threshold`; the diagonal always. A gate belongs to one
    layer: `tilewise.patch(model, gates.methods(SeerAttention, top_k=16))` gives every layer its own, and
    `tilewise.models.load_gates()` brings those of the bundled model.

    Differs from the paper: a gate takes rotated queries and keys and turns them back by the positions of the mask,
    where the authors' reads the layer before it rotates; that is the same to rounding where the model counts
    positions as the mask does (padding on the left may shift them all, which moves the choice, not what is
    computed).

    Args:
        gate: of the layer. top_k: tiles per row, the diagonal included. threshold: a share in [0, 1), in place of
            `top_k`; exactly one of them is given. tile: tokens per tile side, as the gate was trained with.

    Raises ValueError for other settings, and when the layer's heads or head_dim are not the gate's.
    """

    gate: BlockGate
    top_k: int | None = None
    threshold: float | None = None
    tile: int = 64
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k, trained weights"
    needs = "trained gates"

    def __post_init__(self) -> None:
        positive(tile=self.tile)
        if not isinstance(self.gate, BlockGate):
            raise TypeError(f"gate must be the BlockGate of a layer, got {type(self.gate).__name__}")
        if (self.top_k is None) == (self.threshold is None):
            raise ValueError(
                f"give top_k or threshold, one of them, got top_k={self.top_k!r}, threshold={self.threshold!r}"
            )
        self.tiles()

    def tiles(self) -> Tiles:
        select: Select = Above(self.threshold) if self.threshold is not None else TopK(self.top_k or 0)
        return Tiles(
            score=Learned(self.gate),
            select=select,
            tile=(self.tile, self.tile),
            order=AsGiven(),
            always=(Own(),),
            rest=Skip(),
        )
