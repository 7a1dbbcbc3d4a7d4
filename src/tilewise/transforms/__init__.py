"""Fast transforms: Walsh-Hadamard, Fourier and cosine transforms, learned ones, and sparse spectra."""

from tilewise.transforms.butterfly import (
    Butterfly,
    ButterflyLinear,
    Learned,
    Permutation,
    RelaxedPermutation,
    exact,
    learn_butterfly,
)
from tilewise.transforms.cosine import dct, idct
from tilewise.transforms.fourier import bit_reversed, fft, ifft, irfft, rfft
from tilewise.transforms.monarch import monarch_dft, monarch_order
from tilewise.transforms.sparse import SparseSpectrum, sparse_fwht
from tilewise.transforms.walsh import explain_fwht, fwht, hadamard, transform_factors

__all__ = [
    "Butterfly",
    "ButterflyLinear",
    "Learned",
    "Permutation",
    "RelaxedPermutation",
    "SparseSpectrum",
    "bit_reversed",
    "dct",
    "exact",
    "explain_fwht",
    "fft",
    "fwht",
    "hadamard",
    "idct",
    "ifft",
    "irfft",
    "learn_butterfly",
    "monarch_dft",
    "monarch_order",
    "rfft",
    "sparse_fwht",
    "transform_factors",
]
