"""Every sparse method on queries, keys and values of real models: what its budget buys.

    python benchmarks/selection.py [--quick] [--methods NAME ...] [--inputs NAME ...] [--tune SECONDS]

For each method over a sweep of its budget, in every layer: the share of attention mass it reads token by token, the
relative error of its output, its density, and the time to choose and to attend, against dense attention on the
same engine. Inputs: 4,096 bytes of real text, as many with a pass key in them, and a clip of 2,048 tokens half way
through the video model's sampling. "oracle" chooses tiles by their true mass, which costs more than dense
attention: the upper limit of any choice of whole tiles. "random" is the lower. "tuned" is what `tilewise tune`
finds for density on the end of the text, measured here on its beginning. tools/figures.py draws the result as
docs/images/selection.svg.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import harness
import torch
from torch import Tensor

from tilewise.attention import (
    PISA,
    PSA,
    SVG2,
    SVGEAR,
    AdaSpa,
    Boxes,
    First,
    FPSAttention,
    Mass,
    MeanPool,
    Method,
    Own,
    Plan,
    Pooled,
    RandomTiles,
    Share,
    Skip,
    Tiles,
    TrueMass,
    VMoBA,
    plan,
)
from tilewise.attention.reads import Means
from tilewise.data import passkey
from tilewise.data.shapes import moving_shapes
from tilewise.models import bundled_model, capture, load_model
from tilewise.models.video import capture_video, load_video
from tilewise.tiles import Visibility
from tilewise.tune import Sample, Settings, explore, measure, published

LENGTH = 4096
SKIP = Skip()
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
GRID, BOX = (8, 16, 16), (2, 4, 8)  # of the video's tokens, and of a tile of 64 of them
Setting = Callable[[int, Sample], Method]  # the method for a layer and its tensors


def everywhere(method: Method) -> Setting:
    """The same method in every layer."""
    return lambda layer, sample: method


def tiles(score: Any, causal: bool, rest: Any = SKIP) -> list[Setting]:
    """Whole tiles by `score`, the frame of most published methods; in text with each query's own and the first."""
    given: dict[str, Any] = {"always": (Own(), First())} if causal else {"order": Boxes(GRID, BOX)}
    return [everywhere(Tiles(score, Share(share), (64, 64), rest=rest, **given)) for share in SHARES]


def limits(causal: bool) -> dict[str, list[Setting]]:
    return {"oracle": tiles(TrueMass(), causal), "random": tiles(RandomTiles(), causal)}


def for_text() -> dict[str, list[Setting]]:
    """The settings of every method for text, by its name, from little to much."""
    named = {name: [everywhere(m) for m in found] for name, found in published().items() if name != "dense"}
    pisa = [everywhere(PISA(share)) for share in SHARES]
    return {**limits(True), **named, "pisa": pisa}


@dataclass(frozen=True)
class Kept(Method):
    """What a method for samplers chose at an earlier step: nothing is left to choose."""

    made: Plan

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        return self.made


def adaptive(earlier: Mapping[int, Sample], share: float) -> Setting:
    """AdaSpa's tiles, searched in a step before this one."""

    def setting(layer: int, sample: Sample) -> Method:
        seen = earlier[layer]
        return Kept(AdaSpa(share, search=(0,), order=Boxes(GRID, BOX)).find(seen.q, seen.k, seen.lse))

    return setting


def for_video(earlier: Mapping[int, Sample]) -> dict[str, list[Setting]]:
    """The same for a clip, whose attention is not causal. `earlier` is the same clip at an earlier time."""
    clusters = [SVG2(queries=32, keys=64, threshold=share, least=0.03) for share in (0.2, 0.4, 0.6, 0.8, 0.9)]
    psa = [
        everywhere(
            PSA(((1, part), (2, part + 0.1), (4, part + 0.2), (8, part + 0.3)), order=Boxes(GRID, BOX))
        )
        for part in (0.2, 0.4, 0.6)
    ]
    return {
        **limits(False),
        "mean-pool": tiles(MeanPool(), False),
        "mean-pool + pooled rest": tiles(MeanPool(), False, Pooled()),
        "pisa": [everywhere(PISA(share, order=Boxes(GRID, BOX))) for share in SHARES],
        "psa": psa,
        "svg2": [everywhere(method) for method in clusters],
        "svg-ear": [everywhere(SVGEAR(method)) for method in clusters],
        "ada-spa": [adaptive(earlier, share) for share in SHARES],
        "vmoba": [
            lambda layer, sample, part=part: VMoBA(GRID, layer, select=Mass(part, over="head"))
            for part in (0.1, 0.2, 0.3, 0.45, 0.6)
        ],
        "fps": [
            everywhere(FPSAttention(GRID, BOX, window))
            for window in ((1, 1, 1), (2, 2, 1), (3, 3, 1), (3, 2, 2), (3, 3, 2))
        ],
    }


def text_samples(length: int) -> dict[str, dict[int, Sample]]:
    """Every layer of the language model, on real text and on a pass key hidden in it."""
    model, tokenizer = load_model(bundled_model())
    text = resources.files("tilewise.data").joinpath("sample.txt").read_text(encoding="utf-8")
    hidden = passkey(length, seed=0, filler=text[20_000:].encode(), depth=0.4).text.decode(errors="replace")
    found = {}
    for name, words in (("text", text[: 2 * length]), ("pass key", hidden)):
        tokens = torch.tensor(tokenizer(words)["input_ids"])[:length]
        found[name] = {layer: Sample.of(*qkv) for layer, qkv in capture(model, tokens).items()}
    return found


def video_samples(t: float) -> dict[int, Sample]:
    """Every layer of the video model, at flow time `t` of one clip that was not trained on."""
    clip = moving_shapes(1, seed=0).pixels
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    seen = capture_video(load_video(), t * clip + (1 - t) * noise, t)
    return {layer: Sample.of(*qkv, mask=None) for layer, qkv in seen.items()}


def tuned(seconds: float) -> list[Setting]:
    """What the search finds for these densities, layer by layer, on the end of the bundled text."""
    board = explore(Settings(tokens=LENGTH, cost="density", judge="output", seconds=seconds))
    found: list[Setting] = []
    for budget in SHARES:
        try:
            best = board.best(budget)
        except ValueError:  # too short a search can miss what is cheap
            continue
        print(f"tuned for {budget:g}: " + ", ".join(tried.family for tried in best.values()), flush=True)
        found.append(lambda layer, sample, best=best: best[layer].method)
    return found


def recall(made: Plan, sample: Sample) -> float:
    """Mean share of a query's attention mass that is read token by token."""
    exact = tuple(part for part in made.passes if not isinstance(part.reads, Means))
    if not exact:
        return 0.0
    part = replace(made, passes=exact, added=()).run(
        sample.q, sample.k, sample.v, scale=sample.q.shape[3] ** -0.5
    )
    return float((part.lse - sample.lse).exp().mean())


def row(setting: Setting, layers: Mapping[int, Sample]) -> dict[str, float]:
    """One setting over all layers: sums of times, means of the rest."""
    found = []
    for layer, sample in layers.items():
        made = plan(setting(layer, sample), sample.q, sample.k, mask=sample.mask, v=sample.v)
        got = measure(made, sample, repeats=2)
        found.append((got.density, recall(made, sample), got.error, got.choose, got.attend))
    density, kept, error, choose, spent = torch.tensor(found, dtype=torch.float64).unbind(1)
    dense = sum(sample.seconds for sample in layers.values())
    return {
        "density": float(density.mean()),
        "recall": float(kept.mean()),
        "error": float(error.mean()),
        "choose_ms": 1000 * float(choose.sum()),
        "attend_ms": 1000 * float(spent.sum()),
        "dense_ms": 1000 * dense,
        "speedup": dense / float(choose.sum() + spent.sum()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512 bytes; nothing is kept")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--inputs", nargs="+", help="only these")
    parser.add_argument(
        "--tune", type=float, default=300.0, help="seconds of search for the tuned curve; 0: none"
    )
    options = parser.parse_args()
    length = 512 if options.quick else LENGTH
    rows = []
    with torch.no_grad():
        searched = {"tuned": tuned(options.tune)} if options.tune else {}
        sweeps = {name: (layers, for_text() | searched) for name, layers in text_samples(length).items()}
        sweeps["video"] = (video_samples(0.5), for_video(video_samples(0.45)))
        for name, (layers, methods) in sweeps.items():
            if options.inputs is not None and name not in options.inputs:
                continue
            for method, settings in methods.items():
                if options.methods is not None and method not in options.methods:
                    continue
                for setting in settings:
                    measured = row(setting, layers)
                    shown = str(setting(0, layers[0])) if method != "tuned" else "a method for each layer"
                    rows.append({"input": name, "method": method, "setting": shown, **measured})
                    line = "  ".join(f"{key} {value:.3g}" for key, value in measured.items())
                    print(f"{name:<9}{method:<24}{line}", flush=True)
    if not options.quick and options.methods is None and options.inputs is None:
        harness.save("selection", [], {"tokens": LENGTH, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
