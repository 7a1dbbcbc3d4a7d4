"""Draws docs/images/selection.svg from benchmarks/results/selection.json: what each method's budget buys.

Needs matplotlib, which the `docs` extra brings. The drawing is the same, byte for byte, for the same data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FLOOR = 1e-3  # errors below stand here: full density is no point of interest
LIMITS = {"oracle": "black", "random": "grey"}  # drawn broken


def main() -> int:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tilewise"
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    run = json.loads((ROOT / "benchmarks/results/selection.json").read_text(encoding="utf-8"))
    inputs = list(dict.fromkeys(row["input"] for row in run["rows"]))
    figure, axes = pyplot.subplots(len(inputs), 2, figsize=(13, 4.6 * len(inputs)), squeeze=False)
    for line, name in zip(axes, inputs):
        methods = list(dict.fromkeys(row["method"] for row in run["rows"] if row["input"] == name))
        for axis, (key, label) in zip(line, (("density", "density"), ("time", "time, dense = 1"))):
            for number, method in enumerate(methods):
                rows = [r for r in run["rows"] if r["input"] == name and r["method"] == method]
                if key == "time" and method in LIMITS:
                    continue  # choosing by true mass is no method, and costs what dense attention does
                _curve(axis, method, number, rows, key)
            axis.set(
                xlabel=label, ylabel="relative error of the output", title=name, xscale="log", yscale="log"
            )
            axis.grid(alpha=0.3)
        line[1].legend(
            *line[0].get_legend_handles_labels(), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1)
        )
    figure.tight_layout()
    path = ROOT / "docs/images/selection.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path.name}")
    return 0


def _curve(axis: Any, method: str, number: int, rows: Sequence[dict[str, Any]], key: str) -> None:
    points = sorted(
        (1 / r["speedup"] if key == "time" else r["density"], max(r["error"], FLOOR)) for r in rows
    )
    across, up = zip(*points)
    style: dict[str, Any] = (
        {"color": LIMITS[method], "ls": "--"} if method in LIMITS else {"color": f"C{number % 10}"}
    )
    marker = "osv^D*Px"[number // 10 % 8] if method not in LIMITS else "."
    if method == "tuned":
        style = {"color": "black", "lw": 2}
    axis.plot(across, up, label=method, marker=marker, ms=3, **{"lw": 1, **style})


if __name__ == "__main__":
    sys.exit(main())
