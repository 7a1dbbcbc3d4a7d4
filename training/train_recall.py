"""Trains the small models of tests/recurrence that recall pairs and choose what they keep, and their controls.

    python training/train_recall.py            # all of them, about five minutes of one core
    python training/train_recall.py kda-fine   # these

One thread, fixed seeds: the same machine and version of PyTorch give the same weights. A model and its control see
the same sequences in the same order, with one recipe. What is shipped is float16 and says its configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tilewise.data.recall_tasks import IGNORE, accuracy, mqar, recall_after_forgetting
from tilewise.data.selection_tasks import induction, selective_copying
from tilewise.recurrence import ModelConfig, SequenceModel

WEIGHTS = Path(__file__).parent.parent / "tests/recurrence/weights"
TOKENS = 2048  # a step
HELD_OUT = 10**9  # seeds of the test begin below, of training far from it


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Sequences of one kind, made from a number and a seed."""

    make: Callable[[int, int], tuple[Tensor, Tensor]]
    length: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A model and its lessons, from easy to hard: one is left when 95 % are right over ten steps."""

    config: ModelConfig
    lessons: tuple[Lesson, ...]
    steps: int
    rate: float = 4e-3
    seed: int = 0
    climb: float = 1.0  # the share of the steps after which the hardest lesson is given, whatever was learned


def pairs(count: int, gap: int = 0, writes: int = 1, vocabulary: int = 128) -> Lesson:
    """A lesson of `mqar`."""
    length = 2 * count * (writes + 1) + gap

    def make(examples: int, seed: int) -> tuple[Tensor, Tensor]:
        return mqar(examples, length, count, seed=seed, gap=gap, writes=writes, vocabulary=vocabulary)

    return Lesson(make, length)


def forgetting(count: int, resets: int) -> Lesson:
    """A lesson of `recall_after_forgetting`."""

    def make(examples: int, seed: int) -> tuple[Tensor, Tensor]:
        return recall_after_forgetting(examples, count, resets=resets, seed=seed)

    return Lesson(make, 3 * count + resets)


def copying(length: int, kept: int) -> Lesson:
    """A lesson of `selective_copying`."""

    def make(examples: int, seed: int) -> tuple[Tensor, Tensor]:
        return selective_copying(examples, length, kept, seed=seed)

    return Lesson(make, length + kept)


def inducing(length: int) -> Lesson:
    """A lesson of `induction`."""

    def make(examples: int, seed: int) -> tuple[Tensor, Tensor]:
        return induction(examples, length, seed=seed)

    return Lesson(make, length)


def one(mixer: str, **options) -> ModelConfig:
    """A layer of width 32 over 128 tokens, with one head: a state of 32 x 32."""
    return ModelConfig(128, 32, (mixer,), {mixer: {"heads": 1, **options}}, hidden=64)


def told(mixer: str, rate: float, seed: int, **options) -> Run:
    """Pairs told once, up to 64, at the best rate for the mixer of those tried with another seed: 1e-2 and 2e-2
    for DeltaNet, and 4e-2 besides for linear attention."""
    config = dataclasses.replace(one(mixer, **options), vocabulary=256)
    return Run(config, TOLD, 3000, rate, seed, climb=0.4)


def two_of_mamba(**options) -> ModelConfig:
    """Two layers of width 32 over 16 tokens, without channel mixers, as in the paper."""
    return ModelConfig(16, 32, ("mamba", "mamba"), {"mamba": options}, hidden=0)


RETOLD = tuple(pairs(count, writes=2) for count in (4, 8, 16))
EASIER = (pairs(1, writes=2), pairs(2, writes=2), *RETOLD)
RESETS = (forgetting(4, 1), forgetting(8, 2), forgetting(14, 4))
TOLD = tuple(pairs(count, vocabulary=256) for count in (2, 4, 8, 16, 32, 64))
SEEDS = range(3)

COPYING = (copying(8, 2), copying(16, 4), copying(32, 8), copying(48, 8))
INDUCING = (inducing(8), inducing(32), inducing(128), inducing(512))

RUNS: dict[str, Run] = {
    "delta-retold": Run(one("delta-net"), RETOLD, 900),
    "add-retold": Run(one("delta-net", rule="add"), RETOLD, 900),
    "gla-retold": Run(one("gla", key=1.0, conv=4), EASIER, 2500),  # it is slower to learn
    "kda-fine": Run(dataclasses.replace(one("kda"), vocabulary=64), RESETS, 1200),
    "kda-coarse": Run(dataclasses.replace(one("kda", fine=False), vocabulary=64), RESETS, 1200),
    "mamba-copying": Run(two_of_mamba(), COPYING, 2000),
    "invariant-copying": Run(two_of_mamba(selective=False), COPYING, 2000),
    "mamba-induction": Run(two_of_mamba(), INDUCING, 2000),
    "invariant-induction": Run(two_of_mamba(selective=False), INDUCING, 2000),
    **{f"delta-told-{seed}": told("delta-net", 2e-2, seed) for seed in SEEDS},
    **{f"linear-told-{seed}": told("linear", 2e-2, seed, conv=4) for seed in SEEDS},
}


def train(name: str, run: Run) -> SequenceModel:
    """The model of a run, from random weights."""
    torch.manual_seed(run.seed)
    model = SequenceModel(run.config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=run.rate, betas=(0.9, 0.98), weight_decay=0.1)
    start, at, right = time.process_time(), 0, deque([0.0], 10)
    for step in range(run.steps):
        share = step / run.steps
        for group in optimiser.param_groups:
            group["lr"] = (
                run.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * math.cos(math.pi / 2 * share) ** 2)
            )
        if share >= run.climb:
            at = len(run.lessons) - 1
        lesson = run.lessons[at]
        tokens, targets = lesson.make(
            max(12, min(128, TOKENS // lesson.length)), HELD_OUT + run.seed * 10**5 + step
        )
        logits, _ = model(tokens)
        asked = targets != IGNORE
        loss = F.cross_entropy(logits[asked], targets[asked])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        right.append(accuracy(logits, targets))
        if step % 100 == 0 or step == run.steps - 1:
            spent = time.process_time() - start
            print(f"{name} step {step} lesson {at} right {right[-1]:.3f}, {spent:.0f} s", flush=True)
        if min(right) > 0.9 and sum(right) > 9.5 and at + 1 < len(run.lessons):
            at, right = at + 1, deque([0.0], 10)
    return model


def save(name: str, model: SequenceModel) -> None:
    """Write its weights in float16 and its configuration."""
    WEIGHTS.mkdir(exist_ok=True)
    named = dict(model.named_parameters())  # each once: tied weights have one name
    config = json.dumps(dataclasses.asdict(model.config), sort_keys=True)
    save_file({key: x.detach().half().contiguous() for key, x in named.items()}, WEIGHTS / f"{name}.safetensors",
              {"config": config})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], help="runs; all when none is given")
    torch.set_num_threads(1)
    for name in parser.parse_args().names or RUNS:
        save(name, train(name, RUNS[name]))


if __name__ == "__main__":
    main()
