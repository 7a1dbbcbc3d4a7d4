"""LLSA: a top-k choice made level by level, and the coarse levels read where it went no deeper."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.recipes.psa import read_means
from tilewise.attention.scores import grouped
from tilewise.attention.stages import AsGiven, Layout, Order
from tilewise.tiles import FULL, NONE, PARTIAL, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import take, to_heads


@dataclass(frozen=True)
class LLSA(Method):
    """Log-linear sparse attention (Zhou et al., 2025, arXiv 2512.16615).

    Queries and keys are pooled by `block`, again and again. At the coarsest level every block of queries is
    compared with every block of keys and takes the best `top_k`; at each level below, a block of queries compares
    the children of the blocks that its parent took, and takes the best `top_k` of those. Chosen blocks of the
    finest level are read token by token. All others are read as means, at the level where they were left (the
    paper's enriched keys and values), each weighing as its count of tokens. Scores computed and pairs read grow as
    N log N, where a single level needs (N / block)^2 scores. The choice has no gradient; means and tokens have.

    Differs from the paper: its coarse levels keep the blocks whose children are read as well, so that those count
    twice; here every token is read once, and `overlap=True` is the paper's form. Blocks that the mask cuts through
    are always entered, so any mask works, at the price of more blocks where many are cut; they count among the
    `top_k`. Any lengths. Which blocks are read is held as a map of (N / block)^2 bytes per head: memory is not log-
    linear. Grouped heads: each query head chooses for itself.

    Args:
        block: tokens per block, and blocks per block of the next level; >= 2. top_k: blocks taken at each level.
        levels: pooled levels; None takes as many as leave at least `top_k` blocks of keys at the coarsest, which
            `torch.compile` compiles once for each number.
        overlap: read the mean of a block also where its children are read.
        order: a permutation that brings like tokens close, its tiles are not used; for a video `Boxes(grid, box)`
            with boxes of `block` tokens.

    The choice for a query depends on all queries of its coarsest block, and so, as blocks grow with the prompt, on
    later ones. A bias per key has no meaning for means of keys and raises ValueError.
    """

    block: int = 16
    top_k: int = 8
    levels: int | None = None
    overlap: bool = False
    order: Order = field(default_factory=AsGiven)
    modes = ("train", "prefill")
    reads = "q, k"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("block", self.block, 2),
            ("top_k", self.top_k, 1),
            ("levels", self.levels, 1),
        ):
            if value is None and name == "levels":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not isinstance(self.overlap, bool):
            raise ValueError(f"overlap must be True or False, got {self.overlap!r}")

    @property
    def lookahead(self) -> str:
        return "prompt"

    def depth(self, n_k: int) -> int:
        """Pooled levels for so many keys."""
        if self.levels is not None:
            return self.levels
        depth = 1
        while n_k > (self.top_k - 1) * self.block ** (depth + 1) and n_k > self.block ** (depth + 1):
            depth += 1
        return depth

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        if not q.shape[2] or not k.shape[2]:
            return Plan((Pass(view),), view)
        at = self.order.arrange(q, k, view, scale, (self.block, self.block))
        ordered = view.permute(at.q_order, at.k_order) if at.q_order is not None else view
        q, k = take(q, at.q_order), take(k, at.k_order)
        unit = Tiling(self.block)
        layout = Layout(q, k, ordered, unit, unit, scale, at.q_order, at.k_order, view)
        passes, parents = [], None
        for level in range(self.depth(k.shape[2]), 0, -1):
            size = Tiling(self.block**level)
            parents, chosen, left = self._level(layout, size, parents)
            passes.append(read_means(layout, size, left, size, Tiling(1)))
        exact = Pass(view, TileMap(chosen, unit, unit), at.q_order, at.k_order)
        return Plan((exact, *passes), view)

    def _level(self, layout: Layout, size: Tiling, parents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the blocks of one level take, from the children of what their parents took.

        `parents`: int64 `[B, H_q, T_parents, W]`, -1 for none; None compares all. Returns the same for this level,
        and two maps `[B, H_q, T_q, T_k]`: blocks that were taken, blocks to be read as means.
        """
        q, (k, _) = size.mean(layout.q)[0], size.mean(layout.k, layout.view.keys_seen())
        (b, heads, t_q), t_k, block = q.shape[:3], k.shape[2], self.block
        kinds = to_heads(layout.view.tiles(size, size), heads).expand(b, heads, -1, -1)
        if parents is None:
            index = torch.arange(t_k, device=q.device).expand(b, heads, t_q, t_k)
            scores = grouped(q, k)
        else:
            index = (parents.unsqueeze(-1) * block + torch.arange(block, device=q.device)).flatten(3)
            index = index.masked_fill((parents < 0).repeat_interleave(block, -1), -1)
            index = index.masked_fill(index >= t_k, -1)  # [b, h, T_parents, candidates]
            keys = take(to_heads(k, heads), index.clamp(min=0).flatten(2)).unflatten(2, index.shape[2:])
            row = torch.arange(t_q, device=q.device)
            scores = (Tiling(block).split(q, 0) @ keys.mT).flatten(2, 3)[:, :, row]  # [b, h, T_q, candidates]
            index = index[:, :, row // block]
        kind = kinds.gather(-1, index.clamp(min=0)).masked_fill(index < 0, NONE)
        ranked = scores.masked_fill(kind == NONE, -torch.inf).masked_fill(kind == PARTIAL, torch.inf)
        best, place = ranked.topk(min(self._width(layout, kind), ranked.shape[-1]), -1)
        wanted = (torch.arange(best.shape[-1], device=q.device) < self.top_k) | (best == torch.inf)
        wanted = wanted & (best > -torch.inf)
        taken = index.gather(-1, place).masked_fill(~wanted, -1)
        chosen = _map(taken, taken >= 0, t_k)
        left = _map(index, kind == FULL, t_k)
        return taken, chosen, left if self.overlap else left & ~chosen

    def _width(self, layout: Layout, kind: Tensor) -> int:
        """How many blocks a row may take: `top_k`, or more where the mask cuts through more."""
        given = layout.view if layout.given is None else layout.given
        if layout.view.simple is not None or given.simple == "everything":
            return self.top_k  # a causal mask cuts through one block of a row
        if torch.compiler.is_compiling():  # numbers are not known
            return kind.shape[-1]
        return max(self.top_k, int((kind == PARTIAL).sum(-1).max()))


def _map(index: Tensor, mark: Tensor, count: int) -> Tensor:
    """Bool `[..., count]`: True at those of `index [..., W]` that are marked."""
    out = torch.zeros(*index.shape[:-1], count + 1, dtype=torch.bool, device=index.device)
    return out.scatter_(-1, index.masked_fill(~mark, count), True)[..., :count]
