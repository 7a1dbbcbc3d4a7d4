"""How the small models of the evidence are trained: one optimiser and schedule, and a file of float16 weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tilewise.descent import Descent

RATE = 4e-3


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    rate: float = RATE,
    betas: tuple[float, float] = (0.9, 0.95),
) -> None:
    """`steps` steps of AdamW down the loss of a new batch each, at a rate that rises for a tenth and falls."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=rate, betas=betas, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    descent, began = Descent(model, optimiser, clip=1.0), time.monotonic()
    for step in range(steps):
        descent.rates = schedule.get_last_lr()
        found = descent.step(loss())
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{name} {step} {found:.3f} {time.monotonic() - began:.0f} s", flush=True)


def save(model: nn.Module, path: Path, tied: bool = False) -> None:
    """Write the weights; of a model whose head is `tied` to its embedding, without the head's."""
    path.parent.mkdir(exist_ok=True)
    kept = {key: x.half().contiguous() for key, x in model.state_dict().items()}
    if tied:
        del kept["head.weight"]
    save_file(kept, path)
