"""What one setting of a method does on one layer's queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tilewise.attention import Method, Plan, Share, Skip, Tiles, plan
from tilewise.attention.reads import Means
from tilewise.attention.reads import Sample as Drawn
from tilewise.tune import Sample, measure

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
SKIP = Skip()
Layers = Mapping[int, Sample]


@dataclass(frozen=True)
class Measured:
    """Of one layer: the shares of scores and of attention mass that are read, the relative error of the output, and
    seconds; `dense` is what dense attention takes on the same call."""

    density: float
    recall: float
    error: float
    choose: float
    attend: float
    dense: float


Case = Callable[[int, Sample], Measured]  # a layer and its tensors


@dataclass(frozen=True)
class Setting:
    """One budget of a method. `prepare(layers)` does what is done beforehand, once for all layers of an input, and
    is not timed; None where there is nothing at this budget."""

    label: str
    prepare: Callable[[Layers], Case | None]


def planned(method: Method | Plan, sample: Sample) -> Measured:
    """Choose and attend, twice, and keep the shorter times."""
    made = (
        method if isinstance(method, Plan) else plan(method, sample.q, sample.k, mask=sample.mask, v=sample.v)
    )
    got = measure(made, sample, repeats=2)
    choose = 0.0
    if not isinstance(method, Plan):
        spent = [made.seconds or 0.0]
        if spent[0] + got.attend < 1:
            again = plan(method, sample.q, sample.k, mask=sample.mask, v=sample.v)
            spent.append(again.seconds or 0.0)
        choose = min(spent)
    seconds = sample.seconds
    return Measured(got.density, recall(made, sample), got.error, choose, got.attend, seconds)


def recall(made: Plan, sample: Sample) -> float:
    """Mean share of a query's attention mass that is read token by token, and not by means or by a sample."""
    exact = tuple(part for part in made.passes if not isinstance(part.reads, (Means, Drawn)))
    if not exact:
        return 0.0
    part = replace(made, passes=exact, added=()).run(
        sample.q, sample.k, sample.v, scale=sample.q.shape[3] ** -0.5
    )
    return float((part.lse - sample.lse).exp().mean())


def everywhere(label: str, method: Method) -> Setting:
    """The same method in every layer."""
    return Setting(label, lambda layers: lambda layer, sample: planned(method, sample))


def by_layer(label: str, make: Callable[[int, Sample], Method | Plan]) -> Setting:
    """A method for each layer; making it is not timed."""
    return Setting(label, lambda layers: lambda layer, sample: planned(make(layer, sample), sample))


def over(make: Callable[[Any], Method], name: str, values: tuple[Any, ...]) -> list[Setting]:
    """`make(value)` for values of one setting."""
    return [everywhere(f"{name}={value}", make(value)) for value in values]


def tiles(score: Any, rest: Any = SKIP, **given: Any) -> list[Setting]:
    """Whole tiles by `score`, the frame of most published methods."""
    return over(lambda share: Tiles(score, Share(share), (64, 64), rest=rest, **given), "share", SHARES)
