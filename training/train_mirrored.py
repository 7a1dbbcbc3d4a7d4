"""Trains the nets of tests/recurrence/mirrored.py: with the operator, and with a part of it missing.

`python training/train_mirrored.py [REACH-SEED ...]` writes
tests/recurrence/weights/mirrored-REACH-SEED.safetensors; 10 to 25 seconds of one core each. Nets of one seed
see the same pictures in the same order, none of them twice.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.recurrence.mirrored import CHANNELS, WEIGHTS, Net, pictures, right  # noqa: E402
from training import small  # noqa: E402

STEPS, BATCH, SEEDS = 600, 64, 3
RATE = 4e-3  # the best of 1e-3, 4e-3 and 1.6e-2 for kernels alone, tried on pictures of 12 x 12
FAR = 10**9  # seeds of training begin here


def train(name: str) -> Net:
    reach, _, seed = name.partition("-")
    torch.manual_seed(int(seed))
    net, step = Net(reach), iter(range(STEPS))

    def error() -> Tensor:
        images, label = pictures(BATCH, FAR + STEPS * int(seed) + next(step))
        return F.cross_entropy(net(images), label)

    small.train(name, net, error, STEPS, RATE, betas=(0.9, 0.999))
    return net.eval()


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [f"{reach}-{seed}" for reach in CHANNELS for seed in range(SEEDS)]:
        net = train(name)
        kept = {n: p.half() if p.is_floating_point() else p for n, p in net.state_dict().items()}
        save_file({n: p.contiguous() for n, p in kept.items()}, WEIGHTS / f"mirrored-{name}.safetensors")
        print(name, sum(p.numel() for p in net.parameters()), "parameters,", right(net), flush=True)


if __name__ == "__main__":
    main()
