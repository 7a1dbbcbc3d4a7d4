"""Runs a comparison: measures, shows progress, writes the reports, and keeps what it has when interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tilewise import papers
from tilewise.attention import Method
from tilewise.attention.written import settings
from tilewise.compare import conclude, maps, material, page, quality, table, timing
from tilewise.compare.catalogue import Choice, label
from tilewise.compare.settings import Settings
from tilewise.errors import UserError
from tilewise.files import write_text
from tilewise.models import Event, ModelRecipe, gated_names, patch
from tilewise.version import __version__

SHORTER = (8, 4, 2)  # further lengths for the crossover: this fraction of the tokens


def run_compare(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Run the comparison that `settings` asks for; print its table, write its reports, return its result.

    Raises UserError for anything the caller got wrong, before measuring. A KeyboardInterrupt while measuring
    ends the run: what was measured is printed and written, marked partial, and the interrupt raised again.
    """
    console = console or Console()
    methods = settings.configured()
    run = Run(settings, methods, material.prepare(settings), console)
    interrupt = None
    try:
        run.measure()
    except KeyboardInterrupt as caught:
        interrupt = caught
    result = run.result(partial=interrupt is not None)
    table.show(result, console)
    failed = []
    for path, write in ((settings.json, write_json), (settings.out, page.write)):
        if path is not None:
            try:
                write(result, path)
                console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
            except OSError as error:  # it was writable at the start; the other file may still be
                failed.append(f"cannot write {str(path)!r}: {error.strerror or error}")
    if interrupt is not None:
        raise interrupt
    if failed:
        raise UserError("; ".join(failed))
    return result


def write_json(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the result as JSON, whole or not at all."""
    write_text(json.dumps(page.finite(result), indent=1, allow_nan=False) + "\n", path)


@dataclass
class Observed:
    """What one observed prefill says: sums over layers, and what ran."""

    choose_ms: float = 0.0
    attention_ms: float = 0.0
    densities: list[float] = field(default_factory=list)
    engines: set[str] = field(default_factory=set)

    def __call__(self, event: Event) -> None:
        self.choose_ms += 1000 * (event.plan.seconds or 0.0)
        self.attention_ms += 1000 * event.seconds
        self.densities.append(event.plan.density)
        self.engines |= set(event.engines)


@dataclass
class Run:
    """One comparison under way; every phase fills more of `rows`."""

    settings: Settings
    methods: dict[str, Choice]
    on: material.Material
    console: Console
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, quality.Score] = field(default_factory=dict)
    collected: dict[str, maps.Collector] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def measure(self) -> None:
        """Every phase, the most telling first."""
        for name, method in self.methods.items():
            self.rows[name] = self._blank(name, method)
        self._usable()
        with self._progress() as progress:
            self._fidelity(progress)
            self._prefill(progress, self.on.tokens.shape[1], self.settings.repeats)
            self._decode(progress)
            self._retrieval(progress)
            for part in SHORTER:
                if self.on.tokens.shape[1] // part >= 256:
                    self._prefill(progress, self.on.tokens.shape[1] // part, 3)
            self._maps(progress)

    def patched(self, name: str, check: bool = False, **options: Any) -> AbstractContextManager:
        """The model with this method; dense is the model as it came, with its own attention."""
        if name == "dense" and not options:
            return nullcontext()
        method = self.methods[name]
        decode = method if "decode" in method.modes else "dense"
        return patch(self.on.model, method, decode=decode, check=check, **options)

    def _blank(self, name: str, method: Choice) -> dict[str, Any]:
        key = name.partition(":")[0]
        known = (
            not isinstance(method, ModelRecipe) or key in gated_names()
        )  # a recipe's name is that of its file
        paper = next((p for p in papers.load() if known and p.key == key), None)
        numbers = (
            "engine", "density", "prefill_ms", "prefill_ms_low", "prefill_ms_high", "prefill_speedup",
            "prefill_speedup_low", "prefill_speedup_high", "first_call_ms", "choose_ms", "attention_ms",
            "decode_ms_per_token", "peak_mb", "bits_per_byte", "bits_per_byte_change", "kl_mean", "kl_p99",
            "top1_agreement",
        )  # fmt: skip
        return {
            "method": name,
            "parameters": settings(method) if isinstance(method, Method) else method.parameters(),
            "paper": None if paper is None else {"id": paper.id, "title": paper.title},
            "modes": list(method.modes),
            "reads": method.reads,
            "needs": method.needs,
            "lookahead": method.lookahead,
            **dict.fromkeys(numbers),
            "tasks": {},
            "reasons": {},
        }

    @torch.inference_mode()
    def _usable(self) -> None:
        """Patch once with every method, leak check included, and read a little, so that what cannot work is said at
        the start. What nobody asked for by name is left out instead, with the reason.
        """
        asked = {label(text) for text in self.settings.methods}
        for name, method in list(self.methods.items()):
            try:
                with patch(self.on.model, method, check=name != "dense"):
                    self.on.model(input_ids=self.on.tokens[:, :256], use_cache=False, logits_to_keep=1)
            except UserError:
                raise
            except ValueError as error:  # what the bridge refuses when the model first calls it
                if name in asked:
                    raise UserError(f"{type(self.on.model).__name__} cannot run {name}: {error}") from error
                self.left_out[name] = str(error)
                del self.methods[name], self.rows[name]

    def _fidelity(self, progress: Progress) -> None:
        """Quality on the text, from a pass that also serves as the warm-up."""
        task = progress.add_task("quality on the text", total=len(self.methods))
        if "perplexity" not in self.settings.tasks:
            for row in self.rows.values():
                for key in ("bits_per_byte", "bits_per_byte_change", "kl_mean", "kl_p99", "top1_agreement"):
                    row["reasons"][key] = "perplexity was not asked for"
        at = quality.positions(self.on)
        dense = None
        for name, row in self.rows.items():
            with self.patched(name):
                row["first_call_ms"] = timing.prefill(self.on.model, self.on.tokens)
                if "perplexity" in self.settings.tasks:
                    mine = quality.log_probabilities(self.on, at)
                    dense = mine if dense is None else dense
                    row.update(quality.fidelity(self.on, at, dense, mine))
                    row["bits_per_byte_change"] = row["bits_per_byte"] - self.rows["dense"]["bits_per_byte"]
            progress.advance(task)

    def _prefill(self, progress: Progress, length: int, repeats: int) -> None:
        """Prefill times in rounds: each round times every method once, so that ratios are of neighbours."""
        tokens = self.on.tokens[:, :length]
        whole = length == self.on.tokens.shape[1]
        task = progress.add_task(f"prefill of {length:,} tokens", total=(repeats + 1) * len(self.methods))
        times: dict[str, list[float]] = {name: [] for name in self.methods}
        try:
            for round_ in range(repeats + 1):
                for name in self.methods:
                    with self.patched(name):
                        memory = timing.PeakMemory(self.on.device)
                        with memory if whole and round_ == 0 else nullcontext():
                            spent = timing.prefill(self.on.model, tokens)
                    if round_:
                        times[name].append(spent)
                    elif whole:
                        self._store_memory(name, memory)
                    progress.advance(task)
        finally:
            self._store_times(times, length, whole)
        if whole:
            for name in self.rows:
                self._observe(name)

    def _store_times(self, times: dict[str, list[float]], length: int, whole: bool) -> None:
        """What the finished rounds say: an interruption loses only the round under way."""
        rounds = min(map(len, times.values()))
        if not rounds:
            return
        times = {name: values[:rounds] for name, values in times.items()}
        spreads = {name: timing.spread(values) for name, values in times.items()}
        self.lengths.append({"tokens": length, "methods": spreads})
        self.lengths.sort(key=lambda row: row["tokens"])
        if whole:
            for name, row in self.rows.items():
                ratios = timing.spread([d / m for d, m in zip(times["dense"], times[name], strict=True)])
                row.update(prefill_ms=spreads[name]["ms"], prefill_ms_low=spreads[name]["low"])
                row.update(prefill_ms_high=spreads[name]["high"], prefill_speedup=ratios["ms"])
                row.update(prefill_speedup_low=ratios["low"], prefill_speedup_high=ratios["high"])

    def _store_memory(self, name: str, memory: timing.PeakMemory) -> None:
        self.rows[name]["peak_mb"] = memory.mb
        if memory.reason:
            self.rows[name]["reasons"]["peak_mb"] = memory.reason

    def _observe(self, name: str) -> None:
        seen = Observed()
        with self.patched(name, observer=seen):
            timing.prefill(self.on.model, self.on.tokens)
        row = self.rows[name]
        row.update(choose_ms=seen.choose_ms, attention_ms=seen.attention_ms)
        row["density"] = statistics.fmean(seen.densities)
        row["engine"] = "+".join(sorted(seen.engines))
        if name == "dense":
            row["engine"] = str(self.on.model.config._attn_implementation)

    def _decode(self, progress: Progress) -> None:
        task = progress.add_task("time per generated token", total=len(self.methods))
        for name, row in self.rows.items():
            if self.on.tokens.shape[1] < 64:
                row["reasons"]["decode_ms_per_token"] = "the text is too short"
                continue
            with self.patched(name):
                row["decode_ms_per_token"] = timing.decode(self.on.model, self.on.tokens)
            row["decodes_with"] = name if "decode" in self.methods[name].modes else "dense"
            progress.advance(task)

    def _retrieval(self, progress: Progress) -> None:
        """The retrieval tasks, dense first; tasks that the dense model cannot do are not asked of the others."""
        made = quality.questions(self.on, self.settings.tasks, self.settings.seed)
        for wanted in {*self.settings.tasks} - {"perplexity"} - {question.task for question in made}:
            self.notes[wanted] = f"{self.on.tokens.shape[1]:,} tokens are too few for it"
        task = progress.add_task("retrieval", total=len(made) * len(self.methods))
        for name, row in self.rows.items():
            score = quality.Score()
            for question in made:
                if question.task not in self.notes:
                    with self.patched(name):
                        score.add(question, quality.answer(self.on, question))
                progress.advance(task)
            if name == "dense":
                for done, reached in list(score.tasks().items()):
                    if reached["accuracy"] < quality.GATE:
                        need = f"below {quality.GATE:.0%}: not shown"
                        self.notes[done] = f"dense reaches {reached['accuracy']:.0%}, {need}"
                        score.forget(done)
            row["tasks"], self.scores[name] = score.tasks(), score

    def _maps(self, progress: Progress) -> None:
        tokens = self.on.tokens[:, : maps.LONGEST]
        wanted = maps.layers(self.on.model.config.get_text_config().num_hidden_layers)
        task = progress.add_task("tile maps", total=len(self.methods))
        for name in self.methods:
            collector = maps.Collector(name, wanted)
            with self.patched(name, observer=collector):
                timing.prefill(self.on.model, tokens)
            self.collected[name] = collector
            progress.advance(task)

    def result(self, partial: bool) -> dict[str, Any]:
        """Everything measured so far."""
        rows = list(self.rows.values())
        for row in rows:
            if partial:
                for key, value in row.items():
                    if value is None and key != "paper":
                        row["reasons"].setdefault(key, "interrupted before it was measured")
                if row["method"] not in self.scores:
                    row["reasons"].setdefault("tasks", "interrupted before it was measured")
        collected = list(self.collected.values())
        return {
            "tilewise": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["tilewise", *sys.argv[1:]]),
            "partial": partial,
            "machine": material.machine(self.on.device),
            "settings": material.described(self.settings, self.on),
            "methods": rows,
            "left_out": self.left_out,
            "task_notes": self.notes,
            "lengths": self.lengths,
            "crossovers": conclude.crossovers(
                self.lengths, [name for name in self.methods if name != "dense"]
            ),
            "heatmap": [entry for name, score in self.scores.items() for entry in score.heatmap(name)],
            "tile_maps": {
                "tokens": min(self.on.tokens.shape[1], maps.LONGEST),
                "tile": [maps.TILE, maps.TILE],
                "layers": sorted({entry["layer"] for c in collected for entry in c.kept}),
                "heads": len({entry["head"] for c in collected for entry in c.kept}),
                "mass": [entry for c in collected for entry in c.mass],
                "kept": [entry for c in collected for entry in c.kept],
            },
            "ranking": conclude.ranking(rows),
            "advice": conclude.advice(rows, self.on.tokens.shape[1]),
        }

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Progress]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield progress
