"""Products of spherical functions in a 2-D Fourier basis, after Gaunt Tensor Products."""

from tilewise.convolution.gaunt.bases import from_fourier, to_fourier
from tilewise.convolution.gaunt.harmonics import real_harmonics
from tilewise.convolution.gaunt.product import GauntTensorProduct, gaunt_product
from tilewise.convolution.gaunt.wigner import gaunt_table, real_3j, wigner_3j

__all__ = [
    "GauntTensorProduct",
    "from_fourier",
    "gaunt_product",
    "gaunt_table",
    "real_3j",
    "real_harmonics",
    "to_fourier",
    "wigner_3j",
]
