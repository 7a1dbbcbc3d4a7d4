"""Residual blocks that can be run backwards, so that training keeps no activations between them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

Pyramid = tuple[Tensor, ...]


class Coupling(nn.Module):
    """Two halves that change in turn: `a + first(b)`, then `b + second(that)`; the inverse subtracts.

    Args: first, second: modules that take the tensors of one half, as many as it has, and give a tensor of equal
    shape for each of the other half. A half of one tensor is given and returned as such.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, a: Pyramid, b: Pyramid) -> tuple[Pyramid, Pyramid]:
        a = _added(a, self.first(*b), 1)
        return a, _added(b, self.second(*a), 1)

    def inverse(self, a: Pyramid, b: Pyramid) -> tuple[Pyramid, Pyramid]:
        """What `forward` made `a` and `b` of, up to rounding."""
        b = _added(b, self.second(*a), -1)
        return _added(a, self.first(*b), -1), b


def _added(x: Pyramid, change: Tensor | Pyramid, sign: int) -> Pyramid:
    parts = (change,) if isinstance(change, Tensor) else change
    return tuple(one + sign * part for one, part in zip(x, parts, strict=True))


class ReversibleSequence(nn.Module):
    """`Coupling`s one after the other, whose backward pass works their inputs out again from their outputs.

    Of all activations only the last halves are kept (Gomez et al., 2017, arXiv 1707.04585); a backward pass costs
    a forward pass more. `forward` takes two halves, each a tensor or a tuple of tensors, and gives such halves;
    `inverse` goes back.

    Args: blocks: at least one. keeps: True keeps activations as usual: the same numbers, more memory, less time.
    """

    def __init__(self, blocks: Iterable[Coupling], keeps: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if not len(self.blocks) or not all(isinstance(block, Coupling) for block in self.blocks):
            raise ValueError("blocks must be one Coupling or more")
        self.keeps = keeps

    def forward(self, first: Tensor | Pyramid, second: Tensor | Pyramid) -> tuple[Pyramid, Pyramid]:
        a, b = _tuple(first), _tuple(second)
        if self.keeps or not torch.is_grad_enabled():
            for block in self.blocks:
                a, b = block(a, b)
            return a, b
        weights = tuple(self.parameters())
        made = _Reversed.apply(self, len(a), *a, *b, *weights)
        return made[: len(a)], made[len(a) :]

    def inverse(self, first: Tensor | Pyramid, second: Tensor | Pyramid) -> tuple[Pyramid, Pyramid]:
        """What `forward` made these halves of, up to rounding."""
        a, b = _tuple(first), _tuple(second)
        for block in reversed(self.blocks):
            a, b = block.inverse(a, b)  # type: ignore[operator]
        return a, b


def _tuple(x: Tensor | Pyramid) -> Pyramid:
    return (x,) if isinstance(x, Tensor) else tuple(x)


class _Reversed(torch.autograd.Function):
    """The sequence as one step of autograd: inputs are `split` tensors of a, those of b, and all parameters."""

    @staticmethod
    def forward(ctx, sequence: ReversibleSequence, split: int, *given: Tensor) -> Pyramid:
        count = len(given) - sum(1 for _ in sequence.parameters())
        a, b = given[:split], given[split:count]
        for block in sequence.blocks:
            a, b = block(a, b)
        ctx.sequence, ctx.split = sequence, split
        ctx.save_for_backward(*a, *b)
        return (*a, *b)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        saved, split = ctx.saved_tensors, ctx.split
        a, b = saved[:split], saved[split:]
        d_a, d_b = grads[:split], grads[split:]
        weights = list(ctx.sequence.parameters())
        found: dict[Tensor, Tensor] = {}
        for block in reversed(ctx.sequence.blocks):
            with torch.no_grad():
                a, b = block.inverse(a, b)
            own = [weight for weight in block.parameters() if weight.requires_grad]
            with torch.enable_grad():
                before = [x.detach().requires_grad_() for x in chain(a, b)]
                after = block(tuple(before[:split]), tuple(before[split:]))
                made = torch.autograd.grad(
                    [*after[0], *after[1]], [*before, *own], [*d_a, *d_b], allow_unused=True
                )
            d_a, d_b = (
                tuple(torch.zeros_like(x) if grad is None else grad for x, grad in zip(part, grads_of))
                for part, grads_of in ((a, made[:split]), (b, made[split : len(before)]))
            )
            for weight, grad in zip(own, made[len(before) :]):
                if grad is not None:  # a module may stand in several blocks
                    found[weight] = found[weight] + grad if weight in found else grad
        return None, None, *d_a, *d_b, *(found.get(weight) for weight in weights)
