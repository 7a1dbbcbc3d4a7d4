"""State tracking: which state a machine is in after every symbol, generated to a seed."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def automaton(
    examples: int, length: int, table: Tensor, *, start: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random words and the states that a finite automaton passes on them.

    Which machines a network can follow, at lengths beyond those it was trained on, tells what its state can
    do (Delétang et al., 2022, arXiv 2207.02098; Merrill et al., 2024, arXiv 2404.08819).

    Args:
        examples: words made. length: symbols of each. table: int64 `[states, symbols]`, the state that each
            symbol leads to from each state. start: the state before the first symbol. seed: equal seeds give
            equal words, and a longer word begins with the shorter one.

    Returns:
        Symbols and, after each of them, the state: int64 `[examples, length]` both.

    Raises ValueError and TypeError for numbers and tables that do not fit.
    """
    for name, value, least in (("examples", examples, 1), ("length", length, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if not isinstance(table, Tensor) or table.dtype != torch.int64 or table.ndim != 2:
        raise TypeError("table must be an int64 tensor [states, symbols]")
    states, symbols = table.shape
    if not table.numel() or table.min() < 0 or table.max() >= states or not 0 <= start < states:
        raise ValueError(f"table and start must name states 0 to {states - 1}, got start {start}")
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(symbols, (length, examples), generator=generator)
    state, passed = torch.full((examples,), start), torch.empty_like(words)
    for t, symbol in enumerate(words):
        state = passed[t] = table[state, symbol]
    return words.T.contiguous(), passed.T.contiguous()


def parity(examples: int, length: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bits, and after each whether the number of ones so far is odd; shapes and errors as of `automaton`."""
    return modular_sum(examples, length, 2, seed=seed)


def modular_sum(examples: int, length: int, modulus: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digits below `modulus`, and after each their sum so far modulo it; shapes and errors as of
    `automaton`."""
    if not isinstance(modulus, int) or isinstance(modulus, bool) or modulus < 2:
        raise ValueError(f"modulus must be an integer >= 2, got {modulus!r}")
    digits = torch.arange(modulus)
    return automaton(examples, length, (digits.unsqueeze(1) + digits) % modulus, seed=seed)


def permutations(examples: int, length: int, things: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Permutations of some things, and after each what all so far amount to.

    A symbol or state is the number of a permutation in lexicographic order. Unlike in sums the order of the
    symbols counts. Shapes and errors as of `automaton`; `things` must lie between 2 and 6, whose `things!`
    permutations all come alike.
    """
    if not isinstance(things, int) or isinstance(things, bool) or not 2 <= things <= 6:
        raise ValueError(f"things must be an integer from 2 to 6, got {things!r}")
    every = list(itertools.permutations(range(things)))
    number = {permutation: i for i, permutation in enumerate(every)}
    rows = [[number[tuple(symbol[place] for place in state)] for symbol in every] for state in every]
    return automaton(examples, length, torch.tensor(rows), seed=seed)
