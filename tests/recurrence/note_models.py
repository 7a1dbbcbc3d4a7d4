"""Small models of TNT that keep facts and registers, and the memories it is measured against: for
training/train_notes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewise.data.recall_tasks import accuracy, mqar, registers
from tilewise.recurrence import TNT, ModelConfig, SequenceModel

WEIGHTS = Path(__file__).parent / "weights"
VOCABULARY, FACTS = 64, 16
LARGE, COARSE, SMALL = 32, 16, 4  # tokens of a chunk; of a shard as well LARGE

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
RATES = dict.fromkeys(SETTINGS, 4.0) | {"small": 1.0}  # the best of 1 and 4


def built(name: str) -> SequenceModel:
    """Untrained, one layer of width 32."""
    options = {"tnt": SETTINGS[name] | {"memories": 2, "rate": RATES[name], "conv": 2}}
    model = SequenceModel(ModelConfig(VOCABULARY, 32, ("tnt",), options, hidden=64))
    if name == "refined":
        refine(model)
    return model


def refine(model: SequenceModel) -> None:
    """The second stage's smaller chunks."""
    memory = model.blocks[0].mixer
    assert isinstance(memory, TNT)
    memory.refine((SMALL,))


def facts(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Told in the first shard, all of them asked for in the second."""
    return mqar(examples, 2 * LARGE, FACTS, vocabulary=VOCABULARY, seed=seed)


def rewritten(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three registers, asked for after 4 to 8 tokens: convolutions of two tokens do not see what was written.

    Every shard begins anew: what was written before a reset is not asked for, as local memories do not know it.
    """
    parts = registers(2 * examples, LARGE, vocabulary=VOCABULARY, seed=seed)
    return parts[0].view(examples, 2 * LARGE), parts[1].view(examples, 2 * LARGE)


@torch.no_grad()
def right(model: SequenceModel, seed: int = 0, examples: int = 400) -> tuple[float, float]:
    """The share of right answers about facts, and about registers."""
    marks = []
    for lesson in (facts, rewritten):
        tokens, targets = lesson(examples, seed)
        marks.append(accuracy(model(tokens)[0], targets))
    return marks[0], marks[1]


def load(name: str) -> SequenceModel:
    """The model that training/train_notes.py made: a kind and a seed, such as "tnt-0"."""
    from safetensors.torch import load_file

    model = built(name.partition("-")[0])
    found = {key: x.float() for key, x in load_file(WEIGHTS / f"notes-{name}.safetensors").items()}
    model.load_state_dict({"head.weight": found["embedding.weight"]} | found)
    return model.eval()
