"""Spectra of few coefficients, found from few samples."""

from tilewise.transforms.sparse.spright import SparseSpectrum, sparse_fwht

__all__ = ["SparseSpectrum", "sparse_fwht"]
