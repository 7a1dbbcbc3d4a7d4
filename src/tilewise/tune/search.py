"""The search itself: layer by layer, first everything on a short text, then the best on the whole one."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from tilewise.attention import Dense, Method
from tilewise.compare.material import machine, read_text
from tilewise.compare.settings import check_writable
from tilewise.data.tasks import passkey
from tilewise.errors import UserError
from tilewise.models import Event, ModelRecipe, load_model, patch
from tilewise.tune.choose import allocate, front
from tilewise.tune.measure import Sample, measure
from tilewise.tune.space import composed, published

LONGEST = 8192  # tokens used when the caller does not say and the model's context is longer
SHORTER = 4  # the first round reads this fraction of the tokens
HELD = 2**31  # bytes of queries, keys and values held at once
FIRST_ROUND = 0.4  # of the time
SHOWN = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)  # budgets of the table


@dataclass(frozen=True)
class Settings:
    """What to search for.

    Args:
        model: a directory, a hub id, or None for the bundled model. text: a file, or None for the bundled sample.
        tokens: tokens to search on, taken from the end of the text, so that `tilewise compare`, which reads its
            beginning, shows what the recipe does on other text; None is the model's context, at most 8,192, and at
            most half of the text.
        cost: "time" of choosing and attending on this machine, or "density", which no noise touches.
        budget: what the recipe may cost, as a share of dense attention.
        judge: "logits" weighs a layer by how much its error moves the model's answer; "output" weighs all alike.
        seconds: of search; loading the model and the dense passes come on top.
        out: the file to write. device, dtype: where and how the model is held. seed: of the order of the search.
    """

    model: str | None = None
    text: Path | None = None
    tokens: int | None = None
    cost: str = "time"
    budget: float = 0.5
    judge: str = "logits"
    seconds: float = 300.0
    out: Path = Path("recipe.json")
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("cost", ("time", "density")), ("judge", ("logits", "output"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.budget <= 1:
            raise UserError(f"budget must be a share of dense attention in (0, 1], got {self.budget:g}")
        if not 0 < self.seconds < math.inf:
            raise UserError(f"seconds must be a number > 0, got {self.seconds:g}")
        if self.tokens is not None and self.tokens < 64:
            raise UserError(f"tokens must be at least 64, got {self.tokens}")
        check_writable(Path(self.out))


@dataclass(frozen=True)
class Tried:
    """One setting on one layer: its family's name, and the means over the texts."""

    family: str
    method: Method
    density: float
    error: float
    time: float

    def point(self, cost: str) -> tuple[float, float]:
        """(cost, error), both as shares of dense attention's."""
        return (self.time if cost == "time" else self.density), self.error


@dataclass
class Board:
    """Everything tried at full length, by layer."""

    cost: str
    tokens: int
    layers: dict[int, list[Tried]] = field(default_factory=dict)
    weights: dict[int, float] = field(
        default_factory=dict
    )  # of a layer's squared error; without them, all alike
    partial: bool = False  # whether the search was interrupted

    def best(self, budget: float) -> dict[int, Tried]:
        """For each layer what to use, so that the loss is least at this mean cost. Raises as `allocate`."""
        choices = [[self._scored(layer, tried) for tried in found] for layer, found in self.layers.items()]
        picked = allocate(choices, budget)
        return {layer: found[i] for (layer, found), i in zip(self.layers.items(), picked)}

    def _scored(self, layer: int, tried: Tried) -> tuple[float, float]:
        cost, error = tried.point(self.cost)
        return cost, self.weights[layer] * error**2 if self.weights else error


def run_tune(settings: Settings, console: Console | None = None) -> ModelRecipe:
    """Search, show what was found for several budgets, and write the recipe for the one asked for.

    Raises UserError for anything the caller got wrong, before searching, and when nothing found is within the
    budget. A KeyboardInterrupt ends the search: the recipe is made of the layers that were reached, the others
    dense; when not even one was reached the interrupt is raised again and nothing is written.
    """
    console = console or Console()
    return _conclude(settings, explore(settings, console), console)


def explore(settings: Settings, console: Console | None = None) -> Board:
    """The search alone: everything tried at full length, from which recipes of any budget follow. As `run_tune`."""
    console = console or Console()
    model, tokenizer = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    texts = _texts(settings, model, tokenizer)
    count = model.config.get_text_config().num_hidden_layers
    board, step = Board(settings.cost, texts["text"].shape[0]), _together(model, texts)
    try:
        with _progress(console) as progress:
            for layer in range(count):
                if layer % step == 0:
                    group = range(layer, min(layer + step, count))
                    whole = [_events(model, tokens, group) for tokens in texts.values()]
                    short = [_events(model, t[: max(64, len(t) // SHORTER)], group) for t in texts.values()]
                task = progress.add_task(f"layer {layer} of {count}", total=settings.seconds / count)
                some, every = ([found.pop(layer) for found in part] for part in (short, whole))
                board.layers[layer] = _search(settings, layer, some, every, progress, task)
        if settings.judge == "logits":
            board.weights = _weights(model, texts["text"], board, settings.budget)
    except KeyboardInterrupt:
        if not board.layers:
            raise
        board.partial = True
    for layer in set(range(count)) - set(board.layers):
        board.layers[layer] = [Tried("dense", Dense(), 1.0, 0.0, 1.0)]
    board.layers = dict(sorted(board.layers.items()))
    return board


def _conclude(settings: Settings, board: Board, console: Console) -> ModelRecipe:
    rows, count = [], len(board.layers)
    for budget in sorted({*SHOWN, settings.budget}):
        try:
            rows.append((budget, board.best(budget)))
        except ValueError:
            continue
    _show(rows, settings, console)
    chosen = dict(rows).get(settings.budget)
    if chosen is None:
        least = sum(min(t.point(settings.cost)[0] for t in found) for found in board.layers.values()) / count
        raise UserError(f"nothing found costs as little as {settings.budget:g}; the least is {least:.2f}")
    about = {
        "model": settings.model or "bundled",
        "text": str(settings.text) if settings.text else "bundled sample",
        "tokens": board.tokens,
        "cost": settings.cost,
        "budget": settings.budget,
        "judge": settings.judge,
        "partial": board.partial,
        "machine": machine(torch.device(settings.device)),
        "expected": _summary(chosen),
        "tried": sum(len(found) for found in board.layers.values()),
    }
    methods = {layer: tried.method for layer, tried in chosen.items() if not isinstance(tried.method, Dense)}
    recipe = ModelRecipe(count, methods, about)
    recipe.save(settings.out)
    console.print(f"wrote {settings.out}", markup=False, highlight=False, soft_wrap=True)
    return recipe


def _summary(chosen: Mapping[int, Tried]) -> dict[str, float]:
    """Means over layers."""
    return {
        name: sum(getattr(tried, name) for tried in chosen.values()) / len(chosen)
        for name in ("density", "error", "time")
    }


def _show(rows: Sequence[tuple[float, Mapping[int, Tried]]], settings: Settings, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, head in enumerate(("budget", "density", "time", "error", "what the layers use")):
        table.add_column(head, justify="right" if number < 4 else "left", no_wrap=number < 4, overflow="fold")
    for budget, chosen in rows:
        mean = _summary(chosen)
        families = Counter(tried.family for tried in chosen.values()).most_common()
        used = ", ".join(f"{times} {name}" for name, times in families)
        table.add_row(
            f"{budget:g}",
            f"{mean['density']:.1%}",
            f"{mean['time']:.2f}",
            f"{mean['error']:.4f}",
            escape(used),
        )
    console.print(table)
    console.print(
        f"budgets of {settings.cost}; time and error as shares of dense attention's, means over layers\n",
        style="dim",
    )


def _texts(settings: Settings, model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Tokens `[N]` from the end of the text, and of a pass key hidden in such text."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or LONGEST
    words = read_text(settings.text)
    ids = tokenizer(words, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    wanted = min(context, LONGEST, len(ids) // 2) if settings.tokens is None else settings.tokens
    if wanted > context:
        raise UserError(f"tokens is {wanted}, but the model's context is {context}")
    if not 64 <= wanted <= len(ids):
        raise UserError(f"the text has {len(ids)} tokens, {max(wanted, 128)} are needed")
    made = {"text": ids[-wanted:].to(model.device)}
    tail = tokenizer.decode(made["text"].tolist())
    filler = " ".join(tail.encode("ascii", "ignore").decode().split()).encode()
    if len(filler) >= 256:
        hidden = passkey(len(filler), settings.seed, 0.4, filler=filler).text.decode("ascii")
        ids = tokenizer(hidden, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
        made["pass key"] = ids[:wanted].to(model.device)
    return made


def _events(model: Any, tokens: Tensor, layers: range) -> dict[int, Event]:
    """The attention calls of these layers on these tokens."""
    seen: dict[int, Event] = {}

    def keep(event: Event) -> None:
        if event.layer in layers:
            seen[event.layer] = event

    with torch.no_grad(), patch(model, "dense", check=False, observer=keep):
        model(input_ids=tokens.unsqueeze(0), use_cache=False, logits_to_keep=1)
    return seen


def _together(model: Any, texts: Mapping[str, Tensor]) -> int:
    """How many layers' calls are held at once: as many as fit in HELD bytes, at least one."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    tokens = sum(len(t) for t in texts.values())
    size = tokens * (heads + 2 * kv_heads) * dim * model.dtype.itemsize * (1 + 1 / SHORTER)
    return max(1, int(HELD / max(size, 1)))


@torch.no_grad()
def _search(
    settings: Settings,
    layer: int,
    short: Sequence[Event],
    whole: Sequence[Event],
    progress: Progress,
    task: Any,
) -> list[Tried]:
    """What was tried on one layer at full length; dense is always among it."""
    every = [
        (family, m) for space in (published(), composed()) for family, list_ in space.items() for m in list_
    ]
    random.Random(f"{settings.seed} {layer}").shuffle(every)
    share = progress.tasks[task].total or 0.0
    begun = time.monotonic()

    def tick(limit: float) -> bool:
        progress.update(task, completed=time.monotonic() - begun)
        return time.monotonic() - begun < limit

    first = _try(every, [_sample(e) for e in short], lambda: tick(share * FIRST_ROUND))
    second = _try(promising(first, settings.cost), [_sample(e) for e in whole], lambda: tick(share))
    progress.update(task, completed=share)
    return [Tried("dense", Dense(), 1.0, 0.0, 1.0), *second]


def _sample(event: Event) -> Sample:
    return Sample.of(event.q, event.k, event.v, event.mask, event.scale)


def _try(
    candidates: Sequence[tuple[str, Method]], samples: Sequence[Sample], go: Callable[[], bool]
) -> list[Tried]:
    """Measure candidates in turn while `go` says so; those that refuse such calls are left out."""
    done: list[Tried] = []
    for family, method in candidates:
        if not go():
            break
        try:
            found = [measure(method, sample) for sample in samples]
        except ValueError:
            continue
        costs = [(f.choose + f.attend) / s.seconds for f, s in zip(found, samples)]
        means = (sum(f.density for f in found), sum(f.error for f in found), sum(costs))
        density, error, cost = (mean / len(samples) for mean in means)
        if math.isfinite(error):
            done.append(Tried(family, method, density, error, cost))
    return done


def promising(tried: Sequence[Tried], cost: str) -> list[tuple[str, Method]]:
    """The settings in the order in which they deserve a second look: by how near they come to the front.

    The distance of a setting is the logarithm of its error over the least error found at no greater cost.
    """
    points = [t.point(cost) for t in tried]
    edge = [points[i] for i in front(points)]

    def distance(point: tuple[float, float]) -> float:
        least = min(error for at, error in edge if at <= point[0])
        return math.log((point[1] + 1e-9) / (least + 1e-9))

    order = sorted(range(len(tried)), key=lambda i: distance(points[i]))
    return [(tried[i].family, tried[i].method) for i in order]


@torch.no_grad()
def _weights(model: Any, tokens: Tensor, board: Board, budget: float) -> dict[int, float]:
    """By how much a layer's squared error moves the model's answer: KL divergence in nats over squared error.

    Measured with one setting of each layer, the one that all layers weighed alike would give it (a sparser one
    where that is dense), each layer changed alone.
    """

    def run(setting: Any) -> Tensor:
        with patch(model, setting, check=False):
            return model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(-1)

    try:
        chosen = board.best(budget)
    except ValueError:
        return {}
    exact, weights = run("dense"), {}
    for layer, tried in chosen.items():
        if tried.error == 0:
            tried = max(board.layers[layer], key=lambda t: t.error)
        if tried.error == 0:  # nothing but dense was reached
            weights[layer] = 1.0
            continue
        other = run({layer: tried.method})
        divergence = float((exact.exp() * (exact - other)).sum(-1).mean())
        weights[layer] = max(divergence, 0.0) / tried.error**2
    return weights


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress
