"""Convolution: long filters and spectral mixers."""

from tilewise.convolution.walloc import WaLLoC, entropy
from tilewise.convolution.wavelets import CDF97, Filters, inverse_wavelet_packet, wavelet_packet

__all__ = [
    "CDF97",
    "Filters",
    "WaLLoC",
    "entropy",
    "inverse_wavelet_packet",
    "wavelet_packet",
]
