"""Train the small models of tests/recurrence/memory_models.py: `python training/train_memories.py [NAME
...]`.

One thread, fixed seeds; some 25 seconds of one core for each. All see the same text in the same order. Writes
float16 weights.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.recurrence import decays, memory_models

STEPS, RATE = 300, 4e-3


def train(name: str) -> None:
    torch.manual_seed(0)
    gen, data, began = torch.Generator().manual_seed(1), decays.text(held_out=False), time.monotonic()
    model = memory_models.built(name)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        tokens, targets = decays.excerpts(data, 4, memory_models.TEXT, gen)
        loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"{name} {step} {loss.item():.3f} {time.monotonic() - began:.0f} s", flush=True)
    print(f"{name}: {decays.bits_per_byte(model):.3f} bits a byte held out", flush=True)
    kept = {key: x.half().contiguous() for key, x in model.state_dict().items() if key != "head.weight"}
    save_file(kept, decays.WEIGHTS / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or memory_models.SETTINGS:
        train(chosen)
