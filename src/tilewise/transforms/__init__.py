"""Fast transforms: Walsh-Hadamard, Fourier and cosine transforms, learned ones, and sparse spectra."""

from tilewise.transforms.cosine import dct, idct
from tilewise.transforms.fourier import bit_reversed, fft, ifft, irfft, rfft
from tilewise.transforms.monarch import monarch_dft, monarch_order
from tilewise.transforms.walsh import explain_fwht, fwht, hadamard, transform_factors

__all__ = [
    "bit_reversed",
    "dct",
    "explain_fwht",
    "fft",
    "fwht",
    "hadamard",
    "idct",
    "ifft",
    "irfft",
    "monarch_dft",
    "monarch_order",
    "rfft",
    "transform_factors",
]
