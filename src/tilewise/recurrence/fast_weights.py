"""Weights that are trained while they are used: a SwiGLU memory, its gradient and its updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.recurrence.state import Carried

# Newton-Schulz coefficients of the authors' code, one triple for each of five steps.
MUON = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
LOSSES = ("dot", "square")


class Lessons(NamedTuple):
    """What each of T tokens adds to a memory: to gate `gate key^T`, to up `up key^T`, to down `down
    hidden^T`.

    Attributes:
        key: `[S, H, T, D]`. hidden, gate, up: `[S, H, T, D_h]`. down: `[S, H, T, D]`.
    """

    key: Tensor
    hidden: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def step(self) -> FastWeights:
        """The sum over tokens."""
        return FastWeights(self.gate.mT @ self.key, self.up.mT @ self.key, self.down.mT @ self.hidden)


@dataclass(frozen=True, eq=False)
class FastWeights(Carried):
    """A memory `f(x) = down (silu(gate x) * up x)` for each sequence and head.

    Attributes:
        gate, up: `[S, H, D_h, D]`. down: `[S, H, D, D_h]`.
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """f of each of `x [S, H, T, D]`."""
        return (F.silu(x @ self.gate.mT) * (x @ self.up.mT)) @ self.down.mT

    def descent(self, k: Tensor, v: Tensor, rates: Tensor, loss: str = "dot") -> FastWeights:
        """What one step of gradient descent adds: minus the gradient of the tokens' summed losses.

        The loss of a token is `-f(k) . v` ("dot") or `|f(k) - v|^2 / 2` ("square"), and counts for each of
        the three weights by a rate of its own. `k`, `v` are `[S, H, T, D]`, `rates` `[S, H, T, 3]` for
        gate, up and down.
        """
        return self.lessons(k, v, rates, loss).step

    def lessons(self, k: Tensor, v: Tensor, rates: Tensor, loss: str = "dot") -> Lessons:
        """What each token alone adds, as factors; arguments as in `descent`, whose step is their sum."""
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
        before, factor = k @ self.gate.mT, k @ self.up.mT  # [s, h, t, d_h]
        share = before.sigmoid()
        active = before * share
        hidden = active * factor
        wanted = v if loss == "dot" else v - hidden @ self.down.mT
        back = wanted @ self.down
        slope = share * (1 + before * (1 - share))
        to_gate, to_up, to_down = rates.unsqueeze(3).unbind(-1)
        return Lessons(k, hidden, back * factor * slope * to_gate, back * active * to_up, wanted * to_down)

    def read_along(self, x: Tensor, lessons: Lessons) -> Tensor:
        """f of each of `x [S, H, T, D]`, token t by these weights and the lessons of tokens 0 to t.

        No weights are made for each token: a lesson is an outer product, so what it adds to a product is a
        score between two tokens times the other factor. Costs T x T scores for each of the two layers.
        """
        scores = (x @ lessons.key.mT).tril()  # [s, h, t, t]
        before, factor = x @ self.gate.mT + scores @ lessons.gate, x @ self.up.mT + scores @ lessons.up
        hidden = F.silu(before) * factor
        return hidden @ self.down.mT + (hidden @ lessons.hidden.mT).tril() @ lessons.down

    def moved(self, step: FastWeights, lengths: FastWeights | None) -> FastWeights:
        """These weights plus a step, their rows brought back to `lengths` (None: left as they are)."""
        made = FastWeights(self.gate + step.gate, self.up + step.up, self.down + step.down)
        if lengths is None:
            return made
        pairs = ((made.gate, lengths.gate), (made.up, lengths.up), (made.down, lengths.down))
        return FastWeights(*(w / (w.norm(dim=-1, keepdim=True) + 1e-5) * length for w, length in pairs))

    @property
    def lengths(self) -> FastWeights:
        """The Euclidean length of each row."""
        return FastWeights(*(w.norm(dim=-1, keepdim=True) for w in (self.gate, self.up, self.down)))

    def where(self, rows: Tensor, other: FastWeights) -> FastWeights:
        """These for the sequences in `rows` (bool `[S]`), others' for the rest."""
        rows = rows.view(-1, 1, 1, 1)
        pairs = ((self.gate, other.gate), (self.up, other.up), (self.down, other.down))
        return FastWeights(*(torch.where(rows, a, b) for a, b in pairs))


def orthogonal(x: Tensor) -> Tensor:
    """Muon's step: five Newton-Schulz iterations that bring all singular values of `[..., M, N]` near 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in MUON:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def read_chunk(
    weights: FastWeights,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    *,
    lengths: FastWeights | None = None,
    muon: bool = False,
    loss: str = "dot",
) -> FastWeights:
    """The weights after one update by a chunk of tokens, arguments as in `FastWeights.descent` and `moved`.

    `muon` orthogonalises each step (`orthogonal`), so that rates only weigh tokens against each other.
    """
    step = weights.descent(k, v, rates, loss)
    if muon:
        step = FastWeights(orthogonal(step.gate), orthogonal(step.up), orthogonal(step.down))
    return weights.moved(step, lengths)
