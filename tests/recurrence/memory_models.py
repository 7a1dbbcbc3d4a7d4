"""Small models with memories that learn as they read, and what they are measured against.

`training/train_memories.py` trains them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.recurrence.decays import BYTES, WEIGHTS
from tilewise.recurrence import TNT, LaCT, ModelConfig, SequenceModel

LENGTH, WIDTH = 512, 32
TWO_SCALES: dict[str, Any] = {"memories": 2, "far": 128, "near": (16,), "shard": 64}
REFINED = (4,)  # chunks of TNT's second stage

# Mixers of both layers and their settings. "tnt-refined" and "tnt-longer" went on from "tnt".
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tnt": ("tnt", TWO_SCALES),
    "tnt-plain": ("tnt", {"memories": 2, "far": None, "near": (8,), "shard": None}),  # small chunks, no reset
    "tnt-no-near": ("tnt", TWO_SCALES | {"near": ()}),
    "tnt-no-far": ("tnt", TWO_SCALES | {"far": None}),
    "tnt-no-projection": ("tnt", TWO_SCALES | {"project": False}),
    "lact-16": ("lact", {"chunk": 16, "window": 16, "rate": 0.1}),
    "lact-64": ("lact", {"chunk": 64, "window": 16, "rate": 0.1}),
    "lact-256": ("lact", {"chunk": 256, "window": 16, "rate": 0.1}),
    "lact-none": ("lact", {"chunk": 64, "window": 16, "rate": 0.1}),  # its memory is never heard
}


def built(name: str) -> SequenceModel:
    """Two layers, untrained."""
    kind, options = SETTINGS[name.removesuffix("-refined").removesuffix("-longer")]
    model = SequenceModel(ModelConfig(BYTES, WIDTH, (kind, kind), {kind: options}, 2 * WIDTH))
    return silenced(model) if name == "lact-none" else model


def silenced(model: SequenceModel) -> SequenceModel:
    """The same model of LaCT, in which memories say nothing, and learn nothing in training."""
    for block in model.blocks:
        assert isinstance(block.mixer, LaCT)
        for part in block.mixer.share.parameters():
            part.detach().zero_()
            part.requires_grad_(False)
    return model


def refine(model: SequenceModel, near: tuple[int, ...] = REFINED) -> SequenceModel:
    """The same model of TNT, its local memories learning in other chunks from now on."""
    for block in model.blocks:
        assert isinstance(block.mixer, TNT)
        block.mixer.refine(near)
    return model


def load(name: str) -> SequenceModel:
    """The trained model."""
    from safetensors.torch import load_file

    model = built(name)
    found = {key: x.float() for key, x in load_file(Path(WEIGHTS) / f"{name}.safetensors").items()}
    model.load_state_dict({"head.weight": found["embedding.weight"]} | found)
    return (refine(model) if name.endswith("-refined") else model).eval()
