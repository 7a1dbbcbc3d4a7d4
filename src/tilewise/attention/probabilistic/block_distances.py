"""PrFlashAttention: a probability distribution over block distances draws the tiles that take part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.attention.api import bind
from tilewise.attention.scores import TrueMass
from tilewise.attention.selects import Own, TopK
from tilewise.attention.stages import AsGiven, Layout, Recipe, Skip, Tiles
from tilewise.tiles import NONE, Mask, Tiling
from tilewise.tiles.visibility import FAR, HIDDEN, to_heads

WORD = 0xFFFFFFFF  # hashes are 32 bits held in int64, where their products do not overflow
STEP = 0x9E3779B9
PER_UNIT = 5  # nodes of the integral per unit of log time; 10 change the result by less than 1e-14


@dataclass(frozen=True)
class BlockDistances:
    """Score: the log of a tile's weight by its distance in blocks, plus noise that turns the best k into a draw.

    The distance d of a tile is counted in key tiles, from the one with the last position of its queries. Its weight
    is `(1 + d)^-decay`, or `weights[d]`, the last entry for all farther ones; a row's weights divided by their sum
    are its distribution. Gumbel noise is added to their logs, so that the k largest scores of a row are k draws
    without replacement, the first of them with exactly these probabilities (all of them: `participation`).

    Queries and keys are not read. The noise is a hash of the tile's place, counted from the first key that is no
    padding, of the head, `seed` and `round`: a call repeated draws the same tiles, a decoded token draws what its
    tile drew in the prompt, and another round draws anew. Batch entries draw alike; query heads, grouped or not,
    each for themselves.

    Args:
        decay: >= 0; 0 is the uniform distribution, 1 the harmonic series.
        weights: instead, finite numbers > 0, one per distance.
        seed, round: integers in 0..2^32 - 1.
    """

    decay: float = 1.0
    weights: tuple[float, ...] | None = None
    seed: int = 0
    round: int = 0
    looks = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay must be a finite number >= 0, got {self.decay!r}")
        if self.weights is not None:
            fits = isinstance(self.weights, tuple) and self.weights
            if not fits or not all(0 < weight < math.inf for weight in self.weights):
                raise ValueError(
                    f"weights must be None or a tuple of finite numbers > 0, got {self.weights!r}"
                )
        for name, value in (("seed", self.seed), ("round", self.round)):
            if not isinstance(value, int) or not 0 <= value <= WORD:
                raise ValueError(f"{name} must be an integer in 0..2^32 - 1, got {value!r}")

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        rows, columns = blocks(layout)
        noise = self._noise(rows, columns, layout.heads)
        scores = self.log_weights((rows.unsqueeze(3) - columns.unsqueeze(2)).abs()) + noise
        return scores.float().expand(layout.q.shape[0], layout.heads, -1, -1)

    def log_weights(self, distance: Tensor) -> Tensor:
        """Logs of the weights of integer distances >= 0, float64."""
        if self.weights is None:
            return -self.decay * distance.double().log1p()
        table = torch.tensor(self.weights, dtype=torch.float64, device=distance.device).log()
        return table[distance.clamp(max=len(self.weights) - 1)]

    def _noise(self, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
        """Gumbel noise, float64 `[b, heads, T_q, T_k]`."""
        head = torch.arange(heads, device=rows.device).view(1, -1, 1, 1)
        start = _chain(_chain(torch.zeros_like(head), self.seed), self.round)
        row = _chain(_chain(start, head), rows.unsqueeze(3))
        uniform = (_chain(row, columns.unsqueeze(2)).double() + 0.5) / (WORD + 1)
        return -(-uniform.log()).log()


@dataclass(frozen=True)
class PrFlashAttention(Recipe):
    """Probabilistic block-sparse attention (Li, 2024, arXiv 2410.18441): distances, not contents, draw the tiles.

    Every row of tiles keeps its own tile and draws others by `BlockDistances`, `budget` in all, so near blocks take
    part often, far ones now and then, and the cost is known beforehand. Causality holds by positions, tile by tile;
    `attend_reshaped` carries out the same draw as the paper words it, on tensors re-shaped so that drawn blocks
    stand side by side and what remains visible is a lower triangle. Decoding, padding and any mask work. What was
    not drawn contributes nothing. Other rounds draw other tiles; their outputs may be averaged.

    Chosen here: the distribution is a power of the distance, or a table such as `block_profile` measures; a row
    draws a fixed number of tiles, without replacement, and its own tile is always in.

    Args:
        budget: tiles per row, its own included. decay, weights, seed, round: see `BlockDistances`.
        tile: tokens per tile side.
    """

    budget: int = 16
    decay: float = 1.0
    weights: tuple[float, ...] | None = None
    tile: int = 128
    seed: int = 0
    round: int = 0
    name = "pr-flash"

    def __post_init__(self) -> None:
        for name, value in (("budget", self.budget), ("tile", self.tile)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.tiles()

    def tiles(self) -> Tiles:
        return Tiles(
            score=BlockDistances(self.decay, self.weights, self.seed, self.round),
            select=TopK(self.budget),
            tile=(self.tile, self.tile),
            order=AsGiven(),
            always=(Own(),),
            rest=Skip(),
        )


def participation(log_weights: Tensor, draws: int) -> Tensor:
    """The probability of each entry to be among `draws` draws without replacement, by these weights.

    Exact up to an integral in one variable: entries arrive at exponential times whose rates are the weights, and
    the first `draws` to arrive are the draws. Dividing a drawn tile's mass by this probability makes sums over
    drawn tiles unbiased (Horvitz and Thompson).

    Args:
        log_weights: floating `[..., T]`; -inf for entries that cannot be drawn. draws: integer >= 1.
    Returns:
        float64 `[..., T]`; 1 everywhere but at -inf when no more than `draws` entries can be drawn.
    """
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be an integer >= 1, got {draws!r}")
    can = log_weights > -torch.inf
    if not log_weights.shape[-1] or draws >= log_weights.shape[-1]:
        return can.double()
    rates = (log_weights.double() - log_weights.double().amax(-1, keepdim=True)).exp().nan_to_num(0)
    # In the log of time the integrand is smooth; it vanishes beyond these ends, 1e-16 and 745 / the least rate.
    least = rates.masked_fill(~can, torch.inf).amin(-1, keepdim=True).clamp(1e-300, 1)
    low, high = torch.full_like(least, 1e-16 / rates.shape[-1]).log(), (745 / least).log()
    nodes = 1 + math.ceil(PER_UNIT * float((high - low).max()))
    node = torch.linspace(0, 1, nodes, dtype=torch.float64, device=rates.device)
    time = (low + (high - low) * node).exp().unsqueeze(-1)  # [..., nodes, 1]
    late = torch.exp(-rates.unsqueeze(-2) * time)  # chance to arrive after `time`, [..., nodes, T]
    fewer = torch.zeros(*late.shape, draws, dtype=torch.float64, device=rates.device)
    fewer[..., 0] = 1
    for j in range(rates.shape[-1]):  # chance that so many others have arrived
        stay = late[..., j : j + 1].unsqueeze(-1)
        added = fewer * stay + pad(fewer, (1, -1)) * (1 - stay)
        added[..., j, :] = fewer[..., j, :]
        fewer = added
    density = rates.unsqueeze(-2) * time * late * fewer.sum(-1)
    found = torch.trapezoid(density, dx=1 / (nodes - 1), dim=-2) * (high - low)
    few = can.sum(-1, keepdim=True) <= draws
    return torch.where(few, can.double(), found)


def block_profile(
    q: Tensor,
    k: Tensor,
    *,
    tile: int = 128,
    mask: Mask | Tensor | str | None = "causal",
    scale: float | None = None,
) -> tuple[float, ...]:
    """The mean attention mass of a tile at each block distance, as `weights` that sum to 1.

    From a sample of a model's queries and keys; costs as much as dense attention. Batch entries and heads are
    averaged, and of the rows those that have a visible tile at the distance.

    Args: as for `tilewise.attend`; tile: tokens per tile side.
    """
    view, _, scale = bind(q, k, k, mask, None, scale, None)
    layout = Layout(q, k, view, Tiling(tile), Tiling(tile), scale)
    visible = layout.kinds() != NONE
    if not bool(visible.any()):
        raise ValueError(f"q and k show no visible tile, got {q.shape[2]} queries and {k.shape[2]} keys")
    mass = TrueMass().score(layout, visible).double()
    rows, columns = blocks(layout)
    distance = (rows.unsqueeze(3) - columns.unsqueeze(2)).abs().expand_as(mass)
    visible = visible.expand_as(mass)
    total = torch.zeros(int(distance[visible].max()) + 1, dtype=torch.float64, device=mass.device)
    count = total.clone().index_add_(0, distance[visible], torch.ones_like(mass[visible]))
    total.index_add_(0, distance[visible], mass[visible])
    mean = (total / count.clamp(min=1)).clamp(min=torch.finfo(torch.float32).tiny)
    return tuple((mean / mean.sum()).tolist())


def blocks(layout: Layout) -> tuple[Tensor, Tensor]:
    """The place of every tile, counted in key tiles: rows int64 `[b, h, T_q]`, columns `[b, h, T_k]`.

    A row of tiles stands where its last query does. 0 is the tile of the first key that is no padding.
    """
    width, heads = layout.k_tiling.size, layout.heads
    last = layout.q_tiling.split(layout.view.q_pos, -FAR).amax(3)
    position = layout.view.k_pos
    first = layout.k_tiling.split(position.masked_fill(position == HIDDEN, FAR), FAR).amin(3)
    rows, columns = (torch.div(x, width, rounding_mode="floor") for x in (last, first))
    start = pad(columns, (0, 1), value=FAR // width).amin((1, 2), keepdim=True)  # one more: there may be none
    return to_heads(rows - start, heads), to_heads(columns - start, heads)


def _chain(state: Tensor, value: Tensor | int) -> Tensor:
    """A hash of a hash and a number (of its lowest 32 bits)."""
    return _mix(_mix(state + STEP) ^ (value & WORD))


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers that leaves no bit alone (two rounds of multiply and shift)."""
    x = x & WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & WORD
    return x ^ (x >> 15)
