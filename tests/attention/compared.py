"""What comparisons of methods share: real queries and keys, and controls of equal density."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import tilewise
from tilewise.attention import Plan, Share, Tiles, plan


@functools.lru_cache(maxsize=2)
def captured(n: int, layers: tuple[int, ...], skip: int = 0) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of some layers of the bundled language model, reading `n` bytes of its text from byte `skip` on."""
    from tilewise.models import capture, load_model

    model, tokenizer = load_model()
    text = (Path(tilewise.__file__).parent / "data/sample.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text[skip : skip + n + 8])["input_ids"][:n])
    return capture(model, tokens, layers=layers)


def least_share(made: Tiles, density: float, q: Tensor, k: Tensor, mask) -> Plan:
    """The plan of these stages at the least share of tiles, to a 256th, that is at least as dense."""
    low, high = 0, 256
    while high - low > 1:
        middle = (low + high) // 2
        enough = plan(replace(made, select=Share(middle / 256)), q, k, mask=mask).density >= density
        low, high = (low, middle) if enough else (middle, high)
    return plan(replace(made, select=Share(high / 256)), q, k, mask=mask)
