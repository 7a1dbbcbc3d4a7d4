"""Word vectors by skip-gram with negative sampling, and a cross-entropy search of their hyper-parameters."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pstdev

import torch
from torch import Tensor
from torch.nn import functional as F

NARROW = 0.05  # least deviation of a range, in shares of its width, so that a search never stands still
Value = int | float


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of `train`.

    Args:
        dim: numbers in a vector. window: words on either side that are context; each word draws its own up to it.
        negatives: drawn words per true context. power: of the counts from which they are drawn.
        subsample: frequency above which words are left out now and then; 0 leaves none out.
        rate: learning rate of Adam, which falls linearly to 0. epochs: passes over the text. batch: pairs a step.
    """

    dim: int = 32
    window: int = 4
    negatives: int = 5
    power: float = 0.75
    subsample: float = 1e-3
    rate: float = 0.02
    epochs: int = 2
    batch: int = 512

    def __post_init__(self) -> None:
        for name in ("dim", "window", "negatives", "epochs", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        for name in ("power", "subsample", "rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)
class Vectors:
    """Word vectors: `words` float32 `[V, dim]` as centres, `contexts` `[V, dim]` as neighbours of others."""

    words: Tensor
    contexts: Tensor


def ids_of(words: Sequence[str], least: int = 1) -> tuple[Tensor, tuple[str, ...]]:
    """Ids of a text's words, int64 `[N]`, by falling count, and the words that are seen at least `least` times."""
    counts = Counter(words)
    known = tuple(sorted((w for w in counts if counts[w] >= least), key=lambda w: (-counts[w], w)))
    place = {word: i for i, word in enumerate(known)}
    return torch.tensor([place[word] for word in words if word in place], dtype=torch.int64), known


def train(
    ids: Tensor, settings: Settings = Settings(), *, vocabulary: int | None = None, seed: int = 0
) -> Vectors:
    """Skip-gram with negative sampling (Mikolov et al., 2013, arXiv 1310.4546).

    The log-odds that a word stands near another are the product of their vectors; true pairs are told from pairs
    with words drawn by count to the `power`. Everything is drawn from `seed`: the same call, the same vectors.

    Args:
        ids: int64 `[N]`, a text's words. vocabulary: how many there are; by default one more than the largest id.
    """
    size = _checked(ids, vocabulary)
    g = torch.Generator().manual_seed(seed)
    words = torch.nn.Parameter((torch.rand(size, settings.dim, generator=g) - 0.5) / settings.dim)
    contexts = torch.nn.Parameter(torch.zeros(size, settings.dim))
    counts = torch.bincount(ids, minlength=size).double()
    noise = counts.pow(settings.power) * (counts > 0)
    optimizer = torch.optim.Adam([words, contexts], lr=settings.rate)
    for epoch in range(settings.epochs):
        centres, near = _pairs(_thinned(ids, counts, settings.subsample, g), settings.window, g)
        order = torch.randperm(len(centres), generator=g)
        steps = order.split(settings.batch) if len(order) else ()
        for step, some in enumerate(steps):
            done = (epoch + step / len(steps)) / settings.epochs
            optimizer.param_groups[0]["lr"] = settings.rate * (1 - done)
            drawn = torch.multinomial(noise, len(some) * settings.negatives, True, generator=g)
            others = torch.cat([near[some].unsqueeze(1), drawn.view(len(some), -1)], 1)
            logits = torch.einsum(
                "pd,pnd->pn", words[centres[some]], contexts[others]
            )  # [pairs, 1 + negatives]
            sign = torch.ones(logits.shape[1]).index_fill_(0, torch.arange(1, logits.shape[1]), -1)
            loss = -F.logsigmoid(sign * logits).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Vectors(words.detach(), contexts.detach())


def separation(vectors: Vectors, ids: Tensor, *, window: int = 4, seed: int = 0) -> float:
    """How well vectors tell a text's true pairs from drawn ones: 0.5 is chance, 1 never a mistake.

    The chance that a word and one within `window` of it have a larger product than the same word and one drawn by
    its count in the text. Comparable between vectors of any settings, on text that none of them was trained on.
    """
    _checked(ids, len(vectors.words))
    g = torch.Generator().manual_seed(seed)
    centres, near = _pairs(ids, window, g)
    if not len(centres):
        raise ValueError(f"ids must hold at least two words, got {len(ids)}")
    drawn = ids[torch.randint(len(ids), (len(centres),), generator=g)]
    true, other = ((vectors.words[centres] * vectors.contexts[x]).sum(1) for x in (near, drawn))
    return float((true > other).double().mean() + (true == other).double().mean() / 2)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included. log: evenly spread in their logs. whole: integers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not (-math.inf < self.low < self.high < math.inf) or (self.log and self.low <= 0):
            raise ValueError(
                f"a range must have low < high, with log above 0, got {self.low!r} and {self.high!r}"
            )

    def value(self, share: float) -> Value:
        """The number at a share, 0 to 1, of the way."""
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        found = ends[0] + share * (ends[1] - ends[0])
        found = min(max(math.exp(found) if self.log else found, self.low), self.high)
        return round(found) if self.whole else found


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best: the settings of the largest value. value: that value. history: all settings tried and their values.
    """

    best: dict[str, Value]
    value: float
    history: tuple[tuple[dict[str, Value], float], ...]


Objective = Callable[[dict[str, Value]], float]


def random_search(
    objective: Objective, space: Mapping[str, Range], *, evaluations: int, seed: int = 0
) -> Search:
    """The best of so many settings drawn evenly; the yardstick of `cross_entropy_search`, whose start it equals."""
    return cross_entropy_search(objective, space, evaluations=evaluations, generation=evaluations, seed=seed)


def cross_entropy_search(
    objective: Objective,
    space: Mapping[str, Range],
    *,
    evaluations: int,
    generation: int = 16,
    elite: float = 0.2,
    smoothing: float = 0.8,
    seed: int = 0,
) -> Search:
    """Hyper-parameters by the cross-entropy method (Li, 2024, arXiv 2410.18441; Rubinstein, 1999).

    Settings are drawn evenly, then generation by generation from normal distributions cut off at the ends of their
    ranges, whose means and deviations are those of the best settings of the generation before: of all such
    distributions the one with the least cross-entropy to them.

    Args:
        objective: called with a dictionary of one number per name; larger is better.
        space: the range of each. evaluations: calls in all. generation: calls per generation.
        elite: share of a generation that shapes the next, at least two settings.
        smoothing: weight of the new mean and deviation against the old ones, in (0, 1].
    """
    if not space or not all(isinstance(one, Range) for one in space.values()):
        raise ValueError("space must map at least one name to a Range")
    for name, count in (("evaluations", evaluations), ("generation", generation)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
    for name, share in (("elite", elite), ("smoothing", smoothing)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {share!r}")
    rng = random.Random(seed)
    laws: dict[str, NormalDist] = {}
    history: list[tuple[dict[str, Value], float]] = []
    while len(history) < evaluations:
        tried = []
        for _ in range(min(generation, evaluations - len(history))):
            shares = {name: _drawn(laws.get(name), rng) for name in space}
            settings = {name: space[name].value(share) for name, share in shares.items()}
            history.append((settings, float(objective(dict(settings)))))
            tried.append((history[-1][1], shares))
        best = sorted(tried, key=lambda x: -x[0])[: max(2, round(elite * generation))]
        laws = {
            name: _moved(laws.get(name), [shares[name] for _, shares in best], smoothing) for name in space
        }
    settings, value = max(history, key=lambda x: x[1])
    return Search(settings, value, tuple(history))


def _drawn(law: NormalDist | None, rng: random.Random) -> float:
    """A share in 0 to 1: evenly, or by a normal distribution cut off there."""
    if law is None:
        return rng.random()
    low, high = law.cdf(0), law.cdf(1)
    return min(max(law.inv_cdf(min(max(low + rng.random() * (high - low), 1e-12), 1 - 1e-12)), 0.0), 1.0)


def _moved(law: NormalDist | None, shares: list[float], smoothing: float) -> NormalDist:
    mean, deviation = fmean(shares), max(pstdev(shares), NARROW)
    if law is None:
        return NormalDist(mean, deviation)
    old = 1 - smoothing
    return NormalDist(old * law.mean + smoothing * mean, old * law.stdev + smoothing * deviation)


def _checked(ids: Tensor, vocabulary: int | None) -> int:
    """The number of words, after a look at ids."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
        given = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an int64 tensor [N], got {given}")
    size = (int(ids.max()) + 1 if len(ids) else 1) if vocabulary is None else vocabulary
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"ids must lie in 0..{size - 1}, got {int(ids.min())} to {int(ids.max())}")
    return size


def _thinned(ids: Tensor, counts: Tensor, subsample: float, g: torch.Generator) -> Tensor:
    """A text with frequent words left out now and then: a word of frequency f stays with sqrt(subsample / f)."""
    if not subsample or not len(ids):
        return ids
    stay = (subsample * counts.sum() / counts.clamp(min=1)).sqrt()
    return ids[torch.rand(len(ids), generator=g, dtype=torch.float64) < stay[ids]]


def _pairs(ids: Tensor, window: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every word with those around it, up to a distance that each draws in 1..window: centres and contexts."""
    reach = torch.randint(1, window + 1, (len(ids),), generator=g)
    centres, near = [], []
    for distance in range(1, min(window, len(ids) - 1) + 1):
        ahead = (reach[:-distance] >= distance).nonzero().flatten()
        behind = (reach[distance:] >= distance).nonzero().flatten() + distance
        centres += [ids[ahead], ids[behind]]
        near += [ids[ahead + distance], ids[behind - distance]]
    none = ids[:0]
    return torch.cat([none, *centres]), torch.cat([none, *near])
