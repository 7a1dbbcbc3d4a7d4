"""Attention of requests that share beginnings: a shared part is read once for all of them, and parts are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.paged.attend import (
    Keys,
    LogitsHook,
    MaskFunction,
    Variant,
    attend_keys,
    check_counts,
    check_queries,
    places,
)
from tilewise.attention.paged.pages import Pages
from tilewise.tiles import Mask, Partial, merge


@dataclass(frozen=True, eq=False)
class Shared:
    """Keys and values that several requests begin with, one level of a cascade.

    Args:
        keys: `Pages`, or `(k [G, H_kv, N, D], v [G, H_kv, N, D_v])`, of G groups.
        group: int64 `[B]`, the sequence of `keys` that each request reads, -1 for none; None = the first, for all.
    """

    keys: Pages | tuple[Tensor, Tensor]
    group: Tensor | None = None


def cascade(
    q: Tensor,
    shared: Pages | tuple[Tensor, Tensor] | Shared | Sequence[Shared],
    own: Pages,
    *,
    q_lengths: Tensor | None = None,
    mask: Mask | MaskFunction | str | None = "causal",
    scale: float | None = None,
    softcap: float | None = None,
    logits_hook: LogitsHook | None = None,
    engine: str = "auto",
    return_lse: bool = False,
) -> Tensor | Partial:
    """Attention over shared beginnings followed by each request's own pages (FlashInfer's composable formats).

    A request's sequence is its part of each level in turn, then its own pages; the last n_q tokens of it ask. On
    each level the queries of all requests of a group lie side by side and read the group's keys as one dense batch;
    the own pages are read apart; `merge` joins what the levels give, exactly up to rounding of the parts to q's
    dtype (the paper keeps them in float32). Groups are padded to the largest of their level.

    Args:
        q: `[B, H_q, n_q, D]`. shared: one level, or several from the outermost on. own: pages of B sequences.
        Others as in `attend_paged`; positions count from the beginning of the outermost level.

    Returns and raises as `attend_paged`; also ValueError for groups that do not exist, or whose requests differ in
    how many tokens come before the level.
    """
    check_queries(q, own)
    counts = check_counts(q_lengths, q, len(own.lengths))
    if isinstance(mask, Tensor):
        raise TypeError("mask must be a mask object, a name or a function: levels have no common columns")
    variant = Variant(mask, scale, softcap, logits_hook, engine)
    levels = _levels(shared)
    keys = [Keys.of(level.keys) for level in levels]
    groups = [_group(level, k, q, own, number) for number, (level, k) in enumerate(zip(levels, keys))]
    lengths = [torch.where(g < 0, 0, k.lengths[g.clamp(min=0)]) for g, k in zip(groups, keys)]
    starts = [sum(lengths[:i], torch.zeros_like(own.lengths)) for i in range(len(levels) + 1)]
    q_pos, real = places(starts[-1] + own.lengths, counts, q.shape[2])
    parts = [
        _level(q, k, g, start, q_pos, real, variant, number)
        for number, (k, g, start) in enumerate(zip(keys, groups, starts))
    ]
    parts.append(attend_keys(q, Keys.of(own), q_pos, real, starts[-1], variant))
    partial = merge(parts)
    return partial if return_lse else partial.out


def _level(
    q: Tensor,
    keys: Keys,
    group: Tensor,
    start: Tensor,
    q_pos: Tensor,
    real: Tensor,
    variant: Variant,
    number: int,
) -> Partial:
    """What one level gives every request; nothing to those without a group."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:3], keys.v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    here, member = group[group >= 0].unique(return_inverse=True)
    if not len(here):
        return Partial(out, lse)
    sizes = torch.bincount(member)
    request = (group >= 0).nonzero()[:, 0][member.argsort(stable=True)]  # requests, group by group
    slot = torch.arange(int(sizes.max()), device=q.device)
    filled = slot < sizes.unsqueeze(1)  # [groups, most members]
    index = torch.zeros_like(filled, dtype=torch.int64).masked_scatter(filled, request)
    first = start[index[:, 0]]
    if bool((start[index] != first.unsqueeze(1))[filled].any()):
        raise ValueError(f"requests of one group of level {number} must have as many tokens before it")
    rows = q.shape[2]
    side_by_side = q[index].transpose(1, 2).flatten(2, 3)  # [groups, heads, members * rows, d]
    mine = (real[index] & filled[:, :, None, None]).transpose(1, 2).flatten(2, 3)
    at = q_pos[index].transpose(1, 2).flatten(2, 3)
    partial = attend_keys(side_by_side, keys.rows(here), at, mine, first, variant)
    out[request] = partial.out.unflatten(2, (-1, rows)).transpose(1, 2)[filled]
    lse[request] = partial.lse.unflatten(2, (-1, rows)).transpose(1, 2)[filled]
    return Partial(out, lse)


def _levels(shared) -> list[Shared]:
    if isinstance(shared, Shared):
        return [shared]
    if isinstance(shared, Pages) or (
        isinstance(shared, tuple) and any(isinstance(x, Tensor) for x in shared)
    ):
        return [Shared(shared)]
    levels = list(shared) if isinstance(shared, Sequence) else [shared]
    if not levels or not all(isinstance(level, Shared) for level in levels):
        raise TypeError("shared must be Pages, (k, v), Shared or a sequence of Shared with at least one")
    return levels


def _group(level: Shared, keys: Keys, q: Tensor, own: Pages, number: int) -> Tensor:
    """The level's group of each request, once the level's keys and groups are known to fit."""
    for name, x, pool in (("k", keys.k, own.k), ("v", keys.v, own.v)):
        same = x.dtype == pool.dtype and x.device == pool.device
        if not same or (x.shape[1], x.shape[3]) != (pool.shape[1], pool.shape[3]):
            raise ValueError(
                f"{name} of level {number} must have {pool.shape[1]} heads of {pool.shape[3]} in {pool.dtype} like"
                f" the own pages, got {x.dtype} {list(x.shape)}"
            )
    group = torch.zeros_like(own.lengths) if level.group is None else level.group
    if not isinstance(group, Tensor) or group.dtype != torch.int64 or group.shape != own.lengths.shape:
        raise TypeError(f"group of level {number} must be int64 [{len(own.lengths)}] or None")
    if group.device != q.device:
        raise TypeError(f"group of level {number} must be on {q.device}, is on {group.device}")
    if bool(((group < -1) | (group >= len(keys.lengths))).any()):
        raise ValueError(
            f"group of level {number} must be in -1..{len(keys.lengths) - 1}, got {group.unique().tolist()}"
        )
    return group
