"""Small models of LongVQ that recall pairs from afar, and two without a part of it: training/train_codes.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tilewise.data.recall_tasks import accuracy, mqar
from tilewise.recurrence import LongVQ, ModelConfig, SequenceModel

WEIGHTS = Path(__file__).parent / "weights"
VOCABULARY, PAIRS, WINDOW = 64, 8, 16


class NearOnly(LongVQ):
    """Attends to its window alone: a moving average and local attention."""

    def _to_words(self, q: Tensor, uses: Tensor) -> Tensor:
        return super()._to_words(q, torch.zeros_like(uses))


NAMES = ("whole", "flat", "near")


def built(name: str) -> SequenceModel:
    """Untrained, one layer of width 64: "whole", "flat" without the moving average, "near" without codewords."""
    options = {"codes": 64, "window": WINDOW, "structured": name != "flat"}
    model = SequenceModel(ModelConfig(VOCABULARY, 64, ("long-vq",), {"long-vq": options}, hidden=128))
    if name == "near":
        model.blocks[0].mixer.__class__ = NearOnly
    return model


def drawn(gap: int, examples: int, seed: int, pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    """Pairs, `gap` tokens of nothing, and a question for each pair."""
    return mqar(examples, 4 * pairs + gap, pairs, vocabulary=VOCABULARY, seed=seed, gap=gap)


@torch.no_grad()
def right(model: SequenceModel, gap: int, seed: int = 0, examples: int = 200) -> float:
    """The share of right answers."""
    tokens, targets = drawn(gap, examples, seed)
    return accuracy(model(tokens)[0], targets)


def load(name: str) -> SequenceModel:
    """The trained model."""
    from safetensors.torch import load_file

    model = built(name)
    found = {key: x.float() for key, x in load_file(WEIGHTS / f"codes-{name}.safetensors").items()}
    model.load_state_dict({"head.weight": found["embedding.weight"]} | found)
    return model.eval()
