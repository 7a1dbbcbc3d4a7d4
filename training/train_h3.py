"""Trains the small models of tests/convolution that recall pairs: H3 and a plain diagonal state space.

    python training/train_h3.py            # both, half a minute of one core
    python training/train_h3.py h3-recall  # this

One thread, fixed seeds: the same machine and version of PyTorch give the same weights. Both see the same
sequences in
the same order, with one recipe: two pairs for the first quarter, then four. What is shipped is float16 and
says its configuration.
"""

from __future__ import annotations

import math
import sys
import time

import torch
from torch.nn import functional as F
from train_recall import save

from tilewise.data.recall_tasks import IGNORE, accuracy, mqar
from tilewise.recurrence import ModelConfig, SequenceModel

STEPS, RATE, EXAMPLES, VOCABULARY = 400, 8e-3, 64, 32
HELD_OUT = 10**6  # seeds of the test begin below
# One layer each; the diagonal state space has eight times the states of H3's, as its channels are not
# multiplied.
MIXERS = {"h3-recall": ("h3", {"states": 8, "shift": 4, "head": 8}), "s4d-recall": ("s4d", {"states": 64})}


def train(mixer: str, options: dict[str, int]) -> SequenceModel:
    """The model, from random weights."""
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig(VOCABULARY, 32, (mixer,), {mixer: options}, hidden=64))
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.1)
    start = time.process_time()
    for step in range(STEPS):
        fall = 0.02 + 0.98 * math.cos(math.pi / 2 * step / STEPS) ** 2
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 30) * fall
        pairs = 2 if step < STEPS // 4 else 4
        tokens, targets = mqar(EXAMPLES, 4 * pairs, pairs, vocabulary=VOCABULARY, seed=HELD_OUT + step)
        logits, _ = model(tokens)
        asked = targets != IGNORE
        loss = F.cross_entropy(logits[asked], targets[asked])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == STEPS - 1:
            spent = time.process_time() - start
            print(f"{mixer} step {step} right {accuracy(logits, targets):.3f}, {spent:.0f} s", flush=True)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or MIXERS:
        save(chosen, train(*MIXERS[chosen]))
