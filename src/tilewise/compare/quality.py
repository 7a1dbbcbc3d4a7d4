"""Quality: bits per byte, distance of the logits to the dense model's, and retrieval by teacher forcing."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tilewise.compare.material import Material
from tilewise.data import tasks

LOGITS = 1 << 27  # logits held for the comparison: 512 MiB of float32
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
GATE = 0.9  # a task is shown only when the dense model reaches this


def positions(material: Material) -> Tensor:
    """Positions whose logits are compared: all but the last, or evenly spaced ones for large vocabularies."""
    n = material.tokens.shape[1] - 1
    most = max(1, LOGITS // material.model.config.get_text_config().vocab_size)
    return torch.linspace(0, n - 1, min(n, most), device=material.device).long().unique()


@torch.inference_mode()
def log_probabilities(material: Material, at: Tensor) -> Tensor:
    """Float32 log-probabilities of the next token at positions `at`, `[len(at), vocabulary]`."""
    logits = material.model(input_ids=material.tokens, use_cache=False, logits_to_keep=at).logits[0]
    return logits.float().log_softmax(-1)


def fidelity(material: Material, at: Tensor, dense: Tensor, mine: Tensor) -> dict[str, float]:
    """Bits per byte; KL(dense || mine) in nats, mean and 99th percentile; share of equal top tokens."""
    target = material.tokens[0, at + 1].unsqueeze(1)
    bits = -mine.gather(1, target).mean().item() / math.log(2)
    kl = (dense.exp() * (dense - mine)).sum(-1).clamp(min=0)
    return {
        "bits_per_byte": bits / material.bytes_per_token,
        "kl_mean": kl.mean().item(),
        "kl_p99": torch.quantile(kl, 0.99).item(),
        "top1_agreement": (dense.argmax(-1) == mine.argmax(-1)).float().mean().item(),
    }


@dataclass(frozen=True)
class Question:
    """One example of a task: its tokens, its answers as token ranges, and where it stands in the heat map."""

    task: str
    length: int
    depth: float | None
    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    depths: tuple[float, ...]


def questions(material: Material, wanted: tuple[str, ...], seed: int) -> list[Question]:
    """The retrieval examples for this model: half and all of 4,096 tokens, or of what the context allows."""
    longest = min(4096, material.tokens.shape[1], material.context)
    made = []
    for length in (longest // 2, longest):
        size = int(length * (1.0 if material.bytes_per_token == 1 else material.bytes_per_token * 0.8))
        if "recall" in wanted and size >= 256:
            for number in range(2):
                example = tasks.recall(size, seed + number)
                made.append(question(material, "recall", length, example, tasks.far(example)))
        if "passkey" in wanted and size >= 256:
            for number, depth in enumerate(DEPTHS * 2):
                example = tasks.passkey(size, seed + number, depth, filler=material.filler)
                made.append(question(material, "passkey", length, example, example.spans, depth))
    return [q for q in made if len(q.tokens) <= material.context and q.answers]


def question(
    material: Material, task: str, length: int, example: tasks.Example, spans, depth: float | None = None
) -> Question:
    """An example in the model's tokens; `spans` are the answers asked for, `depth` where they all stand, or
    None."""
    text = example.text.decode("ascii")
    encoded = material.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    where = dict(zip(example.spans, example.distances))
    answers, depths = [], []
    for span in spans:
        first, last = (bisect.bisect_left(starts, place) for place in span)
        if 0 < first < last:
            answers.append((first, last))
            depths.append((span[0] - where[span]) / len(example.text) if depth is None else depth)
    return Question(task, length, depth, tuple(encoded["input_ids"]), tuple(answers), tuple(depths))


@torch.inference_mode()
def answer(material: Material, question: Question) -> list[bool]:
    """Whether each answer is right: every token of it the most likely one, given the text before."""
    tokens = torch.tensor([question.tokens], device=material.device)
    wanted = sorted({i - 1 for first, last in question.answers for i in range(first, last)})
    at = torch.tensor(wanted, device=material.device)
    logits = material.model(input_ids=tokens, use_cache=False, logits_to_keep=at).logits[0]
    guessed = dict(zip(wanted, (logits.argmax(-1) == tokens[0, at + 1]).tolist()))
    return [all(guessed[i - 1] for i in range(first, last)) for first, last in question.answers]


@dataclass
class Score:
    """Right and wrong answers of one method, by task, and by length and depth."""

    right: dict[str, list[bool]] = field(default_factory=dict)
    cells: dict[tuple[str, int, float], list[bool]] = field(default_factory=dict)

    def add(self, question: Question, results: list[bool]) -> None:
        self.right.setdefault(question.task, []).extend(results)
        for depth, result in zip(question.depths, results):
            bin_ = min(round(depth * 4) / 4, 1.0)  # the five depths of the heat map
            self.cells.setdefault((question.task, question.length, bin_), []).append(result)

    def forget(self, task: str) -> None:
        """Drop a task that means nothing for this model."""
        del self.right[task]

    def tasks(self) -> dict[str, dict[str, float]]:
        return {task: wilson(sum(right), len(right)) for task, right in self.right.items()}

    def heatmap(self, method: str) -> Iterator[dict[str, Any]]:
        for task in self.right:
            cells = [
                {"length": length, "depth": depth, "accuracy": sum(right) / len(right), "n": len(right)}
                for (name, length, depth), right in sorted(self.cells.items())
                if name == task
            ]
            yield {"method": method, "task": task, "cells": cells}


def wilson(right: int, n: int, z: float = 1.96) -> dict[str, float]:
    """Accuracy with Wilson's 95 % interval."""
    p = right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return {
        "accuracy": p,
        "low": max(0.0, (centre - half) / scale),
        "high": min(1.0, (centre + half) / scale),
        "n": n,
    }
