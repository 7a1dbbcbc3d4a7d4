"""Train the small models of tests/recurrence/memory_models.py: `python training/train_memories.py [NAME
...]`.

One thread, fixed seeds; some 25 seconds of one core for each. All see the same text in the same order. Writes
float16 weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.recurrence import decays, memory_models
from training import small

STEPS = 300


def train(name: str) -> None:
    torch.manual_seed(0)
    gen, data = torch.Generator().manual_seed(1), decays.text(held_out=False)
    model = memory_models.built(name)

    def loss() -> Tensor:
        tokens, targets = decays.excerpts(data, 4, memory_models.TEXT, gen)
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    small.train(name, model, loss, STEPS)
    print(f"{name}: {decays.bits_per_byte(model):.3f} bits a byte held out", flush=True)
    small.save(model, decays.WEIGHTS / f"{name}.safetensors", tied=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or memory_models.SETTINGS:
        train(chosen)
