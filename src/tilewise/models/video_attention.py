"""Who computes attention in a video model's blocks, and what an observer sees of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tilewise.attention import Method, Plan, as_method, attend
from tilewise.attention import plan as make_plan


@dataclass(frozen=True)
class Moment:
    """Where in a run an attention call is.

    Attributes:
        layer: index of the block. time: the flow time in [0, 1], 0 noise and 1 data; of a batch with several, the
            first. grid: tokens along time, height and width, in the order of the tokens, slowest first.
        step, steps: which step of the sampler, of how many; None outside `sample`.
    """

    layer: int
    time: float
    grid: tuple[int, int, int]
    step: int | None = None
    steps: int | None = None


@dataclass(frozen=True, eq=False)
class VideoEvent:
    """One attention call, as an observer sees it.

    Attributes:
        moment: where it was. q, k, v, out: `[B, heads, N, head_dim]`, queries and keys after rotation.
        method, plan: what decided and what it decided; None where a function gave the output itself.
    """

    moment: Moment
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    method: Method | None
    plan: Plan | None


Choice = Method | Plan | str
Rule = Callable[[Tensor, Tensor, Tensor, Moment], Tensor | Choice]
Setting = Choice | Rule | Mapping[int, Choice | Rule] | None
Observer = Callable[[VideoEvent], None]


def by_layer(attention: Setting, count: int) -> dict[int, Choice | Rule]:
    """What each of `count` layers uses; dense ones are left out. Names are resolved here, so errors come early."""
    given = attention if isinstance(attention, Mapping) else dict.fromkeys(range(count), attention)
    for layer in given:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < count:
            raise ValueError(f"attention names layer {layer!r}; the model has layers 0 to {count - 1}")
    return {layer: _resolve(value) for layer, value in given.items() if value is not None}


def _resolve(value: Any) -> Choice | Rule:
    own = isinstance(value, Plan) or (callable(value) and not isinstance(value, (Method, type)))
    return value if own else as_method(value)


@dataclass(frozen=True)
class Attention:
    """One call of attention: runs what was chosen and tells the observer."""

    chosen: Choice | Rule | None
    moment: Moment
    observer: Observer | None
    engine: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen: Any = self.chosen
        out: Any
        if callable(chosen):
            chosen = chosen(q, k, v, self.moment)
        if isinstance(chosen, Tensor):
            if chosen.shape != v.shape:
                raise ValueError(f"attention must give {list(v.shape)}, got {list(chosen.shape)}")
            out, method, plan = chosen, None, None
        else:
            method = None if isinstance(chosen, Plan) else as_method(chosen)
            plan = chosen if isinstance(chosen, Plan) else None
            if self.observer is not None and plan is None:
                plan = make_plan(method, q, k, v=v)
            out = attend(q, k, v, plan or method, engine=self.engine)
        if self.observer is not None:
            self.observer(VideoEvent(self.moment, q, k, v, out, method, plan))
        return out
