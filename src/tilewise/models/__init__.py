"""Pretrained Hugging Face models: loading them safely, and swapping their attention in and out."""

from tilewise.models.capturing import capture, logit_quality
from tilewise.models.gates import bundled_gates, gated, gated_names, load_gates, save_gates, serves
from tilewise.models.load import bundled_model, load_model
from tilewise.models.patching import Event, patch
from tilewise.models.recipes import ModelRecipe, read_recipe
from tilewise.models.registering import register

__all__ = [
    "Event",
    "ModelRecipe",
    "bundled_gates",
    "bundled_model",
    "capture",
    "gated",
    "gated_names",
    "load_gates",
    "load_model",
    "logit_quality",
    "patch",
    "read_recipe",
    "register",
    "save_gates",
    "serves",
]
