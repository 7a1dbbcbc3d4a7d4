"""Trains the small models of tests/convolution on photographs and clips, a file of weights for each.

`python training/train_images.py [NAME ...]` writes tests/convolution/weights/NAME.safetensors in float16 and says
how long it took; every model takes at most five minutes of one core. Names are those of
`tests/convolution/image_models.py`, all by default. Photographs are those that come with scikit-image.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.convolution import photographs as p  # noqa: E402
from tests.convolution.image_models import TRAININGS, Training  # noqa: E402


def train(model: nn.Module, training: Training, steps: int) -> None:
    """By AdamW, with a warm-up and a cosine; the crops of a step are those of its seed."""
    optimizer = torch.optim.AdamW(model.parameters(), training.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, steps, pct_start=0.1)
    begun, mean = time.perf_counter(), 0.0
    for step in range(steps):
        loss = training.loss(model, (1 << 32) + step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += loss.item()
        every = max(1, steps // 8)
        if (step + 1) % every == 0:
            print(f"  {step + 1}: {mean / every:.5f}, {time.perf_counter() - begun:.0f} s", flush=True)
            mean = 0.0


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    steps = None
    if names and names[-1].isdigit():  # fewer steps, for a look
        steps = int(names.pop())
    for name in names or TRAININGS:
        training = TRAININGS[name]
        torch.manual_seed(0)
        model = training.make().train()
        print(f"{name}: {sum(x.numel() for x in model.parameters())} parameters", flush=True)
        train(model, training, steps or training.steps)
        path = p.WEIGHTS / f"{name}.safetensors"
        p.WEIGHTS.mkdir(exist_ok=True)
        save_file({key: x.detach().half().contiguous() for key, x in model.state_dict().items()}, path)
        path.chmod(0o644)


if __name__ == "__main__":
    main(sys.argv[1:])
