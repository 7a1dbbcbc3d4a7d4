"""Recurrence: the running state. Linear attention, delta rules, gated networks: one scan, in linear time."""

from tilewise.recurrence.api import empty_state, explain, scan
from tilewise.recurrence.delta_net import DeltaNet, GatedDeltaNet
from tilewise.recurrence.fast_weights import FastWeights, orthogonal, read_chunk
from tilewise.recurrence.gla import GLA
from tilewise.recurrence.initial_state import InitialState, tune_initial_state
from tilewise.recurrence.lightning import (
    LRPE,
    SGLU,
    TNL,
    Lightning,
    LightningState,
    lightning_attention,
    slopes,
)
from tilewise.recurrence.lact import LaCT, LaCTState
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState
from tilewise.recurrence.mlstm_sig import MLSTMSig
from tilewise.recurrence.model import MIXERS, Block, ModelConfig, SequenceModel, SwiGLU, mixer
from tilewise.recurrence.per_channel import elementwise
from tilewise.recurrence.rat import RAT, RATState
from tilewise.recurrence.short_conv import ShortConv
from tilewise.recurrence.state import Carried, State
from tilewise.recurrence.transnormer import BlockState, DiagonalAttention, NormAttention, TransNormer

__all__ = [
    "MIXERS",
    "MLSTMSig",
    "Block",
    "BlockState",
    "Carried",
    "DeltaNet",
    "DiagonalAttention",
    "GLA",
    "GatedDeltaNet",
    "HeadNorm",
    "InitialState",
    "LRPE",
    "Lightning",
    "LightningState",
    "FastWeights",
    "GLA",
    "GatedDeltaNet",
    "HeadNorm",
    "LaCT",
    "LaCTState",
    "Mixer",
    "MixerState",
    "ModelConfig",
    "NormAttention",
    "SGLU",
    "RAT",
    "RATState",
    "SequenceModel",
    "ShortConv",
    "State",
    "SwiGLU",
    "TNL",
    "TransNormer",
    "elementwise",
    "empty_state",
    "explain",
    "lightning_attention",
    "mixer",
    "orthogonal",
    "read_chunk",
    "scan",
    "slopes",
    "tune_initial_state",
]
