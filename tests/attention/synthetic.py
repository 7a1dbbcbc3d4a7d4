"""Queries and keys with known structure, and how much of their attention a plan reads."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.attention import Layout, TrueMass
from tilewise.tiles import NONE, Causal, Tiling


def stripes(n: int, d: int = 32, heads: int = 2, every: int = 48, strength: float = 6.0, seed: int = 0):
    """Attention on scattered single keys ("vertical lines") over noise: q, k `[1, heads, n, d]`.

    Each query looks for the direction of a topic; a few keys per topic, at random places, carry it.
    """
    g = torch.Generator().manual_seed(seed)
    topics = 4
    direction = torch.nn.functional.normalize(torch.randn(heads, topics, d, generator=g), dim=-1)
    topic = torch.randint(topics, (heads, n // 64 + 1), generator=g).repeat_interleave(64, 1)[:, :n]
    q = torch.randn(1, heads, n, d, generator=g) * 0.7
    k = torch.randn(1, heads, n, d, generator=g) * 0.7
    rows = torch.arange(heads).unsqueeze(1)
    q[0] += strength * direction[rows, topic]
    for head in range(heads):
        carriers = torch.randperm(n, generator=g)[: n // every]
        k[0, head, carriers] += (
            strength * direction[head, torch.randint(topics, (len(carriers),), generator=g)]
        )
    return q, k


def needles(n: int, d: int, count: int, gap: float, seed: int, width: int = 1):
    """Unit-variance-1/d keys of which `count` queries each seek one: q `[1, 1, count, d]`, k, and the places."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(n, d, generator=g) / d**0.5
    q = torch.nn.functional.normalize(torch.randn(count, d, generator=g), dim=-1)
    places = torch.randint(n // width, (count,), generator=g) * width
    return q, k, places, gap


def true_mass(q: Tensor, k: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """True causal attention mass of every tile `[1, H, T_q, T_k]`, and which tiles are visible."""
    view = Causal().bind(q.shape[2], k.shape[2])
    layout = Layout(q, k, view, Tiling(tile[0]), Tiling(tile[1]), q.shape[3] ** -0.5)
    visible = layout.kinds() != NONE
    return TrueMass().score(layout, visible), visible
