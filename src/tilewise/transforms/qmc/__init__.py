"""Quasi-Monte Carlo: low-discrepancy points, randomisations, fast kernel methods, adaptive cubature."""

from tilewise.transforms.qmc.cubature import Estimate, integrate
from tilewise.transforms.qmc.gaussian_process import FastGP
from tilewise.transforms.qmc.gram import Gram
from tilewise.transforms.qmc.halton import Halton
from tilewise.transforms.qmc.kernels import DigitallyShiftInvariant, ProductKernel, ShiftInvariant
from tilewise.transforms.qmc.lattice import Lattice
from tilewise.transforms.qmc.lattice_search import search_lattice
from tilewise.transforms.qmc.measures import Normal, Uniform
from tilewise.transforms.qmc.nets import DigitalNet
from tilewise.transforms.qmc.sequence import PointSequence

__all__ = [
    "DigitalNet",
    "DigitallyShiftInvariant",
    "Estimate",
    "FastGP",
    "Gram",
    "Halton",
    "Lattice",
    "Normal",
    "PointSequence",
    "ProductKernel",
    "ShiftInvariant",
    "Uniform",
    "integrate",
    "search_lattice",
]
