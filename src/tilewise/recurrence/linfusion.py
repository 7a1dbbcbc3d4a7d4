"""LinFusion: linear attention that takes a trained attention's weights over, and its loss of distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.distil import Loss, Pairs
from tilewise.recurrence.mixer import from_heads, to_heads
from tilewise.recurrence.vision import Grid, VisionMixer
from tilewise.recurrence.whole import whole_attention


class LinFusion(VisionMixer):
    """Generalised linear attention (Liu et al., 2024, arXiv 2409.02097).

    All tokens see each other, and weights sum to 1. Queries and keys are projected from `x + map(x)`, with a
    small network each, and mapped by elu + 1. `inherit` takes the projections of a trained softmax attention
    over, whose outputs it then learns by `distil` with `linfusion_loss`.

    Args:
        width, heads, qk_norm, rope, extra, bias: as of `VisionMixer`; what is inherited from decides them.
        hidden: width within the two networks; None is `width`.

    Raises ValueError for settings that do not fit. Differs from the authors' code: the networks' last layers
    begin at 0, so that a student begins as its teacher with other weights of attention; padding.
    """

    def __init__(self, width: int, heads: int, hidden: int | None = None, **options) -> None:
        super().__init__(width, heads, **options)
        hidden = width if hidden is None else hidden
        if not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1:
            raise ValueError(f"hidden must be an integer >= 1, got {hidden!r}")
        self.query_map, self.key_map = (_network(width, hidden) for _ in range(2))

    def forward(self, x: Tensor, grid: Grid | None = None, *, mask: Tensor | None = None) -> Tensor:
        x = self.check(x, grid, mask, needs_grid=False)
        out = self.attend(*self.parts(x), grid, mask)
        return self.finish(from_heads(out), mask)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_norm(to_heads(self.query(x + self.query_map(x)), self.heads))
        k = self.k_norm(to_heads(self.key(x + self.key_map(x)), self.heads))
        return q, k, to_heads(self.value(x), self.heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None, mask: Tensor | None) -> Tensor:
        """What queries read, `[B, H, N, D]`."""
        q, k = (F.elu(self.turned(part, grid)) + 1 for part in (q, k))
        return whole_attention(q, k, v, eps=1e-4, mask=mask)


def _network(width: int, hidden: int) -> nn.Sequential:
    last = nn.Linear(hidden, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(), last)


def linfusion_loss(task: Callable[[Tensor, Any], Tensor], output: float = 0.5, parts: float = 0.5) -> Loss:
    """LinFusion's loss for `distil`: the task's own, `output` times the squared distance of the two outputs
    and `parts` times that of the captured parts, their mean.

    Args: task: `task(the student's output, batch)`, a scalar. output, parts: the authors' weights.
    """

    def loss(pairs: Pairs, batch: Any) -> Tensor:
        distances = {name: F.mse_loss(x.student.float(), x.teacher.float()) for name, x in pairs.items()}
        inner = [x for name, x in distances.items() if name]
        total = task(pairs[""].student, batch) + output * distances[""]
        return total + parts * torch.stack(inner).mean() if inner else total

    return loss
