"""Recurrence: the running state. Linear attention, delta rules, gated networks: one scan, in linear time."""

from tilewise.recurrence.api import empty_state, explain, scan
from tilewise.recurrence.attention_mixer import Attention, Cache, LatentAttention, SlidingWindow
from tilewise.recurrence.block_linear import BlockLinearAttention, BlocksSeen
from tilewise.recurrence.block_transformer import BlockEmbedder, BlockTransformer, BlockTransformerState
from tilewise.recurrence.codebook import Codebook
from tilewise.recurrence.delta_net import DeltaNet, GatedDeltaNet
from tilewise.recurrence.distil import Pair, distil
from tilewise.recurrence.fast_weights import FastWeights, Lessons, orthogonal, read_chunk
from tilewise.recurrence.flash_rnn import FlashRNN, FlashRNNState
from tilewise.recurrence.gated import GatedState, explain_gated, gated_rnn
from tilewise.recurrence.gla import GLA
from tilewise.recurrence.hybrids import infinite_vl, kimi_linear
from tilewise.recurrence.hyper_kernels import ContextKernel, HyperKernel
from tilewise.recurrence.initial_state import InitialState, tune_initial_state
from tilewise.recurrence.inline import InLine, spread
from tilewise.recurrence.kda import KDA
from tilewise.recurrence.lact import LaCT, LaCTState
from tilewise.recurrence.lawcat import LAWCAT, LAWCATState, LinearizedAttention
from tilewise.recurrence.learner import Learner
from tilewise.recurrence.lightning import (
    LRPE,
    SGLU,
    TNL,
    Lightning,
    LightningState,
    lightning_attention,
    slopes,
)
from tilewise.recurrence.lina import LINA
from tilewise.recurrence.linear_attention import LinearAttention
from tilewise.recurrence.linfusion import LinFusion, linfusion_loss
from tilewise.recurrence.lion import LION, LinearGroupRNN, LIONBlock, SpatialDescriptor, foreground, generate
from tilewise.recurrence.lit import LiT, hybrid_loss
from tilewise.recurrence.long_vq import LongVQ, LongVQState, MovingAverage
from tilewise.recurrence.mamba import Mamba, MambaState
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState
from tilewise.recurrence.mlgru import MLGRU, MLGRUState, matmul_free
from tilewise.recurrence.mlstm import MLSTM, xlstm_7b
from tilewise.recurrence.mlstm_sig import MLSTMSig
from tilewise.recurrence.model import MIXERS, Block, ModelConfig, SequenceModel, SwiGLU, mixer
from tilewise.recurrence.per_channel import elementwise
from tilewise.recurrence.rat import RAT, RATState
from tilewise.recurrence.scatterformer import (
    CrossWindow,
    ScatteredLinearAttention,
    ScatterFormer,
    scattered_attention,
)
from tilewise.recurrence.selective import SelectiveState, explain_selective, selective_scan
from tilewise.recurrence.short_conv import ShortConv
from tilewise.recurrence.state import Carried, State
from tilewise.recurrence.terminator import HyperZZW, LocalHyperZZW, SFNEBlock, Terminator
from tilewise.recurrence.ternary import BitLinear, PackedBitLinear, packed
from tilewise.recurrence.tnt import TNT, TNTState
from tilewise.recurrence.transnormer import BlockState, DiagonalAttention, NormAttention, TransNormer
from tilewise.recurrence.vision import VisionMixer
from tilewise.recurrence.voxel_conv import SubmanifoldConv3d
from tilewise.recurrence.voxel_windows import Lineup, groups, windows
from tilewise.recurrence.voxels import Voxels, extend, merge, voxelize
from tilewise.recurrence.whole import Sums, whole_attention

__all__ = [
    "Attention",
    "BitLinear",
    "Block",
    "BlockEmbedder",
    "BlockLinearAttention",
    "BlockState",
    "BlockTransformer",
    "BlockTransformerState",
    "BlocksSeen",
    "Cache",
    "Carried",
    "Codebook",
    "ContextKernel",
    "CrossWindow",
    "DeltaNet",
    "DiagonalAttention",
    "FastWeights",
    "FlashRNN",
    "FlashRNNState",
    "GLA",
    "GatedDeltaNet",
    "GatedState",
    "HeadNorm",
    "HyperKernel",
    "HyperZZW",
    "InLine",
    "InitialState",
    "KDA",
    "LAWCAT",
    "LAWCATState",
    "LINA",
    "LION",
    "LIONBlock",
    "LRPE",
    "LaCT",
    "LaCTState",
    "LatentAttention",
    "Learner",
    "Lessons",
    "LiT",
    "Lightning",
    "LightningState",
    "LinFusion",
    "LinearAttention",
    "LinearGroupRNN",
    "LinearizedAttention",
    "Lineup",
    "LocalHyperZZW",
    "LongVQ",
    "LongVQState",
    "MIXERS",
    "MLGRU",
    "MLGRUState",
    "MLSTM",
    "MLSTMSig",
    "Mamba",
    "MambaState",
    "Mixer",
    "MixerState",
    "ModelConfig",
    "MovingAverage",
    "NormAttention",
    "PackedBitLinear",
    "Pair",
    "RAT",
    "RATState",
    "SFNEBlock",
    "SGLU",
    "ScatterFormer",
    "ScatteredLinearAttention",
    "SelectiveState",
    "SequenceModel",
    "ShortConv",
    "SlidingWindow",
    "SpatialDescriptor",
    "State",
    "SubmanifoldConv3d",
    "Sums",
    "SwiGLU",
    "TNL",
    "TNT",
    "TNTState",
    "Terminator",
    "TransNormer",
    "VisionMixer",
    "Voxels",
    "distil",
    "elementwise",
    "empty_state",
    "explain",
    "explain_gated",
    "explain_selective",
    "extend",
    "foreground",
    "gated_rnn",
    "generate",
    "groups",
    "hybrid_loss",
    "infinite_vl",
    "kimi_linear",
    "lightning_attention",
    "linfusion_loss",
    "matmul_free",
    "merge",
    "mixer",
    "orthogonal",
    "packed",
    "read_chunk",
    "scan",
    "scattered_attention",
    "selective_scan",
    "slopes",
    "spread",
    "tune_initial_state",
    "voxelize",
    "whole_attention",
    "windows",
    "xlstm_7b",
]
