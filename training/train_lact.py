"""Trains the memories of tests/recurrence/test_lact.py: first weights and rates, one set for each kind and chunk.

`python training/train_lact.py` writes tests/recurrence/weights/lact.safetensors; about two minutes on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.recurrence.memories import Memory, pairs, recalled  # noqa: E402

COUNT, STEPS = 64, 400
SETTINGS = [
    ("swiglu", 4),
    ("swiglu", 16),
    ("swiglu", 64),
    ("muon", 16),
    ("muon", 64),
    ("linear", 4),
    ("linear", 64),
]


def train(kind: str, chunk: int) -> Memory:
    memory = Memory(kind)
    optimiser = torch.optim.Adam(memory.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for step in range(STEPS):
        k, v = pairs(16, COUNT, seed=1000 + step)
        logits = memory(k, v, chunk)
        loss = F.cross_entropy(logits.flatten(0, 1), torch.arange(COUNT).repeat(len(k)))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return memory


def main() -> None:
    torch.set_num_threads(1)
    kept = {}
    for kind, chunk in SETTINGS:
        memory = train(kind, chunk)
        kept |= {f"{kind}-{chunk}.{name}": p.detach().half() for name, p in memory.named_parameters()}
        with torch.no_grad():
            share = recalled(memory(*pairs(64, COUNT, seed=0), chunk))
        print(f"{kind} {chunk}: {share:.1%} of values found", flush=True)
    save_file(kept, ROOT / "tests/recurrence/weights/lact.safetensors")


if __name__ == "__main__":
    main()
