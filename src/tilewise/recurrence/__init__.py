"""Recurrence: the running state. Linear attention, delta rules, gated networks: one scan, in linear time."""

from tilewise.recurrence.api import empty_state, explain, scan
from tilewise.recurrence.attention_mixer import Attention, Cache, LatentAttention, SlidingWindow
from tilewise.recurrence.block_linear import BlockLinearAttention, BlocksSeen
from tilewise.recurrence.delta_net import DeltaNet, GatedDeltaNet
from tilewise.recurrence.distil import Pair, distil
from tilewise.recurrence.fast_weights import FastWeights, orthogonal, read_chunk
from tilewise.recurrence.flash_rnn import FlashRNN, FlashRNNState
from tilewise.recurrence.gated import GatedState, explain_gated, gated_rnn
from tilewise.recurrence.gla import GLA
from tilewise.recurrence.hybrids import infinite_vl, kimi_linear
from tilewise.recurrence.initial_state import InitialState, tune_initial_state
from tilewise.recurrence.inline import InLine, spread
from tilewise.recurrence.kda import KDA
from tilewise.recurrence.lact import LaCT, LaCTState
from tilewise.recurrence.lawcat import LAWCAT, LAWCATState, LinearizedAttention
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
from tilewise.recurrence.mamba import Mamba, MambaState
from tilewise.recurrence.linfusion import LinFusion, linfusion_loss
from tilewise.recurrence.lit import LiT, hybrid_loss
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState
from tilewise.recurrence.mlgru import MLGRU, MLGRUState, matmul_free
from tilewise.recurrence.mlstm import MLSTM, xlstm_7b
from tilewise.recurrence.mlstm_sig import MLSTMSig
from tilewise.recurrence.model import MIXERS, Block, ModelConfig, SequenceModel, SwiGLU, mixer
from tilewise.recurrence.per_channel import elementwise
from tilewise.recurrence.rat import RAT, RATState
from tilewise.recurrence.selective import SelectiveState, explain_selective, selective_scan
from tilewise.recurrence.short_conv import ShortConv
from tilewise.recurrence.state import Carried, State
from tilewise.recurrence.ternary import BitLinear, PackedBitLinear, packed
from tilewise.recurrence.transnormer import BlockState, DiagonalAttention, NormAttention, TransNormer
from tilewise.recurrence.vision import VisionMixer
from tilewise.recurrence.whole import Sums, whole_attention

__all__ = [
    "Attention",
    "BitLinear",
    "Block",
    "BlockLinearAttention",
    "BlockState",
    "BlocksSeen",
    "Cache",
    "Carried",
    "DeltaNet",
    "DiagonalAttention",
    "FastWeights",
    "FlashRNN",
    "FlashRNNState",
    "GLA",
    "GatedDeltaNet",
    "GatedState",
    "HeadNorm",
    "InLine",
    "InitialState",
    "KDA",
    "LAWCAT",
    "LAWCATState",
    "LRPE",
    "LINA",
    "LaCT",
    "LaCTState",
    "LatentAttention",
    "Lightning",
    "LightningState",
    "LinFusion",
    "LinearAttention",
    "LiT",
    "MIXERS",
    "MLGRU",
    "MLGRUState",
    "MLSTM",
    "MLSTMSig",
    "LinearizedAttention",
    "Mamba",
    "MambaState",
    "Mixer",
    "MixerState",
    "ModelConfig",
    "NormAttention",
    "PackedBitLinear",
    "Pair",
    "RAT",
    "RATState",
    "SGLU",
    "SelectiveState",
    "SequenceModel",
    "ShortConv",
    "SlidingWindow",
    "State",
    "Sums",
    "SwiGLU",
    "TNL",
    "TransNormer",
    "VisionMixer",
    "distil",
    "elementwise",
    "empty_state",
    "explain",
    "explain_selective",
    "explain_gated",
    "gated_rnn",
    "infinite_vl",
    "kimi_linear",
    "lightning_attention",
    "matmul_free",
    "hybrid_loss",
    "infinite_vl",
    "kimi_linear",
    "lightning_attention",
    "linfusion_loss",
    "mixer",
    "orthogonal",
    "packed",
    "read_chunk",
    "scan",
    "selective_scan",
    "slopes",
    "spread",
    "tune_initial_state",
    "whole_attention",
    "xlstm_7b",
]
