"""Tasks that ask a model to choose by content what it keeps, generated to a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.data.recall_tasks import IGNORE


def selective_copying(
    examples: int, length: int, kept: int, *, vocabulary: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Selective copying (after Arjovsky et al., 2016, and Gu and Dao, 2023, Mamba, arXiv 2312.00752).

    `kept` tokens stand at random places among noise, and are to be told in order at the end, where so many markers
    ask for them. Where they stand changes from sequence to sequence, so no fixed filter can gather them.

        0 b 0 0 a c 0 1 1 1     is asked    . . . . . . . b a c

    Args:
        examples: sequences made. length: places of tokens and noise, at least `kept`. kept: tokens to keep.
        vocabulary: tokens, of which 0 is noise and 1 asks. seed: equal seeds give equal sequences.

    Returns:
        Tokens and targets, int64 `[examples, length + kept]`; a target is IGNORE before the markers.

    Raises ValueError for sizes that do not fit.
    """
    _check(examples=examples, kept=kept)
    if length < kept:
        raise ValueError(f"length must be at least kept, {kept}, got {length}")
    if vocabulary < 4:
        raise ValueError(f"vocabulary must hold noise, a marker and two tokens at least, 4, got {vocabulary}")
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(examples, length, generator=generator).argsort(1)[:, :kept].sort(1).values
    told = torch.randint(2, vocabulary, (examples, kept), generator=generator)
    tokens = torch.zeros(examples, length + kept, dtype=torch.int64).scatter(1, places, told)
    tokens[:, length:] = 1
    targets = torch.full_like(tokens, IGNORE)
    targets[:, length:] = told
    return tokens, targets


def induction(examples: int, length: int, *, vocabulary: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Induction heads (Gu and Dao, 2023, Mamba, arXiv 2312.00752): what followed the special token before?

    Random tokens with token 0 once among them; at the end it comes again, and the answer is what followed it.

        c a b 0 d a c 0     is asked    . . . . . . . d

    Args:
        examples: sequences made. length: of each, at least 3. vocabulary: tokens, 0 being the special one.
        seed: equal seeds give equal sequences.

    Returns:
        Tokens and targets, int64 `[examples, length]`; a target is IGNORE except at the end.

    Raises ValueError for sizes that do not fit.
    """
    _check(examples=examples)
    if length < 3:
        raise ValueError(f"length must be at least 3, got {length}")
    if vocabulary < 3:
        raise ValueError(
            f"vocabulary must hold the special token and two others at least, 3, got {vocabulary}"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocabulary, (examples, length), generator=generator)
    place = torch.randint(0, length - 2, (examples, 1), generator=generator)
    tokens.scatter_(1, place, 0)
    tokens[:, -1] = 0
    targets = torch.full_like(tokens, IGNORE)
    targets[:, -1:] = tokens.gather(1, place + 1)
    return tokens, targets


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
