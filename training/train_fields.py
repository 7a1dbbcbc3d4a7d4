"""Fits the small networks of tests/convolution/fields.py to photographs and prints what was found.

`python training/train_fields.py [NAME ...]`: up to half a minute of one core for each. All see the same four
fifths of the pixels as often. docs/spectral.md has the figures.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.convolution import fields  # noqa: E402

STEPS, BATCH = 1200, 4096
RATES = {"siren": 1e-3, "features": 5e-3}  # the others: 1e-2; not searched


def fit(name: str, image: str, rate: float, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    model, seen = fields.NETWORKS[name](), torch.nonzero(~fields.held_out()).flatten()
    where, want = fields.places()[seen], fields.picture(image)[seen]
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    weight = fields.TRANSPORT.get(name, 0.0)
    for _ in range(STEPS):
        chosen = torch.randint(len(seen), (BATCH,), generator=gen)
        loss = (model(where[chosen])[:, 0] - want[chosen]).square().mean()
        if weight:
            loss = loss + weight * model.transport(torch.rand(BATCH // 4, 2, generator=gen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for image in fields.IMAGES:
        for name in names or fields.NETWORKS:
            begun = time.process_time()
            model = fit(name, image, RATES.get(name, 1e-2))
            gone = fields.held_out()
            found = [fields.decibels(model, image, which) for which in (~gone, gone)]
            print(
                f"{image} {name}: {fields.size(model)} parameters, {time.process_time() - begun:.0f} s,"
                f" {found[0]:.2f} dB seen, {found[1]:.2f} dB not seen",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
