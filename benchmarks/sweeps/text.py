"""Methods for text: every layer of the bundled language model, under a causal mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sweeps.common import SHARES, Case, Layers, Setting, by_layer, everywhere, over, planned, tiles
from tilewise.attention import (
    LLSA,
    PISA,
    PSA,
    SLA,
    Dense,
    First,
    HyperAttention,
    Method,
    NativeSparseAttention,
    Own,
    Pass,
    Plan,
    RandomTiles,
    SqueezedAttention,
    SqueezedContext,
    TrueMass,
    calibrate_thresholds,
)
from tilewise.data import passkey
from tilewise.models import bundled_gates, bundled_model, capture, gated, load_gates, load_model, read_recipe
from tilewise.tiles import Visibility
from tilewise.tune import Board, Sample, Settings, explore, published

RECIPE = Path(__file__).parents[2] / "docs/results/tuned.json"
LEARNT = (40_000, 60_000, 80_000)  # bytes of the sample that what is solved for here is solved for on
WINDOW = 100  # queries at the end of a fixed context that calibrate
TEXTS = ("text", "pass key")


def methods(length: int, seconds: float) -> dict[str, list[Setting]]:
    """The settings of every method for text, by its name, from little to much; `seconds` of search for `tuned`."""
    given: dict[str, Any] = {"always": (Own(), First())}
    found = {
        "oracle": tiles(TrueMass(), **given),
        "random": tiles(RandomTiles(), **given),
        **{name: _named(settings) for name, settings in published().items() if name != "dense"},
        "pisa": over(PISA, "density", SHARES),
        "psa": over(_psa, "mass", (0.1, 0.25, 0.4, 0.55, 0.7)),
        "llsa": over(lambda k: LLSA(16, k), "top_k", (4, 8, 16, 32, 64)),
        "hyper-attention": over(
            lambda least: HyperAttention(64, 128, least=least, causal=True),
            "least",
            (128, 256, 512, 1024, 2048),
        ),
        "native-sparse": over(NativeChoice, "top_n", (4, 8, 16, 32, 64)),
        "seer-attention": _gated("seer-attention", "top_k", (4, 8, 16, 32, 48)),
        "dhsa": _gated("dhsa", "budget", tuple(length // part for part in (64, 32, 16, 8, 4))),
        "chunk-llm": _gated("chunk-llm", "top_k", (4, 8, 16, 32, 64)),
        "spt": _gated("spt", "share", (0.02, 0.05, 0.1, 0.2)),
        "sla": [_sla(share) for share in SHARES],
        "squeezed": [_squeezed(share) for share in SHARES],
    }
    if seconds:
        found["tuned"] = _tuned(length, seconds)
    found["tuned for time"] = [by_layer("half of dense", lambda layer, _: _recipe().get(layer, Dense()))]
    return found


def samples(length: int) -> dict[str, Callable[[], dict[int, Sample]]]:
    """Every layer, on the beginning of real text and on a pass key hidden in what follows it."""
    text = _text()
    hidden = passkey(length, seed=0, filler=text[20_000:32_000].encode(), depth=0.4).text.decode(
        errors="replace"
    )
    return {
        name: lambda words=words: {layer: Sample.of(*qkv) for layer, qkv in _captured(words, length).items()}
        for name, words in zip(TEXTS, (text[: 2 * length], hidden))
    }


@cache
def _text() -> str:
    return resources.files("tilewise.data").joinpath("sample.txt").read_text(encoding="utf-8")


@cache
def _model() -> tuple[Any, Any]:
    return load_model(bundled_model())


def _captured(words: str, length: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    model, tokenizer = _model()
    return capture(model, torch.tensor(tokenizer(words)["input_ids"])[:length])


def _named(settings: list[Method]) -> list[Setting]:
    """Methods that have a name, labelled by what differs between their settings."""
    values = [{f.name: getattr(m, f.name) for f in dataclasses.fields(m) if f.repr} for m in settings]  # type: ignore[arg-type]
    differ = [name for name in values[0] if any(v[name] != values[0][name] for v in values)]
    labels = [" ".join(f"{name}={v[name]}" for name in differ) or "defaults" for v in values]
    return [everywhere(label, method) for label, method in zip(labels, settings)]


def _psa(mass: float) -> PSA:
    return PSA(((1, mass), (2, mass + 0.1), (4, mass + 0.2), (8, mass + 0.3)))


def _gated(name: str, setting: str, values: tuple[Any, ...]) -> list[Setting]:
    """A method by gates that come with the bundled model."""

    @cache
    def made(value: Any) -> dict[int, Method]:
        return dict(gated(load_gates(bundled_gates(name)), **{setting: value}).methods)

    return [
        by_layer(f"{setting}={value}", lambda layer, _, value=value: made(value)[layer]) for value in values
    ]


@dataclasses.dataclass(frozen=True)
class NativeChoice(Method):
    """The choice of a NativeSparseAttention layer on keys that were not made for it: means for its compression,
    which it starts from, and one softmax over what its selected branch reads. Its other two branches and its gates
    are weights, which no frozen model has."""

    top_n: int

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        layer = NativeSparseAttention(8, q.shape[1], k.shape[1], q.shape[3], top_n=self.top_n)
        return Plan((Pass(view, layer.tiles(layer.choose(q, (k, k, k)), k.shape[2])),), view)


@cache
def _learnt(layer: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Calls on text that is not measured."""
    return [seen[layer] for seen in _lessons()]


@cache
def _lessons() -> list[dict[int, tuple[Tensor, Tensor, Tensor]]]:
    return [_captured(_text()[start : start + 2048], 2048) for start in LEARNT]


def _sla(critical: float) -> Setting:
    """Sparse and linear attention; the projection is solved for, layer by layer, on other text."""

    def make(layer: int, sample: Sample) -> Method:
        module = SLA(sample.v.shape[3], critical=critical)
        module.fit(_learnt(layer), mask="causal")
        return module.method()

    return by_layer(f"critical={critical}", make)


Context = tuple[Sample, SqueezedContext, Tensor]  # the call that follows it, the context, its last queries
_held: dict[int, tuple[Layers, dict[int, Context]]] = {}


def _contexts(layers: Layers) -> dict[int, Context]:
    """Three quarters of every layer's keys as a fixed context, clustered once, and the queries that follow it."""
    if id(layers) not in _held:
        found = {}
        for layer, one in layers.items():
            start = 3 * one.k.shape[2] // 4
            context = SqueezedContext.from_keys(one.k[:, :, :start], 0.05, window=WINDOW)
            tail = Sample.of(one.q[:, :, start:], one.k, one.v)
            found[layer] = (tail, context, one.q[:, :, start - WINDOW : start])
        _held.clear()
        _held[id(layers)] = layers, found
    return _held[id(layers)][1]


def _squeezed(keep: float) -> Setting:
    """Queries after a fixed context, whose clusters were made beforehand; one threshold for all layers."""

    def prepare(layers: Layers) -> Case:
        seen = _contexts(layers)
        _, contexts, queries = zip(*seen.values())
        thresholds = calibrate_thresholds(contexts, queries, keep)
        return lambda layer, _: planned(SqueezedAttention(seen[layer][1], thresholds), seen[layer][0])

    return Setting(f"keep={keep}", prepare)


@cache
def _recipe() -> dict[int, Method]:
    return dict(read_recipe(RECIPE).methods)


def _tuned(length: int, seconds: float) -> list[Setting]:
    """What the search finds for these densities, layer by layer, on the end of the bundled text."""

    @cache
    def board() -> Board:
        return explore(Settings(tokens=length, cost="density", judge="output", seconds=seconds))

    def setting(budget: float) -> Setting:
        def prepare(layers: Layers) -> Case | None:
            try:
                best = board().best(budget)
            except ValueError:  # too short a search can miss what is cheap
                return None
            print(f"tuned for {budget:g}: " + ", ".join(tried.family for tried in best.values()), flush=True)
            return lambda layer, sample: planned(best[layer].method, sample)

        return Setting(f"budget={budget:g}", prepare)

    return [setting(budget) for budget in SHARES]
