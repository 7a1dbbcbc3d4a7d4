"""Weights that are trained while they are used: a SwiGLU memory, its gradient written out, and its updates."""

from __future__ import annotations

from dataclasses import dataclass

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

        The loss of a token is `-f(k) . v` ("dot") or `|f(k) - v|^2 / 2` ("square"), and counts for each of the
        three weights by a rate of its own. `k`, `v` are `[S, H, T, D]`, `rates` `[S, H, T, 3]` for
        gate, up and down.
        """
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
        before, factor = k @ self.gate.mT, k @ self.up.mT  # [s, h, t, d_h]
        share = before.sigmoid()
        active = before * share
        hidden = active * factor
        wanted = v if loss == "dot" else v - hidden @ self.down.mT
        back = wanted @ self.down
        slope = share * (1 + before * (1 - share))
        to_gate, to_up, to_down = rates.unbind(-1)
        return FastWeights(
            (back * factor * slope * to_gate.unsqueeze(3)).mT @ k,
            (back * active * to_up.unsqueeze(3)).mT @ k,
            (wanted * to_down.unsqueeze(3)).mT @ hidden,
        )

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
