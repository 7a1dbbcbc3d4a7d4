"""Small models with memories that learn as they read, and what they are measured against.

`training/train_memories.py` trains them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.recurrence.decays import BYTES, WEIGHTS
from tilewise.recurrence import TNT, LaCT, ModelConfig, SequenceModel

WIDTH = 32
TEXT = 512  # bytes of a piece of text in training
PAIRS, KEYS, VALUES = 32, 32, 16  # of a stream, and of what it is made
SHARD = 16
TWO_SCALES: dict[str, Any] = {"memories": 1, "far": SHARD, "near": (4,), "shard": SHARD, "rate": 4.0}
REFINED = (1,)  # chunks of TNT's second stage

# Mixers and their settings. Those of TNT recall from streams, one layer; those of LaCT read text, two layers.
# "tnt-refined" and "tnt-longer" went on from "tnt".
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tnt": ("tnt", TWO_SCALES),
    "tnt-plain": (
        "tnt",
        TWO_SCALES | {"far": None, "shard": None},
    ),  # one memory of small chunks, never reset
    "tnt-no-near": ("tnt", TWO_SCALES | {"near": ()}),
    "tnt-no-far": ("tnt", TWO_SCALES | {"far": None}),
    "tnt-no-projection": ("tnt", TWO_SCALES | {"project": False}),
    "lact-16": ("lact", {"chunk": 16, "window": 16, "rate": 0.1}),
    "lact-64": ("lact", {"chunk": 64, "window": 16, "rate": 0.1}),
    "lact-256": ("lact", {"chunk": 256, "window": 16, "rate": 0.1}),
    "lact-none": ("lact", {"chunk": 64, "window": 16, "rate": 0.1}),  # its memory is never heard
}


def built(name: str) -> SequenceModel:
    """Untrained."""
    kind, options = SETTINGS[name.removesuffix("-refined").removesuffix("-longer")]
    vocabulary, layers = (KEYS + VALUES, 1) if kind == "tnt" else (BYTES, 2)
    model = SequenceModel(ModelConfig(vocabulary, WIDTH, (kind,) * layers, {kind: options}, 2 * WIDTH))
    return silenced(model) if name == "lact-none" else model


def streams(count: int, gen: torch.Generator, pairs: int = PAIRS) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of key and value, one after the other: tokens, targets and distances, int64 `[count, 2 * pairs]`.

    Half of the keys are new and get a value drawn at random. The others were told before, half of these among the
    last four new ones: their value is the target at the key, and the distance is how many tokens ago it was told.
    Elsewhere the target is -100 and the distance 0.
    """
    tokens = torch.zeros(count, 2 * pairs, dtype=torch.int64)
    targets, distances = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    draws = torch.rand(count, pairs, 4, generator=gen).tolist()
    order = torch.rand(count, KEYS, generator=gen).argsort(1).tolist()
    for b in range(count):
        told: list[tuple[int, int, int]] = []  # key, value, where
        for i, (kind, near, which, value) in enumerate(draws[b]):
            if told and (kind < 0.5 or len(told) == KEYS):
                among = told[-4:] if near < 0.5 else told
                key, answer, where = among[int(which * len(among))]
                targets[b, 2 * i], distances[b, 2 * i] = answer, 2 * i - where
            else:
                key, answer = order[b][len(told)], KEYS + int(value * VALUES)
                told.append((key, answer, 2 * i))
            tokens[b, 2 * i], tokens[b, 2 * i + 1] = key, answer
    return tokens, targets, distances


@torch.no_grad()
def recalled(model: SequenceModel, count: int = 200, pairs: int = PAIRS) -> dict[str, float]:
    """Shares of right answers on fresh streams: of what was told in the same shard, and in earlier ones."""
    tokens, targets, distances = streams(count, torch.Generator().manual_seed(99), pairs)
    right = model(tokens)[0].argmax(-1) == targets
    places = torch.arange(tokens.shape[1])
    same = (places - distances) // SHARD == places // SHARD
    asked = targets >= 0
    return {
        name: float(right[asked & part].double().mean())
        for name, part in (("here", same), ("before", ~same), ("all", asked))
    }


def silenced(model: SequenceModel) -> SequenceModel:
    """The same model of LaCT, in which memories say nothing, and learn nothing in training."""
    for block in model.blocks:
        assert isinstance(block.mixer, LaCT)
        for part in block.mixer.share.parameters():
            part.detach().zero_()
            part.requires_grad_(False)
    return model


def refine(model: SequenceModel, near: tuple[int, ...] = REFINED) -> SequenceModel:
    """The same model of TNT, its local memories learning in other chunks from now on."""
    for block in model.blocks:
        assert isinstance(block.mixer, TNT)
        block.mixer.refine(near)
    return model


def load(name: str) -> SequenceModel:
    """The trained model."""
    from safetensors.torch import load_file

    model = built(name)
    found = {key: x.float() for key, x in load_file(Path(WEIGHTS) / f"{name}.safetensors").items()}
    model.load_state_dict({"head.weight": found["embedding.weight"]} | found)
    return (refine(model) if name.endswith("-refined") else model).eval()
