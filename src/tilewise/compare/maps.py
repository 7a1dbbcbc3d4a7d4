"""Tile maps for the page's viewer: attention mass of the dense model, and what each method read of it."""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from tilewise.attention import Layout, TrueMass
from tilewise.models import Event
from tilewise.tiles import Tiling, as_mask

TILE = 128
POINT = 16  # what a method read is drawn at one point in so many tokens
LONGEST = 4096
HEADS = 8


def layers(count: int) -> list[int]:
    """The first, middle and last layer."""
    return sorted({0, count // 2, count - 1})


class Collector:
    """An observer that keeps the maps of some layers, as the page wants them."""

    def __init__(self, method: str, wanted: list[int]) -> None:
        self.method, self.wanted = method, wanted
        self.mass: list[dict[str, Any]] = []
        self.kept: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        if event.layer not in self.wanted or event.q.shape[2] < 2:
            return
        heads = min(event.q.shape[1], HEADS)
        n = event.q.shape[2]
        if self.method == "dense":
            for head, mass in enumerate(_mass(event)[0, :heads]):
                shade = (mass / mass.sum(-1, keepdim=True).clamp(min=1e-9)).sqrt()
                data = (shade * 255).round().to(torch.uint8).cpu().contiguous().numpy().tobytes()
                self.mass.append(_entry(event.layer, head, mass.shape, data=base64.b64encode(data).decode()))
        # As far as the tiles of the mass reach, so that the two pictures lie over each other at any length.
        first = torch.arange(0, -(-n // TILE) * TILE, POINT, device=event.q.device)
        rows, columns = ((first + last).clamp(max=n - 1) for last in (POINT - 1, 0))
        for head, kept in enumerate(event.plan.kept(rows, columns, event.q.shape[1])[0, :heads]):
            entry = _entry(event.layer, head, kept.shape, bits=_pack(kept))
            self.kept.append({"method": self.method, **entry})


def _mass(event: Event) -> Tensor:
    n_q, n_k = event.q.shape[2], event.k.shape[2]
    view = as_mask(event.mask).bind(n_q, n_k, device=event.q.device)
    scale = event.scale or event.q.shape[3] ** -0.5
    layout = Layout(event.q, event.k, view, Tiling(TILE), Tiling(TILE), scale)
    return TrueMass().score(layout, layout.kinds() > 0)


def _entry(layer: int, head: int, shape, **content: Any) -> dict[str, Any]:
    return {"layer": layer, "head": head, "rows": shape[0], "cols": shape[1], **content}


def _pack(bits: Tensor) -> str:
    import numpy

    return base64.b64encode(numpy.packbits(bits.cpu().numpy().flatten()).tobytes()).decode()
