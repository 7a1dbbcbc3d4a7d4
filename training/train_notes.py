"""Train the small models of tests/recurrence/note_models.py: `python training/train_notes.py [NAME ...]`.

One thread, fixed seeds. All see the same sequences in the same order; "refined" goes on from "coarse" with smaller
chunks, for a tenth of the steps. Prints what a step took. Writes float16 weights.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.recurrence import note_models
from tilewise.data.recall_tasks import IGNORE

STEPS, BATCH, RATE = 1500, 16, 4e-3
STAGE_TWO = STEPS // 10
FAR = 10**9  # seeds of training begin here


def train(name: str) -> None:
    torch.manual_seed(0)
    refined = name == "refined"
    steps, rate, seed = (STAGE_TWO, RATE / 4, FAR + STEPS) if refined else (STEPS, RATE, FAR)
    model = note_models.load("coarse").train() if refined else note_models.built(name)
    if refined:
        note_models.refine(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.process_time()
    for step in range(steps):
        fall = 0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * fall
        tokens, targets = note_models.drawn(BATCH, seed + step)
        asked = targets != IGNORE
        loss = F.cross_entropy(model(tokens)[0][asked], targets[asked])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0:
            print(f"{name} {step} {loss.item():.3f} {time.process_time() - began:.0f} s", flush=True)
    spent = (time.process_time() - began) / steps
    kept = {key: x.half().contiguous() for key, x in model.state_dict().items() if key != "head.weight"}
    save_file(kept, note_models.WEIGHTS / f"notes-{name}.safetensors")
    all_, facts, registers = note_models.right(note_models.load(name), seed=10**6)
    print(
        f"{name}: {1e3 * spent:.0f} ms a step; right {all_:.1%}, facts {facts:.1%}, registers {registers:.1%}",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or note_models.SETTINGS:
        train(chosen)
