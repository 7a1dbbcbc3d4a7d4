"""Quest: every query reads the pages whose keys could suit it best."""

from __future__ import annotations

from dataclasses import dataclass

from tilewise.attention.scores import PageBounds
from tilewise.attention.selects import Own, TopK
from tilewise.attention.stages import AsGiven, Recipe, Skip, Tiles


@dataclass(frozen=True)
class Quest(Recipe):
    """Pages of keys chosen by the largest product that any of their keys could have (Tang et al., 2024,
    arXiv 2406.10774).

    A page is known by the minimum and maximum of its keys in every channel. From these follows a bound on its
    largest product with a query; the query reads the `top_k` pages with the largest bounds, the page that it stands
    in always and as one of them. Every query chooses alone, so tiles are one query high.

    Differs from the paper: prompts are read the way tokens are decoded, where the authors' prefill is dense, as
    their first two layers are (`tilewise.patch` gives a method to some layers only); bounds are taken from the keys
    of a call, not kept beside a cache.

    Args:
        page: keys per page. top_k: pages per query, its own included; the paper reads 256 to 4,096 tokens.
    """

    page: int = 16
    top_k: int = 128
    name = "quest"
    reads = "q, minima and maxima of k"

    def __post_init__(self) -> None:
        if not isinstance(self.page, int) or self.page < 1:
            raise ValueError(f"page must be an integer >= 1, got {self.page!r}")
        self.tiles()

    def tiles(self) -> Tiles:
        return Tiles(
            score=PageBounds(),
            select=TopK(self.top_k),
            tile=(1, self.page),
            order=AsGiven(),
            always=(Own(),),
            rest=Skip(),
        )
