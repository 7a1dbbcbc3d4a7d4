"""What is searched: the published methods over their budgets, and compositions of stages that no paper has."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from tilewise.attention import (
    Antidiagonal,
    First,
    MeanPool,
    Method,
    Own,
    PageBounds,
    Pooled,
    SegmentSort,
    Share,
    Skip,
    Tiles,
    named,
)

SHARES = (0.03, 0.06, 0.12, 0.2, 0.35, 0.5)
THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 0.9)

# For every named method the settings that spend from little to much; those of one entry are set together.
BUDGETS: dict[str, tuple[dict[str, Any], ...]] = {
    "dense": ({},),
    "flexprefill": tuple({"gamma": value, "min_budget": 128} for value in (0.5, 0.7, 0.8, 0.9, 0.95)),
    "hisa": tuple({"top_k": value, "blocks": max(4, value // 16)} for value in (64, 128, 256, 512)),
    "moba": tuple({"top_k": value} for value in (2, 4, 8, 16, 24)),
    "pbs": tuple({"threshold": value} for value in THRESHOLDS),
    "pr-flash": tuple({"budget": value} for value in (2, 4, 8, 16, 32)),
    "proxy-attn": tuple({"threshold": value, "min_budget": 128} for value in THRESHOLDS),
    "quest": tuple({"top_k": value} for value in (16, 32, 64, 128, 192)),
    "s2o": tuple({"threshold": value} for value in (0.9, 0.7, 0.4, 0.2, 0.1)),
    "sage2": ({},),
    "sink-window": tuple({"window": value} for value in (256, 512, 1024, 2048, 4096)),
    "spark": tuple({"top_k": value} for value in (64, 128, 256, 512)),
    "vertical-slash": tuple(
        {"vertical": value // 4, "slash": value} for value in (256, 512, 1024, 2048, 4096)
    ),
    "xattention": tuple({"threshold": value} for value in THRESHOLDS),
}


def published() -> dict[str, list[Method]]:
    """Every named method, over its budget from little to much."""
    return {name: [kind(**given) for given in BUDGETS.get(name, ({},))] for name, kind in named().items()}


def composed() -> dict[str, list[Method]]:
    """Compositions of order, score, select, rest and tile size, each over its budget.

    All read the tile of the query itself and the first one besides what they choose.
    """
    scores: tuple[Any, ...] = (MeanPool(), Antidiagonal(8), PageBounds())
    overs: tuple[Any, ...] = ("row", "head")
    rests = (Skip(), Pooled(), Pooled(1.0))
    sizes = ((64, 64), (32, 32))
    orders: tuple[Any, ...] = (None, SegmentSort(256))
    made: dict[str, list[Method]] = {}
    for order, score, over, rest, tile in itertools.product(orders, scores, overs, rests, sizes):
        always = (Own(), First()) if order is None else (Own(order.segment), First())
        given: dict[str, Any] = {} if order is None else {"order": order}
        settings = [
            Tiles(score, Share(share, over=over), tile, always=always, rest=rest, **given) for share in SHARES
        ]
        made[_name(order, score, over, rest, tile)] = list(settings)
    return made


def _name(order: Any, *parts: Any) -> str:
    """Short and unlike any other: "SegmentSort MeanPool row Pooled(1) 64x64"."""
    words = [] if order is None else [type(order).__name__]
    for part in parts:
        if isinstance(part, str):
            words.append(part)
        elif isinstance(part, tuple):
            words.append("x".join(map(str, part)))
        elif not isinstance(part, Skip) or isinstance(part, Pooled):
            values = [getattr(part, field.name) for field in dataclasses.fields(part)]
            numbers = [f"{value:g}" for value in values if value is not False]
            words.append(type(part).__name__ + (f"({', '.join(numbers)})" if numbers else ""))
    return " ".join(words)
