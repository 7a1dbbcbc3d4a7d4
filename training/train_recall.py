"""Trains the small models of tests/recurrence that recall pairs, and their controls.

    python training/train_recall.py            # all of them, about MINUTES minutes of one core
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
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tilewise.data.recall_tasks import IGNORE, accuracy, mqar, recall_after_forgetting
from tilewise.recurrence import ModelConfig, SequenceModel, infinite_vl, kimi_linear

WEIGHTS = Path(__file__).parent.parent / "tests/recurrence/weights"
HELD_OUT = 10**9  # seeds of the test begin below, of training far from it


@dataclasses.dataclass(frozen=True)
class Run:
    """A model, its lessons from easy to hard (equal shares of the first 80 % of the steps), and how it learns."""

    config: ModelConfig
    lessons: tuple[Callable[[int, int], tuple[Tensor, Tensor]], ...]
    steps: int
    batch: int = 32
    rate: float = 4e-3


def pairs(count: int, **options) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """A lesson of `mqar`."""
    length = 2 * count * (options.get("writes", 1) + 1) + options.get("gap", 0)
    return lambda examples, seed: mqar(examples, length, count, seed=seed, **options)


def forgetting(count: int, resets: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """A lesson of `recall_after_forgetting`."""
    return lambda examples, seed: recall_after_forgetting(examples, count, resets=resets, seed=seed)


def one(mixer: str, **options) -> ModelConfig:
    """A layer of width 32 over 128 tokens, with one head: a state of 32 x 32."""
    return ModelConfig(128, 32, (mixer,), {mixer: {"heads": 1, **options}}, hidden=64)


RETOLD = tuple(pairs(count, vocabulary=128, writes=2) for count in (4, 8, 16))
ONCE = tuple(pairs(count, vocabulary=128) for count in (4, 8, 16, 24))
RESETS = (forgetting(4, 1), forgetting(6, 2), forgetting(8, 2))
FAR = tuple(pairs(4, vocabulary=128, gap=gap) for gap in (0, 32, 96))
MANY = tuple(pairs(count, vocabulary=128) for count in (4, 8, 16, 32))
LOCAL = {"heads": 2, "window": 16}

RUNS: dict[str, Run] = {
    "delta-retold": Run(one("delta-net"), RETOLD, 900),
    "add-retold": Run(one("delta-net", rule="add"), RETOLD, 900),
    "gla-retold": Run(one("gla", key=1.0, conv=4), RETOLD, 900),
    "delta-once": Run(one("delta-net"), ONCE, 900),
    "add-once": Run(one("delta-net", rule="add"), ONCE, 900),
    "gla-once": Run(one("gla", key=1.0, conv=4), ONCE, 900),
    "kda-fine": Run(dataclasses.replace(one("kda"), vocabulary=64), RESETS, 1200),
    "kda-coarse": Run(dataclasses.replace(one("kda", fine=False), vocabulary=64), RESETS, 1200),
    "infinite-vl": Run(infinite_vl(128, 32, heads=2, window=16), FAR, 400, 16),
    "infinite-window": Run(
        ModelConfig(128, 32, ("sliding-window",) * 4, {"sliding-window": LOCAL}), FAR, 400, 16
    ),
    "kimi-linear": Run(kimi_linear(128, 32, heads=4), MANY, 800, 16),
    "kimi-kda": Run(ModelConfig(128, 32, ("kda",) * 4, {"kda": {"heads": 4}}), MANY, 800, 16),
}


def train(name: str, run: Run) -> SequenceModel:
    """The model of a run, from random weights."""
    torch.manual_seed(0)
    model = SequenceModel(run.config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=run.rate, betas=(0.9, 0.98), weight_decay=0.1)
    start = time.process_time()
    for step in range(run.steps):
        share = step / run.steps
        for group in optimiser.param_groups:
            group["lr"] = (
                run.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * math.cos(math.pi / 2 * share) ** 2)
            )
        lesson = run.lessons[min(int(share * 1.25 * len(run.lessons)), len(run.lessons) - 1)]
        tokens, targets = lesson(run.batch, HELD_OUT + step)
        logits, _ = model(tokens)
        asked = targets != IGNORE
        loss = F.cross_entropy(logits[asked], targets[asked])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == run.steps - 1:
            spent = time.process_time() - start
            print(
                f"{name} step {step} loss {loss:.3f} right {accuracy(logits, targets):.3f}, {spent:.0f} s",
                flush=True,
            )
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
