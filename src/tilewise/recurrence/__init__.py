"""Recurrence: the running state. Linear attention, delta rules, gated networks: one scan, in linear time."""

from tilewise.recurrence.api import empty_state, explain, scan
from tilewise.recurrence.delta_net import DeltaNet, GatedDeltaNet
from tilewise.recurrence.gla import GLA
from tilewise.recurrence.mixer import HeadNorm, Mixer, MixerState
from tilewise.recurrence.model import MIXERS, Block, ModelConfig, SequenceModel, SwiGLU, mixer
from tilewise.recurrence.short_conv import ShortConv
from tilewise.recurrence.state import Carried, State

__all__ = [
    "MIXERS",
    "Block",
    "Carried",
    "DeltaNet",
    "GLA",
    "GatedDeltaNet",
    "HeadNorm",
    "Mixer",
    "MixerState",
    "ModelConfig",
    "SequenceModel",
    "ShortConv",
    "State",
    "SwiGLU",
    "empty_state",
    "explain",
    "mixer",
    "scan",
]
