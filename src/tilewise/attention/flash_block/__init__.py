"""FlashBlock: what a block gets from the keys outside it, kept between the steps of block diffusion."""

from tilewise.attention.flash_block.state import Decoded, Every, Heads, OutsideState, Refresh, stability
from tilewise.attention.flash_block.steps import BlockStep, FlashBlock

__all__ = ["BlockStep", "Decoded", "Every", "FlashBlock", "Heads", "OutsideState", "Refresh", "stability"]
