"""Trains the networks of tests/recurrence/test_terminator.py: with the operator, without kernel, without
reach.

`python training/train_terminator.py [REACH ...]` writes
tests/recurrence/weights/terminator-REACH.safetensors; about a minute and a half for each, on one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.recurrence.dots import WEIGHTS, network, pictures, right  # noqa: E402
from tilewise.recurrence import Terminator  # noqa: E402

STEPS, PICTURES, RATE = 1000, 32, 4e-3


def train(reach: str) -> Terminator:
    torch.manual_seed(0)
    net, start = network(reach), time.perf_counter()
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS, pct_start=0.1)
    for step in range(STEPS):
        images, label = pictures(PICTURES, step)
        error = F.cross_entropy(net(images), label)
        optimiser.zero_grad()
        (error + 0.1 * net.slow_loss()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            found = right(net.eval(), 500)
            net.train()
            print(
                f"{reach} {step}: {error.item():.3f}, {found:.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return net.eval()


def main() -> None:
    torch.set_num_threads(1)
    for reach in sys.argv[1:] or ("all", "plain", "own"):
        net = train(reach)
        kept = {n: p.half() if p.is_floating_point() else p for n, p in net.state_dict().items()}
        save_file({n: p.contiguous() for n, p in kept.items()}, WEIGHTS / f"terminator-{reach}.safetensors")
        print(reach, right(net), flush=True)


if __name__ == "__main__":
    main()
