"""Train the small models of tests/recurrence/decays.py: `python training/train_decays.py [NAME ...]`.

One thread, fixed seeds; about a minute for each model on one core. Writes float16 weights.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.recurrence import decays

STEPS = {"tnl": 400, "transnormer": 320, "mlstm": 400, "gla-resets": 700, "gla-cipher": 900}
RATE = 4e-3


def batch(name: str, data: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets of one step."""
    if name.startswith("gla-resets"):
        return decays.resets(32, 64, gen)
    if name == "gla-cipher":
        return decays.spoken(decays.voices(64, gen), 24, gen, shown=24)
    return decays.excerpts(data, 8, 256, gen)


def train(name: str) -> None:
    torch.manual_seed(0)
    gen, data, began = torch.Generator().manual_seed(1), decays.text(held_out=False), time.monotonic()
    model = decays.MODELS[name]()
    steps = next(count for prefix, count in STEPS.items() if name.startswith(prefix))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        tokens, targets = batch(name, data, gen)
        loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{name} {step} {loss.item():.3f} {time.monotonic() - began:.0f} s", flush=True)
    decays.WEIGHTS.mkdir(exist_ok=True)
    kept = {key: x.half().contiguous() for key, x in model.state_dict().items()}
    if model.config.tied:
        del kept["head.weight"]
    save_file(kept, decays.WEIGHTS / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or decays.MODELS:
        train(chosen)
