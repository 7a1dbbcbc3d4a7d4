"""Descriptor attention: images of a sequence attend to coarse copies of one another."""

from tilewise.attention.descriptors.compression import Compression, Described
from tilewise.attention.descriptors.frames import cluster_frames, rotate
from tilewise.attention.descriptors.layer import DescriptorAttention, DescriptorState
from tilewise.attention.descriptors.mask import ChunkMemory

__all__ = [
    "ChunkMemory",
    "Compression",
    "Described",
    "DescriptorAttention",
    "DescriptorState",
    "cluster_frames",
    "rotate",
]
