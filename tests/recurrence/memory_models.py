"""Small models of LaCT, whose memories learn as they read, and one that has none.

`training/train_memories.py` trains them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.recurrence.decays import BYTES, WEIGHTS
from tilewise.recurrence import LaCT, ModelConfig, SequenceModel

WIDTH = 32
TEXT = 512  # bytes of a piece of text in training

# Settings of both layers of LaCT.
SETTINGS: dict[str, dict[str, Any]] = {
    "lact-16": {"chunk": 16},
    "lact-64": {"chunk": 64},
    "lact-256": {"chunk": 256},
    "lact-none": {"chunk": 64},  # its memory is never heard
}


def built(name: str) -> SequenceModel:
    """Untrained."""
    options = {"lact": SETTINGS[name] | {"window": 16, "rate": 0.1}}
    model = SequenceModel(ModelConfig(BYTES, WIDTH, ("lact", "lact"), options, 2 * WIDTH))
    return silenced(model) if name == "lact-none" else model


def silenced(model: SequenceModel) -> SequenceModel:
    """The same model of LaCT, in which memories say nothing, and learn nothing in training."""
    for block in model.blocks:
        assert isinstance(block.mixer, LaCT)
        for part in block.mixer.share.parameters():
            part.detach().zero_()
            part.requires_grad_(False)
    return model


def load(name: str) -> SequenceModel:
    """The trained model."""
    from safetensors.torch import load_file

    model = built(name)
    found = {key: x.float() for key, x in load_file(Path(WEIGHTS) / f"{name}.safetensors").items()}
    model.load_state_dict({"head.weight": found["embedding.weight"]} | found)
    return model.eval()
