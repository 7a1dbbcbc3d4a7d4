"""What follows from the measurements: where each method starts to pay, and one sentence of advice."""

from __future__ import annotations

import math
from typing import Any

import torch

SLACK_BITS = 0.01  # bits per byte that a method may lose and still be called as good
SLACK_TASK = 0.05  # accuracy, likewise
SHOWN = 4  # digits of the bits per byte that tables show: beyond them lies rounding


def crossovers(lengths: list[dict[str, Any]], methods: list[str]) -> list[dict[str, Any]]:
    """The number of tokens from which each method is faster than dense, from the measured lengths."""
    found = []
    for method in methods:
        rows = sorted(
            (row for row in lengths if method in row["methods"] and "dense" in row["methods"]),
            key=lambda row: row["tokens"],
        )
        if len(rows) >= 2:
            points = [
                (row["tokens"], row["methods"]["dense"]["ms"], row["methods"][method]["ms"]) for row in rows
            ]
            faster = [_sooner(row["methods"][method], row["methods"]["dense"]) for row in rows]
            found.append({"method": method, **_crossover(points, faster)})
    return found


def _sooner(mine: dict[str, float], dense: dict[str, float]) -> bool:
    """Whether times are shorter by more than their spread."""
    return mine.get("high", mine["ms"]) < dense.get("low", dense["ms"])


def _crossover(points: list[tuple[int, float, float]], faster: list[bool]) -> dict[str, Any]:
    """From times by rising length, and at which of them the method is faster by more than the spread."""
    if all(faster):
        return {"tokens": None, "note": f"faster at every measured length, from {points[0][0]:,} tokens"}
    if faster[-1]:
        last = max(i for i, good in enumerate(faster) if not good)
        (a, dense_a, mine_a), (b, dense_b, mine_b) = points[last], points[last + 1]
        gap_a, gap_b = max(0.0, math.log(mine_a / dense_a)), math.log(mine_b / dense_b)
        tokens = math.exp(math.log(a) + (math.log(b) - math.log(a)) * gap_a / (gap_a - gap_b))
        return {"tokens": round(tokens), "note": f"measured between {a:,} and {b:,}"}
    if points[-1][2] < points[-1][1]:
        return {"tokens": None, "note": f"as fast as dense up to {points[-1][0]:,} tokens, within the spread"}
    if len(points) < 3:
        return {
            "tokens": None,
            "note": f"slower up to {points[-1][0]:,} tokens; too few lengths were measured to see a trend",
        }
    beyond = _extrapolate(points)
    if beyond is None:
        return {
            "tokens": None,
            "note": f"slower up to {points[-1][0]:,} tokens, and its trend does not cross",
        }
    return {
        "tokens": None,
        "note": f"slower up to {points[-1][0]:,} tokens; the trend crosses near {beyond:,} (extrapolated)",
    }


def _extrapolate(points: list[tuple[int, float, float]]) -> int | None:
    """Where quadratics through three or more measured times cross, beyond the last; None when they do not."""
    n = torch.tensor([p[0] for p in points], dtype=torch.float64) / points[-1][0]
    gap = torch.tensor([mine - dense for _, dense, mine in points], dtype=torch.float64)
    c, b, a = torch.linalg.lstsq(torch.stack([n**0, n, n**2], 1), gap.unsqueeze(1)).solution[:, 0].tolist()
    if a >= 0 or b * b < 4 * a * c:
        return None
    root = (-b - math.sqrt(b * b - 4 * a * c)) / (2 * a)
    if not 1 < root < 64:
        return None
    return int(float(f"{root * points[-1][0]:.2g}"))


def advice(methods: list[dict[str, Any]], length: int) -> str:
    """One plain sentence, which may be that dense is the right choice."""
    if not methods or methods[0].get("prefill_ms") is None:
        return "Nothing was measured to the end, so there is no advice."
    dense, others = methods[0], [m for m in methods[1:] if m.get("prefill_speedup") is not None]
    if not others:
        return "Only dense attention was measured, so there is nothing to choose from."
    tokens = f"at {length:,} tokens"
    faster = [m for m in others if (m.get("prefill_speedup_low") or 0) > 1]
    if not faster:
        best = max(others, key=lambda m: m["prefill_speedup"])
        return (
            f"Dense is faster here: {tokens} no method reads the prompt surely faster"
            f" (the nearest, {best['method']}, takes {1 / best['prefill_speedup']:.2f} times as long)."
        )
    if dense.get("bits_per_byte") is None:
        best = max(faster, key=lambda m: m["prefill_speedup"])
        return (
            f"{best['method']} reads the prompt {best['prefill_speedup']:.2f} times as fast as dense {tokens};"
            " what that costs in quality was not measured."
        )
    good = [m for m in faster if _as_good(m, dense)]
    if good:
        best = max(good, key=lambda m: m["prefill_speedup"])
        return (
            f"Use {best['method']}: {tokens} it reads the prompt {best['prefill_speedup']:.2f} times as fast"
            f" as dense at {best['bits_per_byte_change']:+.3f} bits per byte" + _kept(best) + "."
        )
    best = max(faster, key=lambda m: m["prefill_speedup"])
    return (
        f"Stay with dense where quality counts: the faster methods lose more than {SLACK_BITS} bits per byte or"
        f" {SLACK_TASK:.0%} of a retrieval task ({best['method']} is {best['prefill_speedup']:.2f} times as fast)."
    )


def ranking(methods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured methods, best first: those as good as dense by their speed, then the others by what they lose.

    What is lost is bits per byte; without them (not asked for) all count as good. Each entry names the methods
    that outdo it, which are at least as fast and at least as good in everything measured, and better in something.
    Speeds differ where the spreads that were measured do not meet, bits per byte where they do as they are shown.
    """
    if not methods:
        return []
    dense, measured = methods[0], [m for m in methods if m.get("prefill_speedup") is not None]

    def good(method: dict[str, Any]) -> bool:
        unknown = dense.get("bits_per_byte_change") is None
        return method is dense or unknown or _as_good(method, dense)

    def order(method: dict[str, Any]) -> tuple[bool, float]:
        fine = good(method)
        return not fine, -method["prefill_speedup"] if fine else method["bits_per_byte_change"]

    ranked = sorted(measured, key=order)
    return [
        {
            "method": method["method"],
            "as_good": good(method),
            "outdone_by": [other["method"] for other in ranked if _outdoes(other, method)],
        }
        for method in ranked
    ]


def _outdoes(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `one` is at least as fast and as good in everything, and better in something."""
    (low, high), (other_low, other_high) = _spread(one), _spread(other)
    better = [low > other_high]
    worse = [high < other_low]
    pairs = []
    if one.get("bits_per_byte_change") is not None and other.get("bits_per_byte_change") is not None:
        pairs.append(tuple(-round(x["bits_per_byte_change"], SHOWN) for x in (one, other)))
    for task, score in other.get("tasks", {}).items():
        if task in one.get("tasks", {}):
            pairs.append((one["tasks"][task]["accuracy"], score["accuracy"]))
    better += [a > b for a, b in pairs]
    worse += [a < b for a, b in pairs]
    return any(better) and not any(worse)


def _spread(method: dict[str, Any]) -> tuple[float, float]:
    """The 20th and 80th percentile of the speed against dense, that of dense itself without any."""
    middle = method["prefill_speedup"]
    return tuple(method.get(f"prefill_speedup_{end}") or middle for end in ("low", "high"))


def _as_good(method: dict[str, Any], dense: dict[str, Any]) -> bool:
    change = method.get("bits_per_byte_change")
    if change is None or change > SLACK_BITS:
        return False
    kept = method.get("tasks", {})
    return all(
        task in kept and kept[task]["accuracy"] >= score["accuracy"] - SLACK_TASK
        for task, score in dense.get("tasks", {}).items()
    )


def _kept(method: dict[str, Any]) -> str:
    tasks = method.get("tasks", {})
    if not tasks:
        return ""
    return ", with " + " and ".join(f"{task} at {score['accuracy']:.0%}" for task, score in tasks.items())
