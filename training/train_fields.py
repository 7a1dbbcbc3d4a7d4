"""Fits the small networks of tests/convolution/fields.py to pictures and prints what was found.

`python training/train_fields.py table [PICTURE ...]`: every kind at two or three depths and two rates, once.
`python training/train_fields.py keep [KIND ...]`: three seeds at the settings of `BEST`, written for the tests.
Ten seconds of one core for each fit. All see the same four fifths of the pixels as often. docs/spectral.md has
the figures.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.convolution import fields  # noqa: E402

STEPS, BATCH = 1200, 4096
RATES = {"features": (4e-3, 1e-2), "grids": (4e-3, 1e-2)}
DEPTHS = {"features": (2,), "grids": (2,)}
# Depth and rate that came out best over the pixels seen, by picture.
BEST: dict[str, dict[str, tuple[int, float]]] = {
    "nstr": {"rings": (2, 2e-3), "bent": (2, 2e-3)},
    "siren": {"rings": (2, 2e-3), "bent": (2, 4e-3)},
}
BEST["shifted"] = BEST["nstr"]


def fit(
    kind: str, image: str, layers: int, rate: float, seed: int = 0, transport: float = 0.0, steps: int = STEPS
) -> torch.nn.Module:
    """A network fitted by Adam, the rate falling to nothing. transport: weight of NSTR's regulariser."""
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    model, seen = fields.made(kind, layers), torch.nonzero(~fields.held_out()).flatten()
    where, want = fields.places()[seen], fields.picture(image)[seen]
    groups = model.groups(rate) if hasattr(model, "groups") else model.parameters()
    optimizer = torch.optim.Adam(groups, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(seen), (BATCH,), generator=gen)
        loss = (model(where[chosen])[:, 0] - want[chosen]).square().mean()
        if transport:
            loss = loss + transport * model.transport(torch.rand(BATCH // 4, 2, generator=gen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def report(
    kind: str, image: str, layers: int, rate: float, seed: int = 0, **options: float
) -> torch.nn.Module:
    begun = time.process_time()
    model, gone = fit(kind, image, layers, rate, seed, **options), fields.held_out()
    seen, unseen = (fields.decibels(model, image, which) for which in (~gone, gone))
    print(
        f"{image} {kind}, {layers} layers, rate {rate:g}, seed {seed}{options or ''}: {fields.size(model)}"
        f" parameters, {time.process_time() - begun:.0f} s, {seen:.1f} dB seen, {unseen:.1f} not seen",
        flush=True,
    )
    return model


def keep(kinds: list[str]) -> None:
    for kind in kinds or BEST:
        for image, (layers, rate) in BEST[kind].items():
            for seed in fields.SEEDS:
                model = report(kind, image, layers, rate, seed)
                state = {name: x.contiguous() for name, x in model.state_dict().items()}
                path = fields.WEIGHTS / f"field-{image}-{kind}-{seed}.safetensors"
                save_file(state | {"layers": torch.tensor(layers)}, path)


def table(images: list[str]) -> None:
    for image in images or fields.DRAWN + fields.PHOTOGRAPHS + fields.SLANTED:
        for kind in ("nstr", "shifted", "siren", "features", "grids"):
            for layers in DEPTHS.get(kind, (2, 3) if image in fields.DRAWN else (3, 4, 5)):
                for rate in RATES.get(kind, (2e-3, 4e-3)):
                    report(kind, image, layers, rate)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"keep": keep, "table": table}[sys.argv[1]](sys.argv[2:])
