"""Trains the small models of tests/recurrence/test_flash_rnn.py that follow finite machines, and their
controls.

    python training/train_state_tracking.py                 # all of them, some minutes of one core
    python training/train_state_tracking.py parity-slstm    # these

One thread, fixed seeds: the same machine and version of PyTorch give the same weights. All see words of at
most 40 symbols and are asked for the state after each; the controls get twice the layers and more steps. What
is shipped is float16 and says its configuration.
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
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.data.state_tracking import parity, permutations
from tilewise.recurrence import ModelConfig, SequenceModel

WEIGHTS = Path(__file__).parent.parent / "tests/recurrence/weights"
EXAMPLES, LENGTH = 64, 40
HELD_OUT = 10**9  # seeds of the test begin below, of training from here


@dataclasses.dataclass(frozen=True)
class Run:
    """A model and its machine; `cut` leaves out the recurrent weights of a gated network."""

    task: Callable[..., tuple[Tensor, Tensor]]
    config: ModelConfig
    steps: int
    rate: float = 5e-3
    cut: bool = False


def model_of(mixer: str, symbols: int, layers: int = 1, heads: int = 4) -> ModelConfig:
    """Layers of width 32 and channel mixers of 48."""
    return ModelConfig(symbols, 32, (mixer,) * layers, {mixer: {"heads": heads}}, hidden=48, tied=False)


RUNS: dict[str, Run] = {
    "parity-slstm": Run(parity, model_of("slstm", 2), 600),
    "parity-lstm": Run(parity, model_of("lstm", 2), 600),
    "parity-gru": Run(parity, model_of("gru", 2), 600),
    "parity-cut": Run(parity, model_of("slstm", 2), 600, cut=True),
    "parity-linear": Run(parity, model_of("linear", 2, layers=2), 900),
    "parity-gla": Run(parity, model_of("gla", 2, layers=2), 900),
    "permutations-slstm": Run(permutations, model_of("slstm", 6, heads=2), 1200),
    "permutations-gla": Run(permutations, model_of("gla", 6, layers=2, heads=2), 1200),
}


def train(name: str, run: Run) -> SequenceModel:
    """The model of a run, from random weights."""
    torch.manual_seed(0)
    model = SequenceModel(run.config)
    if run.cut:
        for block in model.blocks:
            nn.init.zeros_(block.mixer.weights).requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=run.rate, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.process_time()
    for step in range(run.steps):
        share = step / run.steps
        for group in optimiser.param_groups:
            group["lr"] = (
                run.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * math.cos(math.pi / 2 * share) ** 2)
            )
        words, states = run.task(EXAMPLES, LENGTH, seed=HELD_OUT + step)
        logits, _ = model(words)
        loss = F.cross_entropy(logits.flatten(0, 1), states.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        if step % 100 == 0 or step == run.steps - 1:
            right = (logits.argmax(-1) == states).double().mean().item()
            spent = time.process_time() - start
            print(f"{name} step {step} right {right:.3f}, {spent:.0f} s", flush=True)
    return model


def save(name: str, model: SequenceModel) -> None:
    """Write its weights in float16 and its configuration."""
    WEIGHTS.mkdir(exist_ok=True)
    config = json.dumps(dataclasses.asdict(model.config), sort_keys=True)
    kept = {key: x.detach().half().contiguous() for key, x in model.named_parameters()}
    save_file(kept, WEIGHTS / f"{name}.safetensors", {"config": config})


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
