"""Recurrence: the running state. Linear attention, delta rules, gated networks: one scan, in linear time."""

from tilewise.recurrence.api import empty_state, explain, scan
from tilewise.recurrence.attention_mixer import Attention, Cache, LatentAttention, SlidingWindow
from tilewise.recurrence.block_transformer import BlockEmbedder, BlockTransformer, BlockTransformerState
from tilewise.recurrence.delta_net import DeltaNet, GatedDeltaNet
from tilewise.recurrence.fast_weights import FastWeights, Lessons, orthogonal, read_chunk
from tilewise.recurrence.gla import GLA
from tilewise.recurrence.hybrids import infinite_vl, kimi_linear
from tilewise.recurrence.initial_state import InitialState, tune_initial_state
from tilewise.recurrence.kda import KDA
from tilewise.recurrence.lact import LaCT, LaCTState
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
from tilewise.recurrence.linear_attention import LinearAttention
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState
from tilewise.recurrence.mlstm import MLSTM, xlstm_7b
from tilewise.recurrence.mlstm_sig import MLSTMSig
from tilewise.recurrence.model import MIXERS, Block, ModelConfig, SequenceModel, SwiGLU, mixer
from tilewise.recurrence.per_channel import elementwise
from tilewise.recurrence.rat import RAT, RATState
from tilewise.recurrence.short_conv import ShortConv
from tilewise.recurrence.state import Carried, State
from tilewise.recurrence.tnt import TNT, TNTState
from tilewise.recurrence.transnormer import BlockState, DiagonalAttention, NormAttention, TransNormer

__all__ = [
    "Attention",
    "Block",
    "BlockEmbedder",
    "BlockState",
    "BlockTransformer",
    "BlockTransformerState",
    "Cache",
    "Carried",
    "DeltaNet",
    "DiagonalAttention",
    "FastWeights",
    "GLA",
    "GatedDeltaNet",
    "HeadNorm",
    "InitialState",
    "KDA",
    "LRPE",
    "LaCT",
    "LaCTState",
    "LatentAttention",
    "Learner",
    "Lessons",
    "Lightning",
    "LightningState",
    "LinearAttention",
    "MIXERS",
    "MLSTM",
    "MLSTMSig",
    "Mixer",
    "MixerState",
    "ModelConfig",
    "NormAttention",
    "RAT",
    "RATState",
    "SGLU",
    "SequenceModel",
    "ShortConv",
    "SlidingWindow",
    "State",
    "SwiGLU",
    "TNL",
    "TNT",
    "TNTState",
    "TransNormer",
    "elementwise",
    "empty_state",
    "explain",
    "infinite_vl",
    "kimi_linear",
    "lightning_attention",
    "mixer",
    "orthogonal",
    "read_chunk",
    "scan",
    "slopes",
    "tune_initial_state",
    "xlstm_7b",
]
