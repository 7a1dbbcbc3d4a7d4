"""Attention of third and higher order: every query weighs pairs (triples, ...) of keys.

definition.py   its meaning, all N^3 weights written out
streamed.py     exact, a tile of pairs at a time
polynomial.py   near-linear for bounded entries: polynomials of scores, taken apart into monomials
series.py       which polynomial, and the error it is proven to keep to
method.py       TensorAttention and tensor_attention
"""

from tilewise.attention.tensor.definition import definition
from tilewise.attention.tensor.method import Expansion, TensorAttention, tensor_attention
from tilewise.attention.tensor.series import Series, lowest_degree

__all__ = ["Expansion", "Series", "TensorAttention", "definition", "lowest_degree", "tensor_attention"]
