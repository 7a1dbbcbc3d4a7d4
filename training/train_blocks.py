"""Train the small models of tests/recurrence/blocks.py: `python training/train_blocks.py [NAME ...]`.

One thread, fixed seeds; about a minute for each model on one core. All see the same text in the same order.
Writes float16 weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.recurrence import blocks, decays
from training import small

STEPS = 500


def train(name: str) -> None:
    torch.manual_seed(0)
    gen, data, model = torch.Generator().manual_seed(1), decays.text(held_out=False), blocks.MODELS[name]()
    small.train(name, model, lambda: blocks.loss(model, *decays.excerpts(data, 8, 256, gen)), STEPS)
    print(f"{name}: {decays.bits_per_byte(model):.3f} bits a byte held out", flush=True)
    small.save(model, decays.WEIGHTS / f"{name}.safetensors", tied=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or blocks.MODELS:
        train(chosen)
