"""Attention: the score matrix, tile by tile. Methods compose order, score, select, always and rest."""

from tilewise.attention.api import Explanation, attend, attend_tiles, explain, plan
from tilewise.attention.dense import Dense
from tilewise.attention.method import Method, as_method, named
from tilewise.attention.moba import KeyConvolution, MoBA, router_recall, router_snr
from tilewise.attention.orders import SegmentSort
from tilewise.attention.pbs import PBSAttention
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.rests import Pooled
from tilewise.attention.scores import Antidiagonal, Centroid, MeanPool, TrueMass
from tilewise.attention.selects import First, Mass, Own, TopK
from tilewise.attention.sink_window import SinkWindow
from tilewise.attention.stages import AsGiven, Layout, Recipe, Skip, Tiles
from tilewise.attention.xattention import XAttention

__all__ = [
    "Antidiagonal",
    "AsGiven",
    "Centroid",
    "Dense",
    "Explanation",
    "First",
    "KeyConvolution",
    "Layout",
    "Mass",
    "MeanPool",
    "Method",
    "MoBA",
    "Own",
    "PBSAttention",
    "Pass",
    "Plan",
    "Pooled",
    "Recipe",
    "SegmentSort",
    "SinkWindow",
    "Skip",
    "Tiles",
    "TopK",
    "TrueMass",
    "XAttention",
    "as_method",
    "attend",
    "attend_tiles",
    "explain",
    "named",
    "plan",
    "router_recall",
    "router_snr",
]
