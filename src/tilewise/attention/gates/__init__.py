"""Gates: small parts trained beside a frozen model, which say what its attention is to read."""

from tilewise.attention.gates.block_gate import BlockGate, BlockLoss, TrueMax, block_lesson
from tilewise.attention.gates.boundary import BoundaryLoss, BoundaryPredictor, boundary_lesson
from tilewise.attention.gates.chunks import ChunkAdapters, chunk_lesson, chunk_loss
from tilewise.attention.gates.fit import Fit, Gates, fit

__all__ = [
    "BlockGate",
    "BlockLoss",
    "BoundaryLoss",
    "BoundaryPredictor",
    "ChunkAdapters",
    "Fit",
    "Gates",
    "TrueMax",
    "block_lesson",
    "boundary_lesson",
    "chunk_lesson",
    "chunk_loss",
    "fit",
]
