"""The small models of the evidence on TNT, what they are measured against; `training/train_tnt.py` trains
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.recurrence.decays import BYTES, WEIGHTS
from tilewise.recurrence import TNT, ModelConfig, SequenceModel

LENGTH, WIDTH = 512, 32
TWO_SCALES: dict[str, Any] = {"far": 128, "near": (16,), "shard": 64}
REFINED = (4,)  # chunks of the second stage

# What training began with; "-refined" models went on from these in smaller chunks, "-longer" ones as they
# were.
SETTINGS: dict[str, dict[str, Any]] = {
    "tnt": TWO_SCALES,
    "tnt-plain": {"far": None, "near": (8,), "shard": None},  # one memory of small chunks, never reset
    "tnt-no-near": TWO_SCALES | {"near": ()},
    "tnt-no-far": TWO_SCALES | {"far": None},
    "tnt-no-projection": TWO_SCALES | {"project": False},
}


def built(name: str) -> SequenceModel:
    """Two layers, untrained."""
    options = {"memories": 2} | SETTINGS[name.removesuffix("-refined").removesuffix("-longer")]
    return SequenceModel(ModelConfig(BYTES, WIDTH, ("tnt", "tnt"), {"tnt": options}, 2 * WIDTH))


def refine(model: SequenceModel, near: tuple[int, ...] = REFINED) -> SequenceModel:
    """The same model, its local memories learning in other chunks from now on."""
    for block in model.blocks:
        mixer = block.mixer
        assert isinstance(mixer, TNT)
        mixer.refine(near)
    return model


def load(name: str) -> SequenceModel:
    """The trained model."""
    from safetensors.torch import load_file

    model = built(name)
    found = {key: x.float() for key, x in load_file(Path(WEIGHTS) / f"{name}.safetensors").items()}
    model.load_state_dict({"head.weight": found["embedding.weight"]} | found)
    return (refine(model) if name.endswith("-refined") else model).eval()
