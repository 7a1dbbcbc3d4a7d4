"""Recall of pairs by token, generated to a seed: what decides between fixed states and caches."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # the target of a place that is not scored, as cross_entropy has it


def mqar(
    examples: int,
    length: int,
    pairs: int,
    *,
    vocabulary: int = 256,
    seed: int = 0,
    power: float | None = None,
    gap: int = 0,
    writes: int = 1,
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Arora et al., 2023, Zoology, arXiv 2312.04927).

    A sequence opens with `pairs` different keys, each followed by its value; then every key is asked for once, at
    random places, and is to be answered with its value. What stands between is token 0.

        k1 v1 k2 v2 0 0 k2 0 0 0 k1 0        is asked    . . . . . . v2 . . . v1 .

    Args:
        examples: sequences made. length: of each, at least `2 * pairs * (writes + 1) + gap`. pairs: of a sequence.
        vocabulary: tokens, 0 included; the lower half are keys, the upper half values.
        seed: equal seeds give equal sequences.
        power: of the law by which the distances from the pairs to the questions fall, `distance ** (power - 1)`;
            0.01 in the paper, where most questions come soon. None asks everywhere alike.
        gap: tokens 0 between the pairs and the first question.
        writes: how often each key is told, all in a random order and each time with a value drawn anew; the last
            is the answer. 1 in the paper.

    Returns:
        Tokens and targets, int64 `[examples, length]`; a target is IGNORE except at questions.

    Differs from the paper's generator in what fills the places between: always 0, never random tokens.

    Raises ValueError for sizes that do not fit.
    """
    for name, value in (("examples", examples), ("pairs", pairs), ("writes", writes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    told, least = pairs * writes, 2 * pairs * (writes + 1) + gap
    if gap < 0 or length < least:
        raise ValueError(
            f"length must be at least 2 * pairs * (writes + 1) + gap, {least}, got {length}, gap {gap}"
        )
    half = vocabulary // 2
    if pairs > half - 1:
        raise ValueError(f"vocabulary must hold {pairs} keys in its lower half, got {vocabulary} tokens")
    generator = torch.Generator().manual_seed(seed)

    def drawn(choices: int, weights: Tensor | None = None) -> Tensor:
        """`pairs` different numbers below `choices` for each example."""
        if weights is None:
            return torch.rand(examples, choices, generator=generator).argsort(1)[:, :pairs]
        return torch.multinomial(weights.expand(examples, -1), pairs, generator=generator)

    keys = 1 + drawn(half - 1)
    if writes == 1:  # values differ as well, as in the paper
        order, values = torch.arange(pairs).expand(examples, -1), half + drawn(vocabulary - half)
    else:
        order = torch.rand(examples, told, generator=generator).argsort(1) % pairs
        values = torch.randint(half, vocabulary, (examples, told), generator=generator)
    tokens = torch.zeros(examples, length, dtype=torch.int64)
    tokens[:, 0 : 2 * told : 2], tokens[:, 1 : 2 * told : 2] = keys.gather(1, order), values
    same = order.unsqueeze(1) == torch.arange(pairs).unsqueeze(1)  # [examples, pairs, told]
    answers = values.gather(1, (same * torch.arange(1, told + 1)).argmax(2))
    start = 2 * told + gap
    slots = (length - start) // 2
    law = None if power is None else torch.arange(1.0, slots + 1) ** (power - 1)
    places = start + 2 * drawn(slots, law)
    targets = torch.full_like(tokens, IGNORE)
    return tokens.scatter(1, places, keys), targets.scatter(1, places, answers)


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """The share of questions whose likeliest answer is right; `logits [B, N, V]`, `targets [B, N]`."""
    asked = targets != IGNORE
    return (logits.argmax(-1) == targets)[asked].double().mean().item()


def recall_after_forgetting(
    examples: int, pairs: int, *, resets: int = 2, groups: int = 2, vocabulary: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Recall of pairs some of which were told to be forgotten, a group of keys at a time.

    A sequence is `pairs` keys with their values, each key belonging to one of `groups` by its number, and among the
    pairs `resets` tokens, each of which forgets what was told before it of one group. Then every key is asked for,
    in random order: the answer is its value, or token 0 if it was forgotten. A memory has to forget a part of
    itself at one token and keep the rest.

    Args:
        examples, pairs, resets, groups: numbers. vocabulary: tokens; 0 is "forgotten", then one reset for each
            group, then keys (group g has every groups-th) up to the middle, values from there on.
        seed: equal seeds give equal sequences.

    Returns:
        Tokens and targets, int64 `[examples, 3 * pairs + resets]`; a target is IGNORE except at questions.

    Raises ValueError for sizes that do not fit.
    """
    half = vocabulary // 2
    keys_known = half - 1 - groups
    if min(examples, pairs, groups) < 1 or resets < 0 or pairs > keys_known:
        raise ValueError(
            f"pairs must lie between 1 and the {keys_known} keys of the vocabulary, and examples and groups be at"
            f" least 1, got {pairs}, {examples} and {groups}"
        )
    generator = torch.Generator().manual_seed(seed)

    def shuffled(n: int) -> Tensor:
        return torch.rand(examples, n, generator=generator).argsort(1)

    numbers = shuffled(keys_known)[:, :pairs]
    values = torch.randint(half, vocabulary, (examples, pairs), generator=generator)
    which = torch.randint(groups, (examples, resets), generator=generator)
    after = torch.randint(1, pairs + 1, (examples, resets), generator=generator).sort(1).values
    # Pairs and resets in one stream: pair j stands behind the resets that come after fewer than j + 1 pairs.
    passed = (after.unsqueeze(1) <= torch.arange(pairs).view(1, -1, 1)).sum(2)  # [examples, pairs]
    told = 2 * torch.arange(pairs) + passed
    tokens = torch.zeros(examples, 3 * pairs + resets, dtype=torch.int64)
    tokens.scatter_(1, told, 1 + groups + numbers).scatter_(1, told + 1, values)
    tokens.scatter_(1, 2 * after + torch.arange(resets), 1 + which)
    same = (numbers % groups).unsqueeze(2) == which.unsqueeze(1)
    forgotten = (same & (after.unsqueeze(1) > torch.arange(pairs).view(1, -1, 1))).any(2)
    answers = values.masked_fill(forgotten, 0)
    order, start = shuffled(pairs), 2 * pairs + resets
    targets = torch.full_like(tokens, IGNORE)
    tokens[:, start:] = 1 + groups + numbers.gather(1, order)
    targets[:, start:] = answers.gather(1, order)
    return tokens, targets


def registers(
    examples: int,
    length: int,
    *,
    count: int = 3,
    apart: tuple[int, int] = (4, 8),
    vocabulary: int = 64,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Registers that are written again and again and asked for soon after: a memory must know at once what changed.

    A sequence is pairs of tokens: a register and its new value, or a register and token 0, which asks for what was
    last written to it. Four pairs in ten ask for a register that was last written between `apart[0]` and `apart[1]`
    tokens ago, if there is one; the others write.

        r1 v1 r1 v2 r2 v3 r1 0 r2 0        is asked    . . . . . . v2 . v3 .

    Args:
        examples: sequences made. length: of each, even. count: registers, tokens 1 to `count`. apart: as above;
            what was written just now is also seen by a short convolution.
        vocabulary: tokens; values are its upper half.
        seed: equal seeds give equal sequences.

    Returns:
        Tokens and targets, int64 `[examples, length]`; a target is IGNORE except at questions.

    Raises ValueError for sizes that do not fit.
    """
    half = vocabulary // 2
    least, most = apart
    if examples < 1 or not 2 <= least <= most or length < 2 or length % 2 or not 1 <= count < half:
        raise ValueError(
            f"examples must be at least 1, apart 2 or more and rising, length even, count between 1 and {half - 1},"
            f" the vocabulary's lower half without 0, got {examples}, {apart}, {length} and {count}"
        )
    gen, rows = torch.Generator().manual_seed(seed), torch.arange(examples)
    written = torch.full((examples, count), -most - 1)
    held = torch.zeros(examples, count, dtype=torch.int64)
    tokens = torch.zeros(examples, length, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE)
    for place in range(0, length, 2):
        recent = (place - written >= least) & (place - written <= most)
        ask = (torch.rand(examples, generator=gen) < 0.4) & recent.any(1)
        read = (torch.rand(examples, count, generator=gen) * recent).argmax(1)
        which = torch.where(ask, read, torch.randint(count, (examples,), generator=gen))
        new = torch.randint(half, vocabulary, (examples,), generator=gen)
        tokens[:, place], tokens[:, place + 1] = 1 + which, new.masked_fill(ask, 0)
        targets[:, place] = torch.where(ask, held[rows, which], IGNORE)
        written[rows, which] = torch.where(ask, written[rows, which], place)
        held[rows, which] = torch.where(ask, held[rows, which], new)
    return tokens, targets
