"""Convolution: long filters and spectral mixers."""

from tilewise.convolution.deblur import Deblurred, DeepRFT, SubUNet, deblur_loss
from tilewise.convolution.flash_i2v import FlashI2V, flow_loss, flow_sample, high_frequencies
from tilewise.convolution.fourier_kernel import FourierKernelEstimator, convolve
from tilewise.convolution.frequency import AFMM, FSTAM, WindowAttention
from tilewise.convolution.hcfss import HCFSS, VFSS, Coded, Hybrid, rate_distortion
from tilewise.convolution.reversible import Coupling, ReversibleSequence
from tilewise.convolution.vonss import VONSS, scan_order
from tilewise.convolution.walloc import WaLLoC, entropy
from tilewise.convolution.wavelets import CDF97, Filters, inverse_wavelet_packet, wavelet_packet

__all__ = [
    "AFMM",
    "CDF97",
    "Coded",
    "Coupling",
    "Deblurred",
    "DeepRFT",
    "FSTAM",
    "Filters",
    "FlashI2V",
    "FourierKernelEstimator",
    "HCFSS",
    "Hybrid",
    "ReversibleSequence",
    "SubUNet",
    "VFSS",
    "VONSS",
    "WaLLoC",
    "WindowAttention",
    "convolve",
    "deblur_loss",
    "entropy",
    "flow_loss",
    "flow_sample",
    "high_frequencies",
    "inverse_wavelet_packet",
    "rate_distortion",
    "scan_order",
    "wavelet_packet",
]
