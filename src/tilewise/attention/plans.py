"""Plans: what a method decided for given inputs, as passes over the tile kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tilewise.attention.precisions import Applied, Precision
from tilewise.attention.reads import Reads
from tilewise.kernels import Choice
from tilewise.kernels.attend_tiles import Call, attend, explain
from tilewise.tiles import Partial, TileMap, Tiling, Visibility, merge
from tilewise.tiles.visibility import take, to_heads

COUNTED = (128, 128)  # the cut by which visible tiles are counted


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of the tile kernel, covering some of the keys.

    Args:
        view: what each query may see in this pass, in the tokens' own order.
        tiles: the tiles to compute, cut in permuted order; None computes all that is visible.
        q_order, k_order: permutations `[B|1, H_q|1, N_q]`, `[B|1, H_kv|1, N_k]`; None = as given.
        reads: what is read in place of the keys (see `tilewise.attention.reads`); `view` and `tiles` then speak of
            that, and there is no `k_order`. None reads the keys.
        precision: in what numbers it is computed; None is the inputs' own precision.
    """

    view: Visibility
    tiles: TileMap | None = None
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    reads: Reads | None = None
    precision: Precision | None = None

    def cost(self) -> Tensor:
        """Scores computed, `[B|1, H|1]` float64."""
        listed = None if self.reads is None else self.reads.cost(self.view)
        if listed is not None:
            return listed
        view = self.view.permute(self.q_order, self.k_order)
        return (whole(view) if self.tiles is None else self.tiles).cost(view)[0]

    def applied(self, call: Call) -> Applied:
        """What to run for `call`, this pass over the keys themselves, and how its result is restored."""
        restores = []
        for change in (self.reads, self.precision):
            if change is not None:
                call, restore = change.apply(call)
                restores.append(restore)

        def restored(partial: Partial) -> Partial:
            for restore in reversed(restores):
                partial = restore(partial)
            return partial

        return Applied(call, restored)


class Added(Protocol):
    """A part of a method's answer that no softmax joins to the others: it is added to the merged output."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`[B, H_q, N_q, D_v]`; 0 for queries that it has nothing for."""

    def cost(self) -> Tensor:
        """Its work in scores: pairs of a query and a key, `[B|1, H|1]` float64."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Passes whose partial results, merged, are the method's answer.

    Attributes:
        passes: over disjoint parts of what is visible; none where all of the answer is `added`.
        added: what is added to the merged output, outside the softmax.
        choices: the engines that chose keys for it, where a kernel did (see `tilewise.kernels.choose_keys`).
        view: all that the mask makes visible, the denominator of density.
        seconds: time spent choosing, when it was measured (see `tilewise.attention.plan`).
    """

    passes: tuple[Pass, ...]
    view: Visibility
    seconds: float | None = None
    added: tuple[Added, ...] = ()
    choices: tuple[Choice, ...] = ()

    @property
    def after(self) -> Any:
        """The state that the last run of an added part ended in, for the next call; None if none keeps one."""
        kept = (getattr(part, "after", None) for part in self.added)
        return next((state for state in kept if state is not None), None)

    @property
    def tile_maps(self) -> tuple[TileMap | None, ...]:
        """The tile map of each pass; None where a pass computes all it sees."""
        return tuple(p.tiles for p in self.passes)

    def density_by_head(self) -> Tensor:
        """Scores computed over scores in visible tiles, `[B|1, H|1]`; 0 where nothing is visible."""
        costs = [whole(self.view).cost(self.view)[1], *(p.cost() for p in self.passes)]
        costs += [part.cost() for part in self.added]
        heads = max(cost.shape[1] for cost in costs)
        visible, *computed = torch.broadcast_tensors(*(to_heads(cost, heads) for cost in costs))
        return torch.stack(computed).sum(0) / visible.clamp(min=1)

    @property
    def density(self) -> float:
        """Tiles computed over tiles visible, in tokens times tokens, averaged over batch and heads.

        Visible tiles are counted at 128 x 128, so a method with smaller tiles can be below the share of
        visible scores that dense attention computes.
        """
        return float(self.density_by_head().mean())

    def check(self, batch: int, heads: int, kv_heads: int, n_q: int, n_k: int) -> None:
        """Raise ValueError unless the plan fits a call of these sizes."""
        have = (self.view.q_pos.shape[2], self.view.k_pos.shape[2])
        if have != (n_q, n_k):
            raise ValueError(
                f"the plan was made for {have[0]} queries and {have[1]} keys, the call has {n_q} and {n_k}:"
                " plan again"
            )
        for p in self.passes:
            keep = None if p.tiles is None else p.tiles.keep
            for part, most in ((p.view.lo, heads), (p.q_order, heads), (keep, heads), (p.k_order, kv_heads)):
                if part is None:
                    continue
                if part.shape[0] not in (1, batch) or part.shape[1] not in (1, most, kv_heads):
                    raise ValueError(
                        f"the plan was made for batch {part.shape[0]} and {part.shape[1]} heads, the call has"
                        f" batch {batch} and {most} heads: plan again"
                    )

    def kept(self, q_tokens: Tensor, k_tokens: Tensor, heads: int) -> Tensor:
        """Whether these queries read these keys exactly: bool `[B|1, heads, len(q_tokens), len(k_tokens)]`.

        For drawings and tests. Means of tiles (pooled passes) do not count as read.
        """
        q_tokens, k_tokens = q_tokens.view(1, 1, -1), k_tokens.view(1, 1, -1)
        shape = (1, 1, q_tokens.shape[-1], k_tokens.shape[-1])
        read = torch.zeros(shape, dtype=torch.bool, device=q_tokens.device)
        for p in self.passes:
            read = read | _kept(p, q_tokens, k_tokens, heads)
        return read.expand(read.shape[0], heads, -1, -1)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        engine: str = "auto",
        need_lse: bool = True,
    ) -> Partial:
        """Execute the passes on the chosen engine and merge them."""
        need_lse = need_lse or len(self.passes) > 1
        applied = self.applied(q, k, v, bias, scale, softcap, need_lse)
        merged = merge([restore(attend(call, engine)) for call, restore in applied] or [_nothing(q, v)])
        for part in self.added:
            merged = merged._replace(out=merged.out + part.run(q, k, v, scale).to(merged.out.dtype))
        return merged

    def explain(self, q: Tensor, k: Tensor, v: Tensor, engine: str = "auto", **options) -> list[Choice]:
        """Which engine would run each pass, and each added part that has engines, and why the others would not."""
        need_lse = options.pop("need_lse", False) or len(self.passes) > 1
        applied = self.applied(
            q, k, v, options.get("bias"), options.get("scale", 1.0), options.get("softcap"), need_lse
        )
        said = [explain(call, engine) for call, _ in applied]
        return said + [part.explain(q, k, v) for part in self.added if hasattr(part, "explain")]

    def unrounded(self) -> Plan:
        """The same tiles in the inputs' own precision."""
        return replace(self, passes=tuple(replace(p, precision=None) for p in self.passes))

    def calls(self, q, k, v, bias, scale, softcap, need_lse) -> list[Call]:
        """The kernel's calls, one per pass."""
        return [call for call, _ in self.applied(q, k, v, bias, scale, softcap, need_lse)]

    def applied(self, q, k, v, bias, scale, softcap, need_lse) -> Iterator[Applied]:
        """The kernel's calls, one per pass and one at a time, and how each result is restored."""
        for p in self.passes:
            yield p.applied(
                Call(q, k, v, p.view, p.tiles, p.q_order, p.k_order, bias, scale, softcap, need_lse)
            )


def _nothing(q: Tensor, v: Tensor) -> Partial:
    """What no pass gives, to be added to."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    return Partial(out, torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device))


def whole(view: Visibility) -> TileMap:
    """Every tile of the usual 128 x 128 cut."""
    return TileMap.everything(view.q_pos.shape[2], view.k_pos.shape[2], view.q_pos.device, COUNTED)


def _kept(p: Pass, q_tokens: Tensor, k_tokens: Tensor, heads: int) -> Tensor:
    """`Plan.kept` for one pass, broadcastable to `[B, heads, len(q_tokens), len(k_tokens)]`."""
    if p.reads is None:
        seen = to_heads(p.view.permute(q_tokens, k_tokens).tokens(), heads)
        return seen if p.tiles is None else seen & _chosen(p, p.tiles, q_tokens, k_tokens, heads)
    entries = p.reads.read(q_tokens.flatten())  # [b|1, h|1, q|1, m]
    if entries is None:
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q_tokens.device)
    hits = to_heads(entries.unsqueeze(-1) == k_tokens.view(1, 1, 1, 1, -1), heads)  # [b|1, h|1, q|1, m, k]
    if p.reads.by_query:
        return hits.any(3) & to_heads(p.view.permute(q_tokens, k_tokens).tokens(), heads)
    every = torch.arange(entries.shape[3], device=q_tokens.device).view(1, 1, -1)
    seen = to_heads(p.view.permute(q_tokens, every).tokens(), heads)
    if p.tiles is not None:
        seen = seen & _chosen(p, p.tiles, q_tokens, every, heads)
    return (hits & seen.unsqueeze(-1)).any(3)


def _chosen(p: Pass, tiles: TileMap, q_tokens: Tensor, k_tokens: Tensor, heads: int) -> Tensor:
    """Whether the tile of each pair of tokens is kept: bool `[B|1, H, len(q_tokens), len(k_tokens)]`."""
    n_q, n_k = p.view.q_pos.shape[2], p.view.k_pos.shape[2]  # of a sample, n_k is its size
    keep = to_heads(tiles.keep, heads)
    b = max(x.shape[0] for x in (keep, p.q_order, p.k_order) if x is not None)
    keep = keep.expand(b, heads, -1, -1)

    def ids(tiling: Tiling, order: Tensor | None, tokens: Tensor, n: int) -> Tensor:
        places = tokens if order is None else to_heads(order, heads).argsort(-1)[..., tokens.flatten()]
        return take(to_heads(tiling.ids(n, tokens.device), heads), places).expand(b, heads, -1)

    rows, columns = (
        ids(tiles.q_tiling, p.q_order, q_tokens, n_q),
        ids(tiles.k_tiling, p.k_order, k_tokens, n_k),
    )
    rows = keep.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, keep.shape[3]))
    return rows.gather(3, columns.unsqueeze(2).expand(-1, -1, rows.shape[2], -1))
