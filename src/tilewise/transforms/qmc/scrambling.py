"""Randomisations of digits, in base 2 and in any base.

Digital shift: every digit of a coordinate is moved by the same amount in all points. Linear matrix
scrambling (LMS): the digits are multiplied by a random lower triangular matrix first. Nested uniform
scrambling (NUS): a digit is permuted at random, with a permutation of its own for every string of digits
before it; Owen (1995) stores these permutations as a tree. Here the node of the tree is hashed into its
permutation, so nothing is stored and any point can be made on its own: the result is that of the tree as
far as a hash of 64 bits is as good as independent random words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.digit_sums.digits import BITS
from tilewise.transforms.qmc.digits import below, mix, step, words

GROUP = 6  # levels of a binary tree whose 63 nodes share one random word, a bit each


def scrambled_columns(columns: Tensor, digits: int, key: int, copies: int) -> Tensor:
    """Columns of digital nets under LMS, `[copies, d, m]`, from columns `[d, m]` of which `digits` digits
    are used."""
    d = columns.shape[0]
    random = words(key, (copies, d, digits), columns.device)
    out = torch.zeros(copies, *columns.shape, dtype=torch.int64, device=columns.device)
    for place in range(digits):
        unit = 1 << BITS - 1 - place
        # A column of the matrix: 1, then random digits below.
        own = unit | random[:, :, place, None] & unit - 1
        out ^= (columns >> BITS - 1 - place & 1) * own
    return out


def nested_uniform(x: Tensor, keys: Tensor, digits: int) -> Tensor:
    """NUS of digits `x` `[1, n, d]`, of which the first `digits` may be set, with words `keys` `[copies,
    d]`.

    Digits after the first `digits` are random, given those: two different points differ before.
    """
    node_key, out = keys.unsqueeze(1), x.repeat(len(keys), 1, 1)
    for first in range(0, digits, GROUP):
        count = min(GROUP, digits - first)
        word = step(mix(node_key + first), x >> BITS - first)
        for level in range(count):
            above = x >> BITS - first - level & (1 << level) - 1  # digits since the group's first level
            out ^= (word >> (above | 1 << level) & 1) << BITS - 1 - first - level
    if digits < BITS:
        rest = (1 << BITS - digits) - 1
        out ^= step(mix(node_key + BITS), x >> BITS - digits) & rest
    return out


def interlaced(x: Tensor, factor: int) -> Tensor:
    """Digits of `factor` neighbouring coordinates in turns: `[..., factor d]` to `[..., d]`, 52 digits
    kept."""
    parts = x.unflatten(-1, (-1, factor))
    out = torch.zeros_like(parts[..., 0])
    for place in range(BITS):
        digit = parts[..., place % factor] >> BITS - 1 - place // factor & 1
        out |= digit << BITS - 1 - place
    return out


def digit_permutations(base: int, digits: int, key: int, copies: int, device: torch.device) -> Tensor:
    """Random permutations of 0 .. base - 1, one for every digit, `[copies, digits, base]`."""
    return words(key, (copies, digits, base), device).argsort(-1)


def shift_permutations(base: int, digits: int, key: int, copies: int, device: torch.device) -> Tensor:
    """A digital shift as permutations, `[copies, digits, base]`."""
    shift = below(base, words(key, (copies, digits, 1), device))
    return (torch.arange(base, device=device) + shift) % base


def scrambling_matrices(
    base: int, digits: int, used: int, key: int, copies: int, device: torch.device
) -> Tensor:
    """Random lower triangular matrices modulo a prime, `[copies, digits, used]`, no 0 on the diagonal."""
    random = words(key, (copies, digits, used), device)
    diagonal = below(base - 1, random) + 1
    return below(base, random).tril(-1) + diagonal.tril() - diagonal.tril(-1)


def nested_permutations(index: Tensor, base: int, levels: int, roots: Tensor) -> Tensor:
    """NUS of the first `levels` digits of radical inverses, `[copies, n, levels]`, from words `roots`
    `[copies, 1]`.

    The digits of the radical inverse of i are those of i from the last on, so the digits before level k are
    `i mod base^k`. A permutation is the order of the words of its node's children. Few nodes of a level:
    their permutations are tabulated; many: each point finds the rank of its own child.
    """
    device, copies = index.device, roots.shape[0]
    choices = torch.arange(base, device=device)
    made = []
    for level in range(levels):
        node = index % base**level
        digit = index // base**level % base
        key = mix(roots + level)
        if base**level <= max(1, len(index) // base):
            ids = torch.arange(base**level, device=device)
            children = step(step(key, ids).unsqueeze(-1), choices)
            ranks = children.argsort(-1).argsort(-1)
            made.append(ranks[:, node, digit])
        else:
            word = step(key, node)
            own = step(word, digit)
            rank = torch.zeros(copies, len(index), dtype=torch.int64, device=device)
            for choice in range(base):
                rank += step(word, choice) < own
            made.append(rank)
    return torch.stack(made, -1)
