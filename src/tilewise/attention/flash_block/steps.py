"""One step of one layer: attention within the block, merged with what is kept of the keys outside."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tilewise.attention.api import bind
from tilewise.attention.flash_block.state import Decoded, OutsideState, Refresh, pick
from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.tiles import NONE, Mask, Partial, TileMap, Visibility, as_mask, merge
from tilewise.tiles.visibility import to_heads


@dataclass(frozen=True, eq=False)
class BlockStep:
    """One step's attention of a block.

    Attributes:
        out: `[B, H_q, N, D_v]` in q's dtype. lse: float32 `[B, H_q, N]`, over all keys.
        state: what to give to the next step of the same block.
        refreshed: bool `[B, H_q]`, heads whose keys outside were all read.
        inside, outside: the passes of the tile kernel that were run.
    """

    out: Tensor
    lse: Tensor
    state: OutsideState
    refreshed: Tensor
    inside: tuple[Pass, ...]
    outside: tuple[Pass, ...]

    @property
    def scores(self) -> int:
        """Scores computed in this step, over batch and heads."""
        costs = [to_heads(p.cost(), self.refreshed.shape[1]) for p in self.inside + self.outside]
        return int(sum(float(cost.expand_as(self.refreshed).sum()) for cost in costs))

    def keys_read(self, kv_heads: int) -> int:
        """Keys outside the block that were read, over batch and kv heads: the paper's access to the cache."""
        batch, heads = self.refreshed.shape
        return sum(_keys_read(p, batch, heads, kv_heads) for p in self.outside)


@dataclass(frozen=True)
class FlashBlock:
    """Attention of a block that is denoised in several steps (Chen et al., 2026, arXiv 2602.05305).

    In block diffusion the queries of one block attend, step after step, to the block itself and to a long history.
    What they get from the history (`out`, `lse`) hardly changes between steps, so it is computed when `refresh`
    says so and merged with attention within the block, which is computed in every step. A step that reuses reads
    no key outside the block.

    With `sparse`, only what that method leaves out is reused: the tiles it chooses are computed in every step, and
    the rest of the history, the dense answer less the chosen part, comes from the last refresh. The choice stays
    that of the refresh, or tiles would be counted twice or not at all.

    The rest is computed as the complement of the chosen tiles, not by subtraction, which would cancel when the
    chosen part holds nearly all mass and costs the same; the authors' code has no sparse part to compare with.
    Other differences from the paper: `Every` is a plain rule beside the authors' two; all sequences of a batch are
    at the same step; there is no fused kernel. As in the authors' code, the pass that writes a finished block's
    keys should compute everything: give it `state=None`.

    Args:
        refresh: `Decoded`, `Every`, `Heads` or any other rule. sparse: a method that chooses tiles of fixed size
            in the tokens' own order, with nothing for the rest; None reuses all that is outside.
    """

    refresh: Refresh = field(default_factory=Decoded)
    sparse: Method | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        outside: tuple[Tensor, Tensor],
        state: OutsideState | None = None,
        *,
        decoded: int | Tensor = 0,
        mask: Mask | Tensor | str | None = None,
        outside_mask: Mask | Tensor | str | None = None,
        scale: float | None = None,
        engine: str = "auto",
    ) -> BlockStep:
        """One step of one layer.

        Args:
            q: `[B, H_q, N, D]`, the block's queries; k, v: `[B, H_kv, N, D]`, `[B, H_kv, N, D_v]`, its keys and
                values, grouped as in `attend`.
            outside: keys and values outside the block, `[B, H_kv, M, D]` and `[B, H_kv, M, D_v]`.
            state: the last step's, None for a block's first step.
            decoded: tokens decoded since the last step, an integer or int64 `[B]`.
            mask: within the block, None for both directions. outside_mask: over the keys outside, which stand at
                positions 0 to M - 1 with the block's queries after them (padding, a window). Neither is additive.
            scale, engine: as in `attend`.

        Gradients flow to what is computed in this step, not through the state. Raises ValueError for a state of
        another shape, block or kind, a negative `decoded`, or a sparse method that does not fit; and as `attend`.
        """
        k_out, v_out = outside
        view, _, scale = bind(q, k, v, as_mask(mask), None, scale, None)
        before = torch.arange(k_out.shape[2], device=q.device)
        own = torch.arange(q.shape[2], device=q.device) + k_out.shape[2]
        placed = as_mask(outside_mask).at(own, before)
        view_out, _, _ = bind(q, k_out, v_out, placed, None, scale, None)
        now, due = self._now(q, v, k_out.shape[2], state, decoded)
        inside = (Pass(view),)
        parts = [Plan(inside, view).run(q, k, v, scale=scale, engine=engine)]

        reused, passes, chosen = now.partial, [], now.chosen
        if bool(due.any()):
            left, chosen = self._left(q, k_out, v_out, view_out, scale, due, now)
            passes.append(Pass(view_out, left))
            new = Plan((passes[0],), view_out).run(q, k_out, v_out, scale=scale, engine=engine)
            reused = pick(due, new, now.partial)
        if chosen is not None:
            passes.append(Pass(view_out, chosen))
            parts.append(Plan((passes[-1],), view_out).run(q, k_out, v_out, scale=scale, engine=engine))
        out, lse = merge([*parts, reused])
        after = replace(
            now,
            partial=Partial(reused.out.detach(), reused.lse.detach()),
            computed=torch.where(due, now.step, now.computed),
            decoded=now.decoded.masked_fill(due.any(1), 0),
            chosen=chosen,
        )
        return BlockStep(out, lse, after, due, inside, tuple(passes))

    def _now(self, q, v, outside: int, state, decoded) -> tuple[OutsideState, Tensor]:
        """The state at the step about to be taken, and which heads are computed again, bool `[B, H_q]`."""
        shape = (*q.shape[:3], v.shape[3])
        if isinstance(decoded, int):
            decoded = torch.full(shape[:1], decoded, device=q.device)
        whole = isinstance(decoded, Tensor) and decoded.shape == shape[:1] and not decoded.is_floating_point()
        if not whole or bool((decoded < 0).any()):
            raise ValueError(f"decoded must be an integer >= 0 or such a tensor [{shape[0]}], got {decoded}")
        if state is None:
            empty = Partial(q.new_zeros(shape), q.new_full(shape[:3], -torch.inf, dtype=torch.float32))
            none = torch.zeros(shape[:2], dtype=torch.int64, device=q.device)
            first = OutsideState(empty, outside, 0, none, none.new_zeros(shape[:1]))
            return first, torch.ones(shape[:2], dtype=torch.bool, device=q.device)
        state.check(shape, q.dtype, outside, self.sparse is not None)
        now = replace(state, step=state.step + 1, decoded=state.decoded + decoded)
        return now, self.refresh.due(now).expand(shape[:2])

    def _left(self, q, k, v, view, scale, due, now) -> tuple[TileMap, TileMap | None]:
        """The tiles to keep for reuse where `due`, and the tiles that every step computes."""
        again = due.unsqueeze(2).unsqueeze(3)
        if self.sparse is None:
            every = TileMap.everything(q.shape[2], k.shape[2], q.device)
            return replace(every, keep=every.keep & again), None
        self.sparse.check_mode(q.shape[2], q.shape[2] + k.shape[2], False)
        with torch.no_grad():
            sparse = self.sparse.with_values(v.detach())
            chosen = _chosen(self.sparse, sparse.plan(q.detach(), k.detach(), view, scale), view)
        left = replace(chosen, keep=~chosen.keep & again)
        old = chosen.keep if now.chosen is None else now.chosen.keep
        if old.shape[2:] != chosen.keep.shape[2:]:
            raise ValueError("state was kept with a sparse method of other tiles")
        return left, replace(chosen, keep=torch.where(again, chosen.keep, old))


def _chosen(sparse: Method, plan: Plan, view: Visibility) -> TileMap:
    """The tiles that a plan computes; ValueError when it does anything else, of which there is no complement."""
    first = plan.passes[0]
    if first.tiles is not None and first.view is view and len(plan.passes) == 1 and not plan.added:
        bounds = first.tiles.q_tiling.bounds, first.tiles.k_tiling.bounds
        if all(x is None for x in (*bounds, first.q_order, first.k_order, first.reads, first.precision)):
            return first.tiles
    raise ValueError(
        "sparse must choose exact tiles of fixed size in the tokens' own order and nothing for the rest,"
        f" {sparse!r} does not"
    )


def _keys_read(p: Pass, batch: int, heads: int, kv_heads: int) -> int:
    """Keys that some query of the group reads, over batch and kv heads."""
    tiles = p.tiles
    if tiles is None:
        return batch * kv_heads * p.view.pos.shape[2]
    seen = to_heads(p.view.tiles(tiles.q_tiling, tiles.k_tiling) != NONE, heads)
    read = (seen & tiles.keep).any(2).expand(batch, heads, -1)
    read = read.reshape(batch, kv_heads, heads // kv_heads, -1).any(2)
    return int((read * tiles.k_tiling.sizes(p.view.pos.shape[2], read.device)).sum())
