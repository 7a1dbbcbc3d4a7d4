"""Recurrence: the running state. Linear attention, delta rules, gated networks: one scan, in linear time."""

from tilewise.recurrence.api import empty_state, explain, scan
from tilewise.recurrence.attention_mixer import Attention, Cache, LatentAttention, SlidingWindow
from tilewise.recurrence.delta_net import DeltaNet, GatedDeltaNet
from tilewise.recurrence.fast_weights import FastWeights, orthogonal, read_chunk
from tilewise.recurrence.gla import GLA
from tilewise.recurrence.hybrids import infinite_vl, kimi_linear
from tilewise.recurrence.hyper_kernels import ContextKernel, HyperKernel
from tilewise.recurrence.initial_state import InitialState, tune_initial_state
from tilewise.recurrence.kda import KDA
from tilewise.recurrence.lact import LaCT, LaCTState
from tilewise.recurrence.lightning import (
    LRPE,
    SGLU,
    TNL,
    Lightning,
    LightningState,
    lightning_attention,
    slopes,
)
from tilewise.recurrence.linear_attention import LinearAttention
from tilewise.recurrence.lion import LION, LinearGroupRNN, LIONBlock, SpatialDescriptor, foreground, generate
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState
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
from tilewise.recurrence.short_conv import ShortConv
from tilewise.recurrence.state import Carried, State
from tilewise.recurrence.terminator import HyperZZW, LocalHyperZZW, SFNEBlock, Terminator
from tilewise.recurrence.transnormer import BlockState, DiagonalAttention, NormAttention, TransNormer
from tilewise.recurrence.voxel_conv import SubmanifoldConv3d
from tilewise.recurrence.voxel_windows import Lineup, groups, windows
from tilewise.recurrence.voxels import Voxels, extend, merge, voxelize

__all__ = [
    "Attention",
    "Block",
    "BlockState",
    "Cache",
    "Carried",
    "ContextKernel",
    "CrossWindow",
    "DeltaNet",
    "DiagonalAttention",
    "FastWeights",
    "GLA",
    "GatedDeltaNet",
    "HeadNorm",
    "HyperKernel",
    "HyperZZW",
    "InitialState",
    "KDA",
    "LION",
    "LIONBlock",
    "LRPE",
    "LaCT",
    "LaCTState",
    "LatentAttention",
    "Lightning",
    "LightningState",
    "LinearAttention",
    "LinearGroupRNN",
    "Lineup",
    "LocalHyperZZW",
    "MIXERS",
    "MLSTM",
    "MLSTMSig",
    "Mixer",
    "MixerState",
    "ModelConfig",
    "NormAttention",
    "RAT",
    "RATState",
    "SFNEBlock",
    "SGLU",
    "ScatterFormer",
    "ScatteredLinearAttention",
    "SequenceModel",
    "ShortConv",
    "SlidingWindow",
    "SpatialDescriptor",
    "State",
    "SubmanifoldConv3d",
    "SwiGLU",
    "TNL",
    "Terminator",
    "TransNormer",
    "Voxels",
    "elementwise",
    "empty_state",
    "explain",
    "extend",
    "foreground",
    "generate",
    "groups",
    "infinite_vl",
    "kimi_linear",
    "lightning_attention",
    "merge",
    "mixer",
    "orthogonal",
    "read_chunk",
    "scan",
    "scattered_attention",
    "slopes",
    "tune_initial_state",
    "voxelize",
    "windows",
    "xlstm_7b",
]
