"""Convolution: long kernels, one for each channel, spectral mixers, and what images are coded and mended by."""

from tilewise.convolution.api import explain_conv, long_conv, two_sided_conv
from tilewise.convolution.butterfly import LearnedButterfly
from tilewise.convolution.diagonal import DiagonalSSM
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
from tilewise.convolution.images.deblur import Deblurred, DeepRFT, SubUNet, deblur_loss
from tilewise.convolution.images.flash_i2v import FlashI2V, flow_loss, flow_sample, high_frequencies
from tilewise.convolution.images.fourier_kernel import FourierKernelEstimator, convolve
from tilewise.convolution.images.frequency_windows import AFMM, FSTAM, WindowAttention
from tilewise.convolution.images.hcfss import HCFSS, VFSS, Coded, Hybrid, rate_distortion
from tilewise.convolution.images.reversible import Coupling, ReversibleSequence
from tilewise.convolution.images.vonss import VONSS, scan_order
from tilewise.convolution.images.walloc import WaLLoC, entropy
from tilewise.convolution.images.wavelets import CDF97, Filters, inverse_wavelet_packet, wavelet_packet
from tilewise.convolution.long_kernel import LongConv, smooth, squash
from tilewise.convolution.prepared import PreparedKernel, prepare
from tilewise.convolution.spectral.aff import AFF, AFFBlock, AFFNet
from tilewise.convolution.spectral.afno import AFNO
from tilewise.convolution.spectral.divided import divided_exp
from tilewise.convolution.spectral.fno import FNO, SpectralConv
from tilewise.convolution.spectral.fourier_vlm import Compressed, FourierVLM
from tilewise.convolution.spectral.meshes import SimplexNUFT, simplex_nuft
from tilewise.convolution.spectral.nstr import NSTR, SpectrumGrid
from tilewise.convolution.spectral.t1 import T1, T1Layer
from tilewise.convolution.state import ConvState

__all__ = [
    "AFF",
    "AFFBlock",
    "AFFNet",
    "AFMM",
    "AFNO",
    "CDF97",
    "Coded",
    "Compressed",
    "ConvState",
    "Coupling",
    "Deblurred",
    "DeepRFT",
    "DiagonalSSM",
    "DiagonalState",
    "FNO",
    "FSTAM",
    "Filters",
    "FlashI2V",
    "FourierKernelEstimator",
    "FourierVLM",
    "FrequencySparsity",
    "GauntTensorProduct",
    "H3",
    "H3State",
    "HCFSS",
    "Hybrid",
    "LearnedButterfly",
    "LongConv",
    "NSTR",
    "PreparedKernel",
    "ReversibleSequence",
    "S4D",
    "SimplexNUFT",
    "SpectralConv",
    "SpectrumGrid",
    "SubUNet",
    "T1",
    "T1Layer",
    "VFSS",
    "VONSS",
    "WaLLoC",
    "WindowAttention",
    "convolve",
    "deblur_loss",
    "divided_exp",
    "entropy",
    "explain_conv",
    "flow_loss",
    "flow_sample",
    "from_fourier",
    "gaunt_product",
    "gaunt_table",
    "high_frequencies",
    "inverse_wavelet_packet",
    "long_conv",
    "prepare",
    "rate_distortion",
    "real_3j",
    "real_harmonics",
    "scan_order",
    "simplex_nuft",
    "smooth",
    "squash",
    "to_fourier",
    "two_sided_conv",
    "wavelet_packet",
    "wigner_3j",
]
