"""Attention: the score matrix, tile by tile. Methods compose order, score, select, always and rest."""

from tilewise.attention.api import Explanation, attend, attend_tiles, explain, plan
from tilewise.attention.biases import LowRankBias, alibi_slopes
from tilewise.attention.context_parallel import Traffic, context_parallel_attend, rank_positions
from tilewise.attention.dense import Dense
from tilewise.attention.io_cost import io_cost, lower_bound
from tilewise.attention.io_simulator import simulate
from tilewise.attention.io_tiling import Shapes, best_height, tiling_cost
from tilewise.attention.kernelized import KernelizedRPE, kernelized_rpe
from tilewise.attention.latent import MLA, LatentState
from tilewise.attention.latent_shards import TPLA
from tilewise.attention.latent_transforms import LatentTransform, reparameterize
from tilewise.attention.method import Method, as_method, named
from tilewise.attention.moba import KeyConvolution, MoBA, router_recall, router_snr
from tilewise.attention.neighborhood import NeighborhoodAttention
from tilewise.attention.neural_factors import NeuralFactors
from tilewise.attention.orders import SegmentSort
from tilewise.attention.pbs import PBSAttention
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.precisions import Precision, Quantised, accuracy
from tilewise.attention.rests import Pooled
from tilewise.attention.sage import SageAttention2, adaptive, output_quality
from tilewise.attention.scores import Antidiagonal, Centroid, MeanPool, TrueMass
from tilewise.attention.selects import First, Mass, Own, TopK
from tilewise.attention.sink_window import SinkWindow
from tilewise.attention.stages import AsGiven, Layout, Recipe, Skip, Tiles
from tilewise.attention.unified_max import FlatProducts, UnifiedMax, decode, measure_flat
from tilewise.attention.xattention import XAttention

__all__ = [
    "Antidiagonal",
    "AsGiven",
    "Centroid",
    "Dense",
    "Explanation",
    "First",
    "FlatProducts",
    "KernelizedRPE",
    "KeyConvolution",
    "LatentState",
    "LatentTransform",
    "Layout",
    "LowRankBias",
    "MLA",
    "Mass",
    "MeanPool",
    "Method",
    "MoBA",
    "NeighborhoodAttention",
    "NeuralFactors",
    "Own",
    "PBSAttention",
    "Pass",
    "Plan",
    "Pooled",
    "Precision",
    "Quantised",
    "Recipe",
    "SageAttention2",
    "SegmentSort",
    "Shapes",
    "SinkWindow",
    "Skip",
    "TPLA",
    "Tiles",
    "TopK",
    "Traffic",
    "TrueMass",
    "UnifiedMax",
    "XAttention",
    "accuracy",
    "adaptive",
    "alibi_slopes",
    "as_method",
    "attend",
    "attend_tiles",
    "best_height",
    "context_parallel_attend",
    "decode",
    "explain",
    "io_cost",
    "kernelized_rpe",
    "lower_bound",
    "measure_flat",
    "named",
    "output_quality",
    "plan",
    "rank_positions",
    "reparameterize",
    "router_recall",
    "router_snr",
    "simulate",
    "tiling_cost",
]
