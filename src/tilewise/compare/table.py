"""The result as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# (heading, key, format) of the columns that are plain numbers; two tables, so that each fits a terminal
TIME = (
    ("engine", "engine", "{}"),
    ("density", "density", "{:.1%}"),
    ("prefill", "prefill_ms", "{:,.0f}"),
    ("choose", "choose_ms", "{:,.0f}"),
    ("attend", "attention_ms", "{:,.0f}"),
    ("/token", "decode_ms_per_token", "{:.1f}"),
    ("MB", "peak_mb", "{:,.0f}"),
)
QUALITY = (
    ("bits/byte", "bits_per_byte", "{:.4f}"),
    ("change", "bits_per_byte_change", "{:+.4f}"),
    ("KL mean", "kl_mean", "{:.4f}"),
    ("KL p99", "kl_p99", "{:.3f}"),
    ("top-1", "top1_agreement", "{:.1%}"),
)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables, the crossovers, what was left out and why, and the advice."""
    settings, machine = result["settings"], result["machine"]
    where = machine["device_name"] or f"{machine['cpu']}, {settings['threads']} threads"
    console.print(
        f"{settings['model']}, {settings['tokens']:,} tokens, {settings['dtype']}, on {where}"
        + (" (interrupted: measured in part)" if result["partial"] else ""),
        markup=False,
        highlight=False,
    )
    rows = result["methods"]
    time = _table(
        "method", *(head for head, _, _ in TIME[:3]), "vs dense", *(head for head, _, _ in TIME[3:])
    )
    for row in rows:
        cells = _numbers(row, TIME)
        time.add_row(escape(row["method"]), *cells[:3], _ratio(row), *cells[3:])
    console.print(time)
    console.print("times in ms, MB above the loaded model\n", style="dim")
    tasks = list(dict.fromkeys(name for row in rows for name in row["tasks"]))
    quality = _table("method", *(head for head, _, _ in QUALITY), *tasks)
    for row in rows:
        quality.add_row(
            escape(row["method"]), *_numbers(row, QUALITY), *(_score(row["tasks"].get(t)) for t in tasks)
        )
    console.print(quality)
    _rank(result["ranking"], rows, console)
    for crossing in result["crossovers"]:
        when = crossing["note"]
        if crossing["tokens"] is not None:
            when = f"pays from about {crossing['tokens']:,} tokens, {when}"
        console.print(f"{crossing['method']}: {when}", markup=False, highlight=False)
    for name, why in result["left_out"].items():
        console.print(f"{name} was left out: {why}", markup=False, highlight=False)
    for task, note in result["task_notes"].items():
        console.print(f"{task}: {note}", markup=False, highlight=False)
    console.print(result["advice"], markup=False, highlight=False, style="bold")


def _rank(ranking: list[dict[str, Any]], rows: list[dict[str, Any]], console: Console) -> None:
    """The order of the methods, when there is anything to order."""
    if len(ranking) < 3:
        return
    by_name = {row["method"]: row for row in rows}
    table = _table("", "method", "vs dense", "change", "as good", "outdone by")
    for place, entry in enumerate(ranking, 1):
        row = by_name[entry["method"]]
        change = "-" if row["bits_per_byte_change"] is None else f"{row['bits_per_byte_change']:+.4f}"
        others = entry["outdone_by"]
        by = ", ".join(others[:2]) + (f" and {len(others) - 2} more" if len(others) > 2 else "")
        good = "yes" if entry["as_good"] else "no"
        table.add_row(
            str(place), escape(row["method"]), f"{row['prefill_speedup']:.2f}x", change, good, escape(by)
        )
    console.print(table)
    console.print("as good as dense by speed, then the others by bits per byte lost\n", style="dim")


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=bool(number), overflow="fold")
    return table


def _numbers(row: dict[str, Any], columns: tuple[tuple[str, str, str], ...]) -> list[str]:
    return ["-" if row.get(key) is None else escape(form.format(row[key])) for _, key, form in columns]


def _ratio(row: dict[str, Any]) -> str:
    if row["prefill_speedup"] is None:
        return "-"
    spread = f" {row['prefill_speedup_low']:.2f}-{row['prefill_speedup_high']:.2f}"
    return f"{row['prefill_speedup']:.2f}x" + (spread if row["method"] != "dense" else "")


def _score(score: dict[str, Any] | None) -> str:
    return (
        "-"
        if score is None
        else f"{score['accuracy']:.0%} {100 * score['low']:.0f}-{100 * score['high']:.0f}"
    )
