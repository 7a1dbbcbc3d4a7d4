"""Every sparse method on queries, keys and values of real models: what its budget buys.

    python benchmarks/selection.py [--quick] [--tokens N] [--methods NAME ...] [--inputs NAME ...] [--tune SECONDS]
                                   [--resume]

For each method over a sweep of its budget, in every layer: the share of attention mass it reads token by token, the
relative error of its output, its density, and the time to choose and to attend, against dense attention on the
same engine. Inputs: 8,192 bytes of real text, as many with a pass key in them, and a clip of 2,048 tokens half way
through the video model's sampling. "oracle" chooses tiles by their true mass, which costs more than dense
attention: the upper limit of any choice of whole tiles. "random" is the lower. "tuned" is what `tilewise tune`
finds for density on the end of the text, measured here on its beginning; "tuned for time" the recipe of
docs/results/tuned.json. `sweeps/` has the settings, and what each method that learns was given to learn from.

Rows are kept as they are measured. Interrupted, the run goes on with --resume, which takes over the rows that this
machine and these versions measured at this length. tools/figures.py draws the result as docs/images/selection.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import harness
import torch
from sweeps import text, video
from sweeps.common import Case, Setting

from tilewise import doctor
from tilewise.tune import Sample

LENGTH = 8192
PART = harness.RESULTS / "selection.part.json"
Rows = dict[tuple[str, str, str], dict[str, Any]]  # by input, method and setting


def row(case: Case, layers: Mapping[int, Sample]) -> dict[str, float]:
    """One setting over all layers: sums of times, means of the rest."""
    found = torch.tensor(
        [astuple(case(layer, sample)) for layer, sample in layers.items()], dtype=torch.float64
    )
    density, recall, error, choose, attend, dense = found.unbind(1)
    spent = float(choose.sum() + attend.sum())
    return {
        "density": float(density.mean()),
        "recall": float(recall.mean()),
        "error": float(error.mean()),
        "choose_ms": 1000 * float(choose.sum()),
        "attend_ms": 1000 * float(attend.sum()),
        "dense_ms": 1000 * float(dense.sum()),
        "speedup": float(dense.sum()) / spent,
    }


def sweep(
    name: str,
    layers: Mapping[int, Sample],
    methods: Mapping[str, list[Setting]],
    rows: Rows,
    keep: Callable[[], None],
) -> None:
    """Measure what `rows` lacks of an input; `keep()` after each."""
    for method, settings in methods.items():
        for setting in settings:
            key = (name, method, setting.label)
            if key in rows:
                continue
            begun = time.monotonic()
            case = setting.prepare(layers)
            if case is None:
                print(f"{name:<9}{method:<24}{setting.label}: nothing found", flush=True)
                continue
            rows[key] = dict(zip(("input", "method", "setting"), key)) | row(case, layers)
            keep()
            shown = "  ".join(f"{k} {v:.3g}" for k, v in rows[key].items() if isinstance(v, float))
            print(
                f"{name:<9}{method:<24}{setting.label}: {shown}  ({time.monotonic() - begun:.0f} s)",
                flush=True,
            )


def header(length: int) -> dict[str, Any]:
    """What rows must agree in to stand in one table."""
    return {"tokens": length, "machine": {**doctor.facts(), "threads": torch.get_num_threads()}}


def resumed(head: dict[str, Any]) -> Rows:
    """Rows of an interrupted run of the same length on this machine."""
    if not PART.is_file():
        return {}
    kept = json.loads(PART.read_text())
    if {key: kept.get(key) for key in head} != head:
        print(f"{PART.name} is of another machine, version or length: begun anew", flush=True)
        return {}
    return {(r["input"], r["method"], r["setting"]): r for r in kept["rows"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="1,024 bytes and a short search; nothing is kept"
    )
    parser.add_argument(
        "--tokens", type=int, default=LENGTH, help="bytes of text; other lengths are not recorded"
    )
    parser.add_argument("--methods", nargs="+", help="only these; nothing is recorded until all are there")
    parser.add_argument("--inputs", nargs="+", help="only these, likewise")
    parser.add_argument("--resume", action="store_true", help="go on with what was measured")
    parser.add_argument(
        "--tune", type=float, default=300.0, help="seconds of search for the tuned curve; 0: none"
    )
    options = parser.parse_args()
    length, seconds = (1024, min(options.tune, 20.0)) if options.quick else (options.tokens, options.tune)
    head = header(length)
    rows = resumed(head) if options.resume and not options.quick else {}

    def keep() -> None:
        if not options.quick:
            part = PART.with_suffix(".tmp")
            part.write_text(json.dumps({**head, "rows": list(rows.values())}, indent=1) + "\n")
            os.replace(part, PART)

    inputs: dict[str, tuple[Callable[[], dict[int, Sample]], dict[str, list[Setting]]]] = {
        name: (make, text.methods(length, seconds)) for name, make in text.samples(length).items()
    }
    inputs["video"] = (video.samples, video.methods())
    with torch.no_grad():
        for name, (make, methods) in inputs.items():
            wanted = {m: s for m, s in methods.items() if options.methods is None or m in options.methods}
            missing = any(
                (name, m, one.label) not in rows for m, settings in wanted.items() for one in settings
            )
            if missing and (options.inputs is None or name in options.inputs):
                sweep(name, make(), wanted, rows, keep)
    if options.quick or length != LENGTH or options.methods or options.inputs or not seconds:
        return 0
    order = {(name, m): i for i, (name, m) in enumerate((n, m) for n, (_, ms) in inputs.items() for m in ms)}
    kept = sorted((r for r in rows.values() if (r["input"], r["method"]) in order),
                  key=lambda r: order[r["input"], r["method"]])  # fmt: skip
    harness.save("selection", [], {"tokens": length, "rows": kept})
    PART.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
