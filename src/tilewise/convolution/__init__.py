"""Convolution: long kernels, one for each channel, through transforms that put nothing in order."""

from tilewise.convolution.api import explain_conv, long_conv, two_sided_conv
from tilewise.convolution.butterfly import LearnedButterfly
from tilewise.convolution.diagonal import DiagonalSSM
from tilewise.convolution.frequency import FrequencySparsity
from tilewise.convolution.h3 import H3, S4D, DiagonalState, H3State
from tilewise.convolution.long_kernel import LongConv, smooth, squash
from tilewise.convolution.prepared import PreparedKernel, prepare
from tilewise.convolution.state import ConvState

__all__ = [
    "ConvState",
    "DiagonalSSM",
    "DiagonalState",
    "FrequencySparsity",
    "H3",
    "H3State",
    "LearnedButterfly",
    "LongConv",
    "PreparedKernel",
    "S4D",
    "explain_conv",
    "long_conv",
    "prepare",
    "smooth",
    "squash",
    "two_sided_conv",
]
