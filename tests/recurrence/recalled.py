"""The small models that training/train_recall.py made, and how they are marked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tilewise.data.recall_tasks import accuracy
from tilewise.recurrence import ModelConfig, SequenceModel

WEIGHTS = Path(__file__).parent / "weights"


def trained(name: str, **changes) -> SequenceModel:
    """The model of a run of training/train_recall.py; `changes` replace fields of its configuration."""
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"]) | changes
        model = SequenceModel(ModelConfig(**config | {"layers": tuple(config["layers"])})).eval()
        missing, unexpected = model.load_state_dict(
            {key: file.get_tensor(key).float() for key in file.keys()}, strict=False
        )
    assert not unexpected and set(missing) <= {"head.weight"}
    return model


@torch.no_grad()
def marks(model: SequenceModel, task: Callable[[int], tuple[Tensor, Tensor]], draws: int = 5) -> Tensor:
    """The share of right answers on each of some fresh draws of a task, which is given a seed."""
    made = [task(seed) for seed in range(draws)]
    return torch.tensor([accuracy(model(tokens)[0], targets) for tokens, targets in made])


def said(**found: Tensor) -> str:
    """Means and spreads, for a failed test to show."""
    return ", ".join(f"{name} {100 * x.mean():.1f} % +- {100 * x.std():.1f}" for name, x in found.items())
