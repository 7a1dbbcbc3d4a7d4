"""Sampling: some of the keys that were not chosen stand for all of them, weighed so that sums are unbiased."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.attention.plans import Pass
from tilewise.attention.reads import Sample
from tilewise.attention.stages import Chosen, Layout, Skip
from tilewise.tiles import TileMap, Tiling
from tilewise.tiles.visibility import take, to_heads

WORD = 0xFFFFFFFF  # hashes are 32 bits held in int64


@dataclass(frozen=True)
class Sampled(Skip):
    """Rest: keys drawn at random, each standing for as many keys as it was drawn from.

    Every key is drawn with the same probability p, without replacement, and weighs 1 / p in the softmax, as a bias
    of -log p on its scores. The sum of exponentials over the tiles that were not chosen, and the sum of values
    weighted by them, are then right on average over seeds (Horvitz and Thompson); their quotient is right as the
    sample grows. A row leaves out drawn keys that lie in tiles it reads already. With a budget of all keys nothing
    is left out, and all weights are 1. The queries of a kv head share a sample.

    Which keys are drawn depends on the seed, the head and the number of keys, not on what they hold. Differentiable
    in q, k and v.

    Args:
        budget: keys drawn, of every segment. seed: integer in 0..2^32 - 1, equal seeds draw equal keys.
        segment: draw from every so many keys, in their own order; None draws from all.
        weighted: whether drawn keys weigh 1 / p; without it they stand for themselves alone.

    Raises ValueError for settings outside these.
    """

    budget: int
    seed: int = 0
    segment: int | None = None
    weighted: bool = True

    def __post_init__(self) -> None:
        for name, value in (
            ("budget", self.budget),
            ("segment", 1 if self.segment is None else self.segment),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= WORD:
            raise ValueError(f"seed must be an integer in 0..2^32 - 1, got {self.seed!r}")
        if not isinstance(self.weighted, bool):
            raise ValueError(f"weighted must be True or False, got {self.weighted!r}")

    def passes(self, layout: Layout, chosen: Chosen) -> tuple[Pass, ...]:
        (b, kv_heads, n_k), heads = layout.k.shape[:3], layout.heads
        if not layout.q.shape[2] or not n_k:
            return ()
        view = layout.view if layout.given is None else layout.given
        seen = to_heads(view.keys_seen(), heads)[:, :: max(1, heads // kv_heads)]
        index, log_weight, drawn = self.draw(seen.expand(-1, kv_heads, -1))
        held = layout.k_tiling.ids(n_k, index.device)
        if layout.k_order is not None:
            held = take(held, layout.k_order.argsort(-1))
        columns = to_heads(take(held, index), heads).unsqueeze(2)  # the tile that each drawn key lies in
        left = to_heads(chosen.left, heads).expand(max(b, index.shape[0]), heads, -1, -1)
        keep = left.gather(3, columns.expand(*left.shape[:3], -1)) & to_heads(drawn, heads).unsqueeze(2)
        if view.dense is not None:  # a grid for each query head: what is drawn differs between kv heads
            view = replace(view, dense=view.dense.expand(-1, heads, -1, -1))
        tiles = TileMap(keep, layout.q_tiling, Tiling(1))
        reads = Sample(index, log_weight if self.weighted else None)
        return (Pass(view.permute(None, index), tiles, layout.q_order, reads=reads),)

    def draw(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is drawn of keys that count, `seen` bool `[b, h, N]`: index, -log p float32, and which are real.

        Each `[b, h, M]`. A segment with fewer keys than the budget has all of them, and fills up with entries that
        are not real.
        """
        n = seen.shape[2]
        size = n if self.segment is None else min(self.segment, n)
        count = min(self.budget, size)
        noise = self.noise(seen.shape[1], n, seen.device).masked_fill(~seen, -1)
        by_segment = pad(noise, (0, -n % size), value=-1).unflatten(2, (-1, size))  # [b, h, segments, size]
        best, place = by_segment.topk(count, -1)
        total = (by_segment >= 0).sum(-1, keepdim=True)
        log_weight = (total.clamp(min=count).float() / count).log().expand_as(best)
        first = torch.arange(by_segment.shape[2], device=seen.device).unsqueeze(1) * size
        return (place + first).clamp(max=n - 1).flatten(2), log_weight.flatten(2), (best >= 0).flatten(2)

    def noise(self, heads: int, n: int, device: torch.device) -> Tensor:
        """One integer for every key of every head, as good as random: int64 `[1, heads, n]` in 0..2^32 - 1."""
        x = torch.full((1, 1, 1), self.seed, dtype=torch.int64, device=device)
        x = mix(x) ^ torch.arange(heads, device=device).view(1, -1, 1)
        return mix(mix(x) ^ torch.arange(n, device=device).view(1, 1, -1))


def mix(x: Tensor) -> Tensor:
    """A hash of 32 bits: int64 in 0..2^32 - 1 to the same, one to one, each bit depending on all."""
    x = x & WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)
