"""The search for a model's own recipe: which method, with which settings, each layer should use."""

from tilewise.tune.choose import allocate, front
from tilewise.tune.measure import Found, Sample, measure
from tilewise.tune.search import Settings, run_tune
from tilewise.tune.space import composed, published

__all__ = ["Found", "Sample", "Settings", "allocate", "composed", "front", "measure", "published", "run_tune"]
