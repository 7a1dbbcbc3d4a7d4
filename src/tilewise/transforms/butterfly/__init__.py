"""Learned products of butterfly factors and permutations, and layers of them."""

from tilewise.transforms.butterfly.layer import ButterflyLinear
from tilewise.transforms.butterfly.learn import Learned, learn_butterfly
from tilewise.transforms.butterfly.permutation import Permutation, RelaxedPermutation
from tilewise.transforms.butterfly.transform import Butterfly, exact

__all__ = [
    "Butterfly",
    "ButterflyLinear",
    "Learned",
    "Permutation",
    "RelaxedPermutation",
    "exact",
    "learn_butterfly",
]
