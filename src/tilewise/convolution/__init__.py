"""Convolution: long filters and spectral mixers."""

from tilewise.convolution.aff import AFF, AFFBlock, AFFNet
from tilewise.convolution.afno import AFNO
from tilewise.convolution.divided import divided_exp
from tilewise.convolution.fno import FNO, SpectralConv
from tilewise.convolution.fourier_vlm import Compressed, FourierVLM
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
from tilewise.convolution.meshes import SimplexNUFT, simplex_nuft
from tilewise.convolution.nstr import NSTR, SpectrumGrid
from tilewise.convolution.t1 import T1, T1Layer

__all__ = [
    "AFF",
    "AFFBlock",
    "AFFNet",
    "AFNO",
    "Compressed",
    "FNO",
    "FourierVLM",
    "GauntTensorProduct",
    "NSTR",
    "SimplexNUFT",
    "SpectralConv",
    "SpectrumGrid",
    "T1",
    "T1Layer",
    "divided_exp",
    "from_fourier",
    "gaunt_product",
    "gaunt_table",
    "real_3j",
    "real_harmonics",
    "simplex_nuft",
    "to_fourier",
    "wigner_3j",
]
