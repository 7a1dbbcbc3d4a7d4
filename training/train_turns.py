"""Trains the nets of tests/recurrence/turns.py: with hyper-kernels, without, and with kernels alone.

`python training/train_turns.py [REACH-SEED ...]` writes tests/recurrence/weights/turns-REACH-SEED.safetensors; some
20 seconds of one core each. All see the same 4,000 pictures.
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

from tests.recurrence.turns import CHANNELS, WEIGHTS, Net, pictures, right  # noqa: E402

STEPS, BATCH, PICTURES, RATE = 1500, 64, 4000, 4e-3


def train(name: str) -> Net:
    reach, _, seed = name.partition("-")
    torch.manual_seed(int(seed))
    net, gen, start = Net(reach), torch.Generator().manual_seed(int(seed)), time.process_time()
    images, label = pictures(PICTURES, seed=1)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS, pct_start=0.1)
    for step in range(STEPS):
        some = torch.randint(PICTURES, (BATCH,), generator=gen)
        error = F.cross_entropy(net(images[some]), label[some])
        optimiser.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 300 == 299:
            found = right(net.eval())
            net.train()
            print(
                f"{name} {step}: {error.item():.3f}, {found:.3f}, {time.process_time() - start:.0f} s",
                flush=True,
            )
    return net.eval()


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [f"{reach}-{seed}" for reach in CHANNELS for seed in range(3)]:
        net = train(name)
        kept = {n: p.half() if p.is_floating_point() else p for n, p in net.state_dict().items()}
        save_file({n: p.contiguous() for n, p in kept.items()}, WEIGHTS / f"turns-{name}.safetensors")
        print(name, sum(p.numel() for p in net.parameters()), "parameters,", right(net), flush=True)


if __name__ == "__main__":
    main()
