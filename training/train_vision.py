"""Trains the small models of tests/recurrence on pictures (`tests/recurrence/pictures.py`), a file for each.

`python training/train_vision.py [NAME ...]` writes tests/recurrence/weights/vision-NAME.safetensors and
prints what was found; about 30 seconds of one core for a classifier and one to two minutes for a denoiser.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.recurrence import pictures as p  # noqa: E402
from tests.recurrence.vision_models import CLASSIFIERS, DENOISERS, classifier, denoiser  # noqa: E402


def train(model: nn.Module, loss, steps: int, rate: float = 3e-3) -> None:
    """`loss(model, seed)` by AdamW, with a warm-up and a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    begun = time.process_time()
    for step in range(steps):
        value = loss(model, (1 << 32) + step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"  {step + 1}: {value.item():.3f}, {time.process_time() - begun:.0f} s", flush=True)


def save(model: nn.Module, name: str) -> None:
    path = p.WEIGHTS / f"vision-{name}.safetensors"
    save_file({key: x.detach().half().contiguous() for key, x in model.state_dict().items()}, path)
    path.chmod(0o644)


def classify(model: nn.Module, seed: int) -> torch.Tensor:
    seen, labels = p.blurred(64, seed)
    return F.cross_entropy(model(seen), labels)


def denoise(model: nn.Module, seed: int) -> torch.Tensor:
    batch = p.noisy(32, seed)
    out = model(batch[0], batch[1])
    return p.hybrid_error(out, batch) if out.shape[3] == 2 else p.noise_error(out, batch)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or [*CLASSIFIERS, *DENOISERS]:
        torch.manual_seed(0)
        made = classifier(name) if name in CLASSIFIERS else denoiser(name)
        print(f"{name}: {sum(x.numel() for x in made.parameters())} parameters", flush=True)
        train(made, classify, 1500) if name in CLASSIFIERS else train(made, denoise, 2500)
        save(made, name)
        made.eval()
        with torch.no_grad():
            if name in CLASSIFIERS:
                print(f"  right: {p.right(made):.1%}", flush=True)
            else:
                print(f"  held-out error of noise: {p.held_out(made):.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
