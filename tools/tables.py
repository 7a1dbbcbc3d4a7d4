"""Writes the generated tables into README.md and docs/*.md, between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

`papers` comes from the register; `compare` from docs/results/compare.json, a copy of what `make compare` wrote;
`compare-all` and `compare-eighth` from runs with every method, at its defaults and set to read about an eighth of
the tiles; `compare-tuned` from one with docs/results/tuned.json, a recipe that `tilewise tune` wrote;
`bench-NAME` from benchmarks/results (`bench-gated` from recurrence.json), as do `memory-convolution`, `precision`,
`adaptive` and `selection`; `video` from what training/train_video.py measured; `counts` and `left-out` from the
package itself. With --check nothing is written: exit code 1 names the pages that are out of date.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tilewise import attention, papers
from tilewise.compare.catalogue import left_out
from tilewise.recurrence import MIXERS

ROOT = Path(__file__).parent.parent


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers if they look like it."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in body]
    numeric = [all(re.match(r"[-+–\d]", row[i]) for row in cells) for i in range(len(head))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), rule, *cells])


def papers_table() -> str:
    """The register, newest paper first."""
    entries = sorted(papers.load(), key=lambda paper: paper.date, reverse=True)
    return rows(
        ["method", "paper", "published", "room", "object", "evidence"],
        (
            (
                f"`{paper.key}`",
                f"[{paper.title}]({paper.url})",
                str(paper.date),
                paper.room,
                f"`{paper.object}`",
                "<br>".join(f"`{name}`" for name in paper.evidence),
            )
            for paper in entries
        ),
    )


def compare_table(path: Path = ROOT / "docs/results/compare.json") -> str:
    """The run kept in docs/results, with the machine and settings it belongs to."""
    if not path.exists():
        return "*No run is recorded yet.*"
    run = json.loads(path.read_text(encoding="utf-8"))
    machine, settings = run["machine"], run["settings"]
    tasks = list(dict.fromkeys(name for method in run["methods"] for name in method["tasks"]))
    head = ["method", "engine", "density", "prefill", "against dense", "per token", "peak memory"]
    head += ["bits per byte", "mean KL", "top-1 agreement", *tasks]
    table = rows(head, (_compare_row(method, tasks) for method in run["methods"]))
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"
    if machine.get("device_name"):
        where = f"{machine['device_name']}, torch {machine['torch']}"
    what = f"Model: {settings['model']}, {settings['tokens']:,} tokens, {settings['dtype']}"
    return f"{table}\n\n{what}, on {where}, {run['created'][:10]}.\n{run['advice']}"


def bench_table(path: Path) -> str:
    """A recorded benchmark, with the machine it belongs to."""
    if not path.exists():
        return "*No run is recorded yet.*"
    run = json.loads(path.read_text(encoding="utf-8"))
    body = []
    for row in run["rows"]:
        ratio = f"{row['ratio']:.2f}x ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
        rate = "–" if row["rate"] is None else f"{row['rate']:.0f} {row['unit']}"
        body.append([row["setting"], row["provider"], f"{row['ms']:.1f}", ratio, rate])
    table = rows(["work", "by", "ms", "against the first", "rate"], body)
    machine = run["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    return f"{table}\n\nMedians of paired rounds (20th to 80th percentile) on {where}, {run['created'][:10]}."


def gated_table(path: Path) -> str:
    """Gated networks against torch.nn, from the recorded benchmark of recurrences."""
    if not path.exists():
        return "*No run is recorded yet.*"
    run: dict[str, dict[str, str]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row["setting"].startswith(("lstm", "gru")):
            ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
            run.setdefault(row["setting"], {})[row["provider"]] = ratio
    body = []
    for setting, ratios in run.items():
        (what, _, width), kinds = setting.split(", "), ("one head", "8 heads", "8 heads, own inputs")
        cell, _, passes = what.partition(" ")
        body.append([f"{cell.upper()}, {width}, {passes}", *(ratios[kind] for kind in kinds)])
    return rows(["", "one head", "8 heads", '8 heads, `inputs="heads"`'], body)


def memory_table(path: Path) -> str:
    """What a training step of a recorded benchmark holds at once."""
    if not path.exists():
        return "*No run is recorded yet.*"
    held = json.loads(path.read_text(encoding="utf-8"))["memory"]
    body = []
    for n in dict.fromkeys(row["n"] for row in held):
        mine = [row for row in held if row["n"] == n]
        for row in mine:
            share = row["bytes"] / mine[0]["bytes"]
            body.append([f"N={n:,}", row["provider"], f"{row['bytes'] / 1e6:,.0f}", f"{share:.2f}"])
    return rows(["training", "by", "MB", "of the first"], body)


def precision_tables(path: Path) -> tuple[str, str]:
    """A recorded run of benchmarks/precision.py: attention by setting, and models by what is in 8 bits."""
    run = json.loads(path.read_text(encoding="utf-8"))
    head = ["queries and keys", "worst cosine", "relative L1", "with outlier channels"]
    body = [
        [r["setting"], f"{r['cosine']:.4f}", f"{r['l1']:.4f}", f"{r['l1_outliers']:.4f}"] for r in run["rows"]
    ]
    models = [[r["setting"], r["layers"] or "–", f"{r['kl']:.1e}"] for r in run["models"]]
    return rows(head, body), rows(["setting", "layers in int8", "mean KL from the exact model"], models)


BENCHES = ("attention", "recurrence", "transforms", "qmc", "convolution", "gaunt")
DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.5)


def selection_tables(path: Path) -> str:
    """What benchmarks/selection.py measured, for each input: every method's error at these densities, and time."""
    if not path.exists():
        return "*No run is recorded yet.*"
    run = json.loads(path.read_text(encoding="utf-8"))
    parts, single = [], []
    for name in dict.fromkeys(row["input"] for row in run["rows"]):
        mine = [row for row in run["rows"] if row["input"] == name]
        body = []
        for method in dict.fromkeys(row["method"] for row in mine):
            points = sorted(
                (row["density"], row["error"], 1 / row["speedup"]) for row in mine if row["method"] == method
            )
            if len(points) == 1:
                density, error, time = points[0]
                single.append(
                    f"`{method}` on {name}: {density:.0%} of the scores, error {error:.3f}, time {time:.2f}"
                )
                continue
            errors = [between(points, density, 1) for density in DENSITIES]
            time = between(points, 0.2, 2)
            body.append([f"`{method}`", *("–" if x is None else f"{x:.3f}" for x in errors)])
            body[-1].append("–" if time is None else f"{time:.2f}")
        head = [name, *(f"{density:.0%}" for density in DENSITIES), "time at 20%"]
        order = sorted(body, key=lambda row: next((float(x) for x in row[3:4] if x != "–"), 9))
        parts.append(rows(head, order))
    machine = run["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    return (
        "\n\n".join(parts)
        + f"\n\nRelative error of attention's output at these densities, between measured settings"
        f" on a straight line of logarithms, means over layers; and time to choose and attend over that of dense"
        f" attention. {run['tokens']:,} bytes of text, {where}, {run['created'][:10]}."
        + ("\n\nOf one setting: " + "; ".join(single) + "." if single else "")
    )


def between(points: Sequence[tuple[float, ...]], at: float, which: int) -> float | None:
    """Entry `which` of points (density, ...) in rising order at a density, None outside of what was measured."""
    for low, high in zip(points, points[1:]):
        if low[0] <= at <= high[0] and high[0] > low[0] and min(low[which], high[which]) > 0:
            share = math.log(at / low[0]) / math.log(high[0] / low[0])
            return float(math.exp((1 - share) * math.log(low[which]) + share * math.log(high[which])))
    return None


def video_tables(path: Path) -> str:
    """What the bundled video model does on held-out clips, and how much of them its heads need."""
    run = json.loads(path.read_text(encoding="utf-8"))
    losses = rows(
        ["velocity by", "mean squared error"],
        ([name, f"{value:.3f}"] for name, value in run["held_out_loss"].items()),
    )

    def needed(which: str) -> Iterable[list[str]]:
        found = run["needed_for_90_percent"][which]
        for layer, (tiles, keys) in enumerate(zip(found["tiles"], found["keys"], strict=True)):
            shown = [" ".join(f"{100 * part:.0f}" for part in sorted(parts)) for parts in (tiles, keys)]
            yield [f"{which}, layer {layer}", *shown]

    spread = rows(
        ["attention of", "% of tiles, by head", "% of keys, by head"],
        (row for which in ("trained", "untrained") for row in needed(which)),
    )
    made = f"{run['steps']:,} steps in {run['minutes_of_one_core']:.0f} minutes of one core, torch {run['torch']}"
    return (
        f"Held-out clips, evenly spread times ({made}):\n\n{losses}\n\n"
        f"What holds 90 % of the attention mass at time 0.5, the heads of a layer in rising order:\n\n{spread}"
    )


def counts() -> str:
    """How many papers, methods and kernels there are, in a sentence."""
    kinds = [kind for name in attention.__all__ if isinstance(kind := getattr(attention, name), type)]
    methods = [kind for kind in kinds if issubclass(kind, attention.Method)]
    frames = {attention.Method, attention.Recipe, attention.Tiles}
    known = sorted(path.parent.name for path in (ROOT / "src/tilewise/kernels").glob("*/definition.py"))
    engines = {name: importlib.import_module(f"tilewise.kernels.{name}").ENGINES for name in known}
    told = ", ".join(f"`{name}` with {len(found)} engines" for name, found in engines.items())
    return (
        f"{len(papers.load())} papers are in the register. Their attention is {len(set(methods) - frames)} methods,"
        f" {len(attention.named())} of them with a name, their recurrences {len(MIXERS)} mixers, and what is built"
        f" around them; all of it runs on {len(known)} kernels: {told}."
    )


def left_out_table() -> str:
    """Papers about attention that `tilewise compare --methods all` has no row for, by reason."""
    by_reason: dict[str, list[str]] = {}
    for key, why in left_out().items():
        by_reason.setdefault(why, []).append(f"`{key}`")
    return rows(["paper", "why not"], ([", ".join(keys), why] for why, keys in sorted(by_reason.items())))


def _compare_row(method: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    def show(key: str, form: str) -> str:
        return "–" if method.get(key) is None else form.format(method[key])

    quality = [show("bits_per_byte", "{:.3f}"), show("kl_mean", "{:.4f}"), show("top1_agreement", "{:.1%}")]
    found = [method["tasks"].get(name) for name in tasks]
    return [
        method["method"],
        show("engine", "{}"),
        show("density", "{:.1%}"),
        show("prefill_ms", "{:,.0f} ms"),
        show("prefill_speedup", "{:.2f}x"),
        show("decode_ms_per_token", "{:.1f} ms"),
        show("peak_mb", "{:,.0f} MB"),
        *quality,
        *("–" if task is None else f"{task['accuracy']:.1%}" for task in found),
    ]


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with the text between each pair of markers replaced."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        page = re.sub(f"{begin}.*?{end}", lambda _, t=f"{begin}\n{table}\n{end}": t, page, flags=re.DOTALL)  # type: ignore[misc]
    return page


def main(arguments: Sequence[str]) -> int:
    """Fill or check all pages."""
    eighth = compare_table(ROOT / "docs/results/compare-eighth.json")
    precision, adaptive = precision_tables(ROOT / "benchmarks/results/precision.json")
    tables = {
        "precision": precision,
        "adaptive": adaptive,
        "papers": papers_table(),
        "compare": compare_table(),
        "compare-eighth": eighth,
        "compare-tuned": compare_table(ROOT / "docs/results/compare-tuned.json"),
        "compare-all": compare_table(ROOT / "docs/results/compare-all.json"),
        **{f"bench-{name}": bench_table(ROOT / f"benchmarks/results/{name}.json") for name in BENCHES},
        "bench-gated": gated_table(ROOT / "benchmarks/results/recurrence.json"),
        "memory-convolution": memory_table(ROOT / "benchmarks/results/convolution.json"),
        "counts": counts(),
        "left-out": left_out_table(),
        "selection": selection_tables(ROOT / "benchmarks/results/selection.json"),
        "video": video_tables(ROOT / "training/video_results.json"),
    }
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        page = path.read_text(encoding="utf-8")
        filled = fill(page, tables)
        if filled != page:
            stale.append(path)
            if "--check" not in arguments:
                path.write_text(filled, encoding="utf-8")
    for path in stale:
        print(
            f"{path.relative_to(ROOT)}: "
            + ("out of date, run `make docs`" if "--check" in arguments else "written")
        )
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
