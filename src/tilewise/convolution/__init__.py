"""Convolution: long kernels, one for each channel, and spectral mixers."""

from tilewise.convolution.aff import AFF, AFFBlock, AFFNet
from tilewise.convolution.afno import AFNO
from tilewise.convolution.api import explain_conv, long_conv, two_sided_conv
from tilewise.convolution.butterfly import LearnedButterfly
from tilewise.convolution.diagonal import DiagonalSSM
from tilewise.convolution.divided import divided_exp
from tilewise.convolution.fno import FNO, SpectralConv
from tilewise.convolution.fourier_vlm import Compressed, FourierVLM
from tilewise.convolution.frequency import FrequencySparsity
from tilewise.convolution.gaunt import (
    GauntTensorProduct,
    from_fourier,
    gaunt_product,
    gaunt_table,
    real_3j,
    real_harmonics,
    to_fourier,
    wigner_3j,
)
from tilewise.convolution.h3 import H3, S4D, DiagonalState, H3State
from tilewise.convolution.long_kernel import LongConv, smooth, squash
from tilewise.convolution.meshes import SimplexNUFT, simplex_nuft
from tilewise.convolution.nstr import NSTR, SpectrumGrid
from tilewise.convolution.prepared import PreparedKernel, prepare
from tilewise.convolution.state import ConvState
from tilewise.convolution.t1 import T1, T1Layer

__all__ = [
    "AFF",
    "AFFBlock",
    "AFFNet",
    "AFNO",
    "Compressed",
    "ConvState",
    "DiagonalSSM",
    "DiagonalState",
    "FNO",
    "FourierVLM",
    "FrequencySparsity",
    "GauntTensorProduct",
    "H3",
    "H3State",
    "LearnedButterfly",
    "LongConv",
    "NSTR",
    "PreparedKernel",
    "S4D",
    "SimplexNUFT",
    "SpectralConv",
    "SpectrumGrid",
    "T1",
    "T1Layer",
    "divided_exp",
    "explain_conv",
    "from_fourier",
    "gaunt_product",
    "gaunt_table",
    "long_conv",
    "prepare",
    "real_3j",
    "real_harmonics",
    "simplex_nuft",
    "smooth",
    "squash",
    "to_fourier",
    "two_sided_conv",
    "wigner_3j",
]
