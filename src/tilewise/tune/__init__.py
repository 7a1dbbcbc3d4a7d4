"""The search for a model's own recipe: which method, with which settings, each layer should use."""

from tilewise.tune.choose import allocate, front
from tilewise.tune.measure import Found, Sample, measure
from tilewise.tune.search import Board, Settings, Tried, explore, run_tune
from tilewise.tune.space import composed, published

__all__ = [
    "Board",
    "Found",
    "Sample",
    "Settings",
    "Tried",
    "allocate",
    "composed",
    "explore",
    "front",
    "measure",
    "published",
    "run_tune",
]
