"""Train the small models of tests/recurrence/code_models.py: `python training/train_codes.py [NAME ...]`.

One thread, fixed seeds; about a minute of one core each. All see the same sequences in the same order: 2 to 8
pairs, asked for at once or up to 64 tokens later. Writes float16 weights, codewords among them.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.recurrence import code_models
from tilewise.data.recall_tasks import IGNORE

STEPS, TOKENS, RATE = 1500, 2048, 4e-3
GAPS, PAIRS = (0, 8, 16, 32, 64), (2, 4, 8)
FAR = 10**9  # seeds of training begin here


def train(name: str) -> None:
    torch.manual_seed(0)
    model, gen, began = code_models.built(name), torch.Generator().manual_seed(0), time.process_time()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(STEPS):
        fall = 0.02 + 0.98 * math.cos(math.pi / 2 * step / STEPS) ** 2
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * fall
        gap, pairs = (some[int(torch.randint(len(some), (), generator=gen))] for some in (GAPS, PAIRS))
        tokens, targets = code_models.drawn(gap, TOKENS // (4 * pairs + gap), FAR + step, pairs)
        asked = targets != IGNORE
        loss = F.cross_entropy(model(tokens)[0][asked], targets[asked])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 250 == 0:
            print(f"{name} {step} {loss.item():.3f} {time.process_time() - began:.0f} s", flush=True)
    kept = {key: x.half().contiguous() for key, x in model.state_dict().items() if key != "head.weight"}
    save_file(kept, code_models.WEIGHTS / f"codes-{name}.safetensors")
    model = code_models.load(name)
    print(
        name, [(gap, round(code_models.right(model, gap, 10**6), 3)) for gap in (0, 16, 64, 300)], flush=True
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or code_models.NAMES:
        train(chosen)
