"""Trains the small operators of tests/convolution on flows (`navier_stokes.py`), a file of weights for each.

`python training/train_operators.py [NAME ...]` solves for 800 fields (10 seconds of one core), writes
tests/convolution/weights/operator-NAME.safetensors and prints what was found; FNO and T1 take two minutes
each.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.convolution import operators  # noqa: E402
from tilewise.convolution import T1  # noqa: E402
from training.navier_stokes import pairs  # noqa: E402

FIELDS, BATCH = 800, 32
# Steps and rate. Of FNO 3e-3 to 4e-2 and of T1 3e-3 to 8e-2 were tried. T1's steps are as many as take about
# as long as FNO's.
SETTINGS = {"fno": (1500, 4e-2), "t1": (4500, 6e-2), "fno-brief": (450, 4e-2), "t1-brief": (1300, 6e-2)}
OTHERS = (1500, 3e-3)


def symmetric(gen: torch.Generator, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A shift along the force's crests leaves the equation as it is: one more field for nothing."""
    by = int(torch.randint(x.shape[-1], (1,), generator=gen))
    return x.roll((by, -by), (2, 3)), y.roll((by, -by), (2, 3))


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    operators.WEIGHTS.mkdir(exist_ok=True)
    begun = time.process_time()
    fields, later = pairs(FIELDS, 0)
    print(f"{FIELDS} fields in {time.process_time() - begun:.0f} s", flush=True)
    for name in names or operators.OPERATORS:
        kind, seed = operators.seeded(name)
        torch.manual_seed(seed)
        gen = torch.Generator().manual_seed(seed)
        model, (steps, rate) = operators.OPERATORS[name](), SETTINGS.get(kind, OTHERS)
        if isinstance(model, T1):
            model.scale_to(fields, later)
        size = operators.count(model)
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
        begun = time.process_time()
        for step in range(steps):
            chosen = torch.randint(FIELDS, (BATCH,), generator=gen)
            x, y = symmetric(gen, fields[chosen], later[chosen])
            loss = operators.relative(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % 500 == 0 or step + 1 == steps:
                spent = time.process_time() - begun
                print(f"  {name} {step + 1}: {loss.item():.4f}, {spent:.0f} s", flush=True)
        path = operators.WEIGHTS / f"operator-{name}.safetensors"
        save_file({key: x.detach().half().contiguous() for key, x in model.state_dict().items()}, path)
        path.chmod(0o644)
        found = operators.error(operators.load(name))
        print(f"{name}: {size} parameters, error of fresh fields {found:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
