"""What one method does on one layer's queries, keys and values, against dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tilewise.attention import Method, Plan, attend, plan
from tilewise.machine import clock
from tilewise.tiles import Mask


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of attention in a model, with dense attention over it.

    Attributes:
        q: `[B, H_q, N, D]`. k, v: `[B, H_kv, N, *]`. mask, scale: as in `attend`.
        out: dense output. lse: its log-sum-exp, float32 `[B, H_q, N]`. seconds: that dense attention took.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | Tensor | str | None
    scale: float | None
    out: Tensor
    lse: Tensor
    seconds: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Any = "causal", scale: float | None = None) -> Sample:
        """Attend densely, twice, and keep the shorter time."""
        spent = []
        for _ in range(2):
            start = clock(q.device)
            attend(q, k, v, mask=mask, scale=scale)
            spent.append(clock(q.device) - start)
        whole: Any = attend(q, k, v, mask=mask, scale=scale, return_lse=True)
        return cls(q, k, v, mask, scale, whole.out, whole.lse, min(spent))


@dataclass(frozen=True)
class Found:
    """What a method did: the share of scores computed, the relative error of its output, seconds of both parts."""

    density: float
    error: float
    choose: float
    attend: float


def measure(method: Method | Plan, sample: Sample, repeats: int = 1) -> Found:
    """Plan, if that is not done, and attend; of several repeats the shortest times.

    What takes more than a second is done once.

    The error is `||out - dense|| / ||dense||` over all heads and queries. Raises as `attend` does.
    """
    choose, spent = [], []
    for _ in range(repeats):
        if isinstance(method, Plan):
            made = method
        else:
            made = plan(method, sample.q, sample.k, mask=sample.mask, scale=sample.scale, v=sample.v)
        start = clock(sample.q.device)
        out: Any = attend(sample.q, sample.k, sample.v, made, mask=sample.mask, scale=sample.scale)
        spent.append(clock(sample.q.device) - start)
        choose.append(made.seconds or 0.0)
        if choose[0] + spent[0] > 1:
            break
    norm = sample.out.float().norm()
    error = (out.float() - sample.out.float()).norm() / norm if norm else norm
    return Found(made.density, float(error), min(choose), min(spent))
