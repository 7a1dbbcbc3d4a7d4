"""Paired timing for all benchmarks: every contender in every round, ratios within the round, results as data."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from tilewise import doctor

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One contender in one setting, against the first contender of that setting.

    `ms` is the median; `ratio` how many times as fast as the first, median of the rounds' own ratios, with the
    20th and 80th percentile; `rate` what it achieved on the work it had to do, where that is known, in `unit`.
    """

    setting: str
    provider: str
    ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rate: float | None
    unit: str = "GFLOP/s"


def race(
    setting: str,
    contenders: dict[str, Callable[[], object]],
    work: dict[str, float],
    rounds: int = 7,
    unit: str = "GFLOP/s",
) -> list[Row]:
    """Time the contenders in turns. `work` is in floating-point operations, or bytes for GB/s, by contender.

    Each runs twice in its turn and the second counts: one that comes after another that reads the same tensors
    would find them in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            for counts in (False, True):
                start = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if counts:
                    times[name].append(time.perf_counter() - start)
    first = times[next(iter(times))]
    rows = []
    for name, spent in times.items():
        ratios = torch.tensor([a / b for a, b in zip(first, spent)], dtype=torch.float64)
        low, middle, high = torch.quantile(
            ratios, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        ).tolist()
        seconds = sorted(spent)[len(spent) // 2]
        rate = work[name] / seconds / 1e9 if name in work else None
        rows.append(Row(setting, name, 1000 * seconds, middle, low, high, rate, unit))
        print(
            f"{setting:<52}{name:<22}{1000 * seconds:>9.1f} ms {middle:>7.2f}x [{low:.2f}..{high:.2f}]"
            + (f"{rate:>8.0f} {unit}" if rate else ""),
            flush=True,
        )
    return rows


def tests_pass(*selection: str) -> bool:
    """Whether the tests of what is timed pass: a figure for wrong results is no figure."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *selection], stdout=subprocess.DEVNULL)
    return done.returncode == 0


def save(name: str, rows: list[Row], more: dict[str, object] | None = None) -> Path:
    """Write the rows, and `more` beside them, with the machine they were measured on."""
    path = RESULTS / f"{name}.json"
    result = {
        "benchmark": name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {**doctor.facts(), "threads": torch.get_num_threads()},
        "rows": [asdict(row) for row in rows],
        **(more or {}),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.name}")
    return path
