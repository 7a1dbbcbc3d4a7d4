"""The words every other room uses: tilings, masks, tile maps, partial results and their merge."""

from tilewise.tiles.grid import Neighborhood
from tilewise.tiles.masks import (
    BlockCausal,
    Causal,
    Documents,
    Everything,
    Mask,
    Padding,
    Prefix,
    TokenMask,
    Window,
    as_mask,
    sliding_window,
)
from tilewise.tiles.partial import Partial, merge
from tilewise.tiles.tilemap import TileMap
from tilewise.tiles.tiling import Tiling
from tilewise.tiles.visibility import FULL, NONE, PARTIAL, Visibility

__all__ = [
    "FULL",
    "NONE",
    "PARTIAL",
    "BlockCausal",
    "Causal",
    "Documents",
    "Everything",
    "Mask",
    "Neighborhood",
    "Padding",
    "Partial",
    "Prefix",
    "TileMap",
    "Tiling",
    "TokenMask",
    "Visibility",
    "Window",
    "as_mask",
    "merge",
    "sliding_window",
]
