"""Trains the small models of tests/recurrence/note_models.py: `python training/train_notes.py [KIND-SEED ...]`.

One thread, fixed seeds; half a minute each at most. All of one seed see the same sequences in the same order,
half of a batch facts and half registers. "refined" goes on from "coarse" with smaller chunks for a tenth of the
steps, in which only its local memory learns. Writes float16 weights.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.recurrence import note_models
from tilewise.data.recall_tasks import IGNORE
from tilewise.recurrence import TNT, SequenceModel

STEPS, BATCH, RATE, SEEDS = 500, 16, 8e-3, 3
STAGE_TWO = STEPS // 10
FAR = 10**9  # seeds of training begin here


def local_only(model: SequenceModel) -> None:
    """Gradients of all but the local memory's first weights and rates are dropped."""
    memory = model.blocks[0].mixer
    assert isinstance(memory, TNT)
    ends: dict[Tensor, int] = dict.fromkeys(
        (memory.gate, memory.up, memory.down), 1
    )  # of the global memory's
    ends |= dict.fromkeys((memory.rate.weight, memory.rate.bias), memory.memories)
    for parameter in model.parameters():
        if parameter not in ends:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad[: ends[parameter]] = 0


def train(name: str, steps: int = STEPS, rate: float = RATE) -> SequenceModel:
    kind, _, seed = name.partition("-")
    torch.manual_seed(int(seed))
    first = FAR + 10**6 * int(seed)
    model = note_models.built(kind)
    if kind == "refined":
        model = note_models.load(f"coarse-{seed}").train()
        note_models.refine(model)
        steps, first = STAGE_TWO, first + STEPS
    # No decay, which would change what gradients leave alone.
    optimiser = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98))
    began = time.process_time()
    for step in range(steps):
        fall = 0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, 10 * (step + 1) / steps) * fall
        loss = torch.zeros(())
        for lesson in (note_models.facts, note_models.rewritten):
            tokens, targets = lesson(BATCH, first + step)
            asked = targets != IGNORE
            loss = loss + F.cross_entropy(model(tokens)[0][asked], targets[asked]) / 2
        optimiser.zero_grad()
        loss.backward()
        if kind == "refined":
            local_only(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            told, written = note_models.right(model.eval(), seed=10**6, examples=100)
            model.train()
            spent = time.process_time() - began
            print(f"{name} {step}: {loss.item():.3f}, {told:.3f} {written:.3f}, {spent:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [f"{kind}-{seed}" for kind in note_models.SETTINGS for seed in range(SEEDS)]:
        model = train(name)
        kept = {key: x.half().contiguous() for key, x in model.state_dict().items() if key != "head.weight"}
        save_file(kept, note_models.WEIGHTS / f"notes-{name}.safetensors")
        told, written = note_models.right(note_models.load(name), seed=2 * 10**6)
        print(f"{name}: facts {told:.1%}, registers {written:.1%}", flush=True)


if __name__ == "__main__":
    main()
