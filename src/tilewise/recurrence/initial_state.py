"""Initial-state tuning: a model whose weights stay as they are, and a first state that is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.model import SequenceModel
from tilewise.recurrence.state import Carried, State


class InitialState(nn.Module):
    """A learned first state for every layer of a model (Lemerle et al., 2024, arXiv 2410.23320).

    Each head's matrix `[D_k, D_v]` is a product of rank `rank`: `rank * (D_k + D_v)` numbers. Calling it with a
    number of sequences gives the states to call the model with, in place of a prompt.

    Args:
        model: with layers over `scan`, whose states have matrices `[S, H, D_k, D_v]`; other layers begin empty.
            rank: of each, low as in the paper.
        seed: of the numbers to begin with. One factor begins at 0, and so the states do.

    Raises ValueError for a rank below 1 and for models that carry no matrix.
    """

    def __init__(self, model: SequenceModel, rank: int = 1, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
        embedding = model.embedding.weight
        with torch.no_grad():
            _, self._empty = model(torch.zeros(1, 0, dtype=torch.int64, device=embedding.device))
        self.left, self.right = nn.ParameterList(), nn.ParameterList()
        gen = torch.Generator().manual_seed(seed)

        def add(x: Tensor) -> Tensor:
            _, heads, d_k, d_v = x.shape
            drawn = torch.randn(heads, d_k, rank, generator=gen, dtype=x.dtype) * d_k**-0.5
            self.left.append(nn.Parameter(drawn.to(x.device)))
            self.right.append(nn.Parameter(x.new_zeros(heads, rank, d_v)))
            return x

        for state in self._empty:
            _changed(state, add, lambda x: x)
        if not len(self.left):
            raise ValueError(
                "model must have a layer over scan, whose state is a matrix; none of its layers is"
            )

    @property
    def numbers(self) -> int:
        """How many are learned."""
        return sum(x.numel() for x in self.parameters())

    def forward(self, sequences: int) -> list[Carried]:
        """The states of so many sequences, all alike."""
        made = iter([left @ right for left, right in zip(self.left, self.right)])

        def filled(_: Tensor) -> Tensor:
            return next(made).expand(sequences, -1, -1, -1)

        def repeated(x: Tensor) -> Tensor:
            return x.expand(sequences, *x.shape[1:])

        return [_changed(state, filled, repeated) for state in self._empty]


def _changed(part: Any, matrix: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> Any:
    """A layer's state with the matrices of its scans changed in one way and all other tensors in another."""
    if isinstance(part, State):
        return replace(part.map(other), matrix=matrix(part.matrix))
    if isinstance(part, Carried):
        return replace(part, **{f.name: _changed(getattr(part, f.name), matrix, other) for f in fields(part)})
    if isinstance(part, tuple):
        return tuple(_changed(each, matrix, other) for each in part)
    return other(part) if isinstance(part, Tensor) else part


def tune_initial_state(
    model: SequenceModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    rank: int = 1,
    rate: float = 0.05,
    seed: int = 0,
) -> InitialState:
    """Learn the first state with which a model that is left as it is does best on `batches`, one step of Adam each.

    Args:
        model: any `SequenceModel` with layers over `scan`. Neither its weights nor their gradients are touched.
        batches: pairs of tokens and targets, int64 `[B, N]` both; the target -100 is passed over.
        rank, seed: as of `InitialState`. rate: the step size, which falls to 0 when `batches` has a length.

    Returns:
        The learned state; call it with the number of sequences.

    Raises ValueError for a rate that is not above 0, and as `InitialState`. Differs from the paper: the loss is
    that of tokens, for speech or anything else.
    """
    if not rate > 0:
        raise ValueError(f"rate must be above 0, got {rate!r}")
    state = InitialState(model, rank, seed)
    optimizer, learned = torch.optim.Adam(state.parameters(), rate), list(state.parameters())
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    for step, (tokens, targets) in enumerate(batches):
        logits, _ = model(tokens, state(tokens.shape[0]))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        for x, gradient in zip(learned, torch.autograd.grad(loss, learned)):
            x.grad = gradient
        if total:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / total)
        optimizer.step()
    return state.requires_grad_(False)
