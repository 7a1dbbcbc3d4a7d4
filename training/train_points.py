"""Trains the small networks over street scenes of tests/recurrence/test_lion.py and test_scatterformer.py.

`python training/train_points.py [KIND ...]` writes tests/recurrence/weights/points-KIND.safetensors; one to
three minutes for each kind, on one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.recurrence.streets import WEIGHTS, Marks, Net, loss, streets  # noqa: E402

STEPS = {"lion": 400, "lion-apart": 400, "lion-flat": 400, "scatter": 1000, "scatter-apart": 1000}
SCENES, RATE = 6, 5e-3


def train(kind: str) -> Net:
    torch.manual_seed(0)
    net = Net(kind)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS[kind], pct_start=0.1)
    start = time.perf_counter()
    for step in range(STEPS[kind]):
        found = loss(net, streets(SCENES, 1_000_000 + SCENES * step))
        optimiser.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            spent = time.perf_counter() - start
            print(
                f"{kind} {step}: {found.item():.3f}, {spent:.0f} s",
                Marks.of(net, streets(32, 5000)),
                flush=True,
            )
    return net.eval()


def main() -> None:
    torch.set_num_threads(1)
    for kind in sys.argv[1:] or STEPS:
        net = train(kind)
        kept = {name: value.half().contiguous() for name, value in net.state_dict().items()}
        save_file(kept, WEIGHTS / f"points-{kind}.safetensors")
        print(kind, Marks.of(net, streets(64, 9000)), flush=True)


if __name__ == "__main__":
    main()
