"""The main job: several methods against the dense model, on one model and one text."""

from tilewise.compare.run import run_compare
from tilewise.compare.settings import Settings

__all__ = ["Settings", "run_compare"]
