"""Train the small models of tests/recurrence/decays.py: `python training/train_decays.py [NAME ...]`.

One thread, fixed seeds; about a minute for each model on one core. Writes float16 weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.recurrence import decays
from training import small

STEPS = {
    "tnl": 400,
    "transnormer": 320,
    "mlstm": 400,
    "gla-resets": 700,
    "gla-cipher": 900,
    "matmul-free": 700,
}


def batch(name: str, data: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets of one step."""
    if name.startswith("gla-resets"):
        return decays.resets(32, 64, gen)
    if name == "gla-cipher":
        return decays.spoken(decays.voices(64, gen), 24, gen, shown=24)
    return decays.excerpts(data, 8, 256, gen)


def train(name: str) -> None:
    torch.manual_seed(0)
    gen, data, model = torch.Generator().manual_seed(1), decays.text(held_out=False), decays.MODELS[name]()
    steps = next(count for prefix, count in STEPS.items() if name.startswith(prefix))

    def loss() -> Tensor:
        tokens, targets = batch(name, data, gen)
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    small.train(name, model, loss, steps)
    small.save(model, decays.WEIGHTS / f"{name}.safetensors", tied=model.config.tied)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or decays.MODELS:
        train(chosen)
