"""Train the small models of tests/recurrence/memory_models.py: `python training/train_memories.py [NAME
...]`.

One thread, fixed seeds; some six minutes of one core for all, and says what a step takes. All see the same
text in the same order. TNT's second stage goes on from "tnt": "tnt-refined" in smaller chunks, "tnt-longer"
as it was. Writes float16 weights.
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

STEPS, RATE = {"tnt": 600, "lact": 300}, 4e-3
MORE_STEPS, MORE_RATE = 60, 1e-3  # of the second stage


def train(name: str) -> None:
    stage_two = name.endswith(("-refined", "-longer"))
    torch.manual_seed(0)
    gen, data = torch.Generator().manual_seed(2 if stage_two else 1), decays.text(held_out=False)
    model = memory_models.load("tnt") if stage_two else memory_models.built(name)
    if name.endswith("-refined"):
        memory_models.refine(model)
    steps, rate = (MORE_STEPS, MORE_RATE) if stage_two else (STEPS[name.partition("-")[0]], RATE)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    for step in range(steps):
        if name.startswith("tnt"):
            # From short streams, of few keys, to long ones.
            pairs = (
                memory_models.PAIRS
                if stage_two
                else (4, 8, 16, memory_models.PAIRS)[min(3, 5 * step // steps)]
            )
            tokens, targets, _ = memory_models.streams(1024 // pairs, gen, pairs)
        else:
            tokens, targets = decays.excerpts(data, 4, memory_models.TEXT, gen)
        loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            took = time.monotonic() - began
            print(
                f"{name} {step} {loss.item():.3f} {took:.0f} s, {1e3 * took / (step + 1):.0f} ms a step",
                flush=True,
            )
    if name.startswith("tnt"):
        print(f"{name}: {memory_models.recalled(model)}", flush=True)
    else:
        print(f"{name}: {decays.bits_per_byte(model):.3f} bits a byte held out", flush=True)
    kept = {key: x.half().contiguous() for key, x in model.state_dict().items() if key != "head.weight"}
    save_file(kept, decays.WEIGHTS / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or (*memory_models.SETTINGS, "tnt-refined", "tnt-longer"):
        train(chosen)
