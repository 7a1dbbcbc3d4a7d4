"""Attention: the score matrix, tile by tile. Methods compose order, score, select, always and rest."""

from tilewise.attention.api import Explanation, attend, attend_tiles, explain, plan
from tilewise.attention.attention_residuals import AttentionResiduals
from tilewise.attention.biases import LowRankBias, alibi_slopes
from tilewise.attention.block_rank import BlockRank, ranking_loss
from tilewise.attention.context_parallel.attend import Traffic, context_parallel_attend, rank_positions
from tilewise.attention.descriptors import Compression, DescriptorAttention
from tilewise.attention.flash_block import FlashBlock
from tilewise.attention.io.cost import io_cost, lower_bound
from tilewise.attention.io.simulator import simulate
from tilewise.attention.io.tiling import Shapes, best_height, tiling_cost
from tilewise.attention.kernelized.rpe import KernelizedRPE, kernelized_rpe
from tilewise.attention.latent.mla import MLA, LatentState
from tilewise.attention.latent.shards import TPLA
from tilewise.attention.latent.transforms import LatentTransform, reparameterize
from tilewise.attention.local_linear import LocalLinearAttention, local_linear_attention
from tilewise.attention.method import Method, as_method, named
from tilewise.attention.native_sparse import BlockMLP, NativeSparseAttention, attend_blocks, loop_costs
from tilewise.attention.neural_factors import NeuralFactors
from tilewise.attention.orders import Boxes, Clusters, SegmentSort
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.precisions import Precision, Quantised, accuracy
from tilewise.attention.probabilistic.block_distances import BlockDistances, PrFlashAttention
from tilewise.attention.probabilistic.harmonic import HarmonicPositions
from tilewise.attention.probabilistic.staircase import StaircaseCache
from tilewise.attention.reads import Lists, Means, Sample
from tilewise.attention.recipes.ada_spa import AdaSpa
from tilewise.attention.recipes.chunk_llm import ChunkLLM
from tilewise.attention.recipes.dense import Dense
from tilewise.attention.recipes.dhsa import DHSA
from tilewise.attention.recipes.flexprefill import FlexPrefill
from tilewise.attention.recipes.fps_attention import FPSAttention, FPSSteps, TileFP8
from tilewise.attention.recipes.hisa import HISA, Indexer
from tilewise.attention.recipes.hyper_attention import AngularHashes, HyperAttention
from tilewise.attention.recipes.llsa import LLSA
from tilewise.attention.recipes.moba import KeyConvolution, MoBA, router_recall, router_snr
from tilewise.attention.recipes.neighborhood import NeighborhoodAttention
from tilewise.attention.recipes.pbs import PBSAttention
from tilewise.attention.recipes.pisa import PISA, MomentPool
from tilewise.attention.recipes.proxy_attn import ProxyAttn, ProxyHeads
from tilewise.attention.recipes.psa import PSA, Pyramid
from tilewise.attention.recipes.quest import Quest
from tilewise.attention.recipes.s2o import S2O, skipped_bound
from tilewise.attention.recipes.sage import SageAttention2, adaptive, output_quality
from tilewise.attention.recipes.seer_attention import SeerAttention
from tilewise.attention.recipes.sink_window import SinkWindow
from tilewise.attention.recipes.sla import SLA, LinearRest
from tilewise.attention.recipes.spark import Spark, spark_attention
from tilewise.attention.recipes.spt import SPT
from tilewise.attention.recipes.squeezed import (
    SqueezedAttention,
    SqueezedContext,
    Thresholds,
    calibrate_thresholds,
)
from tilewise.attention.recipes.svg2 import SVG2, Alike, Either, OwnKeys, SVG2Steps
from tilewise.attention.recipes.svg_ear import SVGEAR, MeansError
from tilewise.attention.recipes.vertical_slash import VerticalSlash
from tilewise.attention.recipes.vmoba import EachQuery, OwnTile, Similarity, VMoBA
from tilewise.attention.recipes.xattention import XAttention
from tilewise.attention.rests import Pooled
from tilewise.attention.sampling import Sampled
from tilewise.attention.scores import Antidiagonal, Centroid, MeanPool, PageBounds, RandomTiles, TrueMass
from tilewise.attention.selects import Edges, First, Mass, Own, Share, TopK
from tilewise.attention.stages import Arrangement, AsGiven, Chosen, Layout, Recipe, Skip, Tiles
from tilewise.attention.statistical import StatisticalTopK
from tilewise.attention.tensor import TensorAttention, tensor_attention
from tilewise.attention.unified_max import FlatProducts, UnifiedMax, decode, measure_flat
from tilewise.attention.written import as_data, from_data

__all__ = [
    "AdaSpa",
    "Alike",
    "AngularHashes",
    "Antidiagonal",
    "Arrangement",
    "AsGiven",
    "AttentionResiduals",
    "BlockDistances",
    "BlockMLP",
    "BlockRank",
    "Boxes",
    "Centroid",
    "Chosen",
    "ChunkLLM",
    "Clusters",
    "Compression",
    "DHSA",
    "Dense",
    "DescriptorAttention",
    "EachQuery",
    "Edges",
    "Either",
    "Explanation",
    "FPSAttention",
    "FPSSteps",
    "First",
    "FlashBlock",
    "FlatProducts",
    "FlexPrefill",
    "HISA",
    "HarmonicPositions",
    "HyperAttention",
    "Indexer",
    "KernelizedRPE",
    "KeyConvolution",
    "LLSA",
    "LatentState",
    "LatentTransform",
    "Layout",
    "LinearRest",
    "Lists",
    "LocalLinearAttention",
    "LowRankBias",
    "MLA",
    "Mass",
    "MeanPool",
    "Means",
    "MeansError",
    "Method",
    "MoBA",
    "MomentPool",
    "NativeSparseAttention",
    "NeighborhoodAttention",
    "NeuralFactors",
    "Own",
    "OwnKeys",
    "OwnTile",
    "PBSAttention",
    "PISA",
    "PSA",
    "PageBounds",
    "Pass",
    "Plan",
    "Pooled",
    "PrFlashAttention",
    "Precision",
    "ProxyAttn",
    "ProxyHeads",
    "Pyramid",
    "Quantised",
    "Quest",
    "RandomTiles",
    "Recipe",
    "S2O",
    "SLA",
    "SPT",
    "SVG2",
    "SVG2Steps",
    "SVGEAR",
    "SageAttention2",
    "Sample",
    "Sampled",
    "SeerAttention",
    "SegmentSort",
    "Shapes",
    "Share",
    "Similarity",
    "SinkWindow",
    "Skip",
    "Spark",
    "SqueezedAttention",
    "SqueezedContext",
    "StaircaseCache",
    "StatisticalTopK",
    "TPLA",
    "TensorAttention",
    "Thresholds",
    "TileFP8",
    "Tiles",
    "TopK",
    "Traffic",
    "TrueMass",
    "UnifiedMax",
    "VMoBA",
    "VerticalSlash",
    "XAttention",
    "accuracy",
    "adaptive",
    "alibi_slopes",
    "as_data",
    "as_method",
    "attend",
    "attend_blocks",
    "attend_tiles",
    "best_height",
    "calibrate_thresholds",
    "context_parallel_attend",
    "decode",
    "explain",
    "from_data",
    "io_cost",
    "kernelized_rpe",
    "local_linear_attention",
    "loop_costs",
    "lower_bound",
    "measure_flat",
    "named",
    "output_quality",
    "plan",
    "rank_positions",
    "ranking_loss",
    "reparameterize",
    "router_recall",
    "router_snr",
    "simulate",
    "skipped_bound",
    "spark_attention",
    "tensor_attention",
    "tiling_cost",
]
