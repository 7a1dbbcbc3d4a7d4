"""Small models of TNT that keep notes, and the memories it is measured against: training/train_notes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewise.data.recall_tasks import accuracy, notes, notes_parts
from tilewise.recurrence import TNT, ModelConfig, SequenceModel

WEIGHTS = Path(__file__).parent / "weights"
VOCABULARY, LENGTH = 60, 256
LARGE, SMALL, COARSE = 64, 4, 16  # tokens of a chunk

# Two memories of 2 x 3 x 16 x 16 numbers, or one of as many as both.
SETTINGS: dict[str, dict[str, Any]] = {
    "tnt": {"far": LARGE, "near": (SMALL,), "shard": LARGE},
    "small": {"far": None, "near": (SMALL,), "shard": None, "expand": 2.0},
    "large": {"far": None, "near": (LARGE,), "shard": None, "expand": 2.0},
    "local": {"far": None, "near": (SMALL,), "shard": LARGE, "expand": 2.0},
    "global": {"far": LARGE, "near": (), "expand": 2.0},
    "coarse": {"far": LARGE, "near": (COARSE,), "shard": LARGE},
    "refined": {"far": LARGE, "near": (COARSE,), "shard": LARGE},  # "coarse" after its second stage
}


def built(name: str) -> SequenceModel:
    """Untrained, one layer of width 32."""
    options = {"tnt": SETTINGS[name] | {"memories": 2, "rate": 4.0}}
    model = SequenceModel(ModelConfig(VOCABULARY, 32, ("tnt",), options, hidden=64))
    if name == "refined":
        refine(model)
    return model


def refine(model: SequenceModel) -> None:
    """The second stage's smaller chunks."""
    memory = model.blocks[0].mixer
    assert isinstance(memory, TNT)
    memory.refine((SMALL,))


def drawn(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    return notes(examples, LENGTH, seed=seed, vocabulary=VOCABULARY)


@torch.no_grad()
def right(model: SequenceModel, seed: int = 0, examples: int = 200) -> tuple[float, float, float]:
    """The share of right answers: of all questions, of those for facts, of those for registers."""
    tokens, targets = drawn(examples, seed)
    logits, parts = model(tokens)[0], notes_parts(tokens, targets)
    return accuracy(logits, targets), accuracy(logits, parts[0]), accuracy(logits, parts[1])


def load(name: str) -> SequenceModel:
    """The trained model."""
    from safetensors.torch import load_file

    model = built(name)
    found = {key: x.float() for key, x in load_file(WEIGHTS / f"notes-{name}.safetensors").items()}
    model.load_state_dict({"head.weight": found["embedding.weight"]} | found)
    return model.eval()
