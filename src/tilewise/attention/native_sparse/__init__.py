"""Native sparse attention: compressed, selected and sliding branches, trained together, and its kernel's loops."""

from tilewise.attention.native_sparse.compression import BlockMLP
from tilewise.attention.native_sparse.layer import NativeSparseAttention
from tilewise.attention.native_sparse.loops import LoopCosts, attend_blocks, loop_costs

__all__ = ["BlockMLP", "LoopCosts", "NativeSparseAttention", "attend_blocks", "loop_costs"]
