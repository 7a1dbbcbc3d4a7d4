"""benchmarks/selection.py: every method has a row, and an interrupted run goes on where it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tilewise import papers
from tilewise.attention import Method, named
from tilewise.models import gated_names

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def selection(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import selection

    monkeypatch.setattr(selection, "PART", tmp_path / "selection.part.json")
    yield selection
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("selection", "sweeps", "harness"):
            del sys.modules[name]


def test_every_method_of_the_register_has_a_row(selection):
    """On text or on video, under its name or its key; labels of one method differ."""
    every = {"text": selection.text.methods(8192, 1.0), "video": selection.video.methods()}
    rows = {name for methods in every.values() for name in methods}
    wanted = {*named(), *gated_names(), "ada-spa", "flash-block", "native-sparse", "squeezed"}
    wanted -= {"dense", "lawcat"}  # the one skips nothing, the other is a recurrence
    for paper in papers.load():
        kind = papers.resolve(paper) if paper.room == "attention" else None
        if isinstance(kind, type) and issubclass(kind, Method) and not kind.name:
            wanted.add(paper.key)
    assert wanted - rows == set()
    assert {"oracle", "random"} <= set(every["text"]) & set(every["video"])
    assert {"sla", "llsa", "psa"} <= set(every["text"]) & set(every["video"])
    assert {"tuned", "tuned for time"} <= set(every["text"])
    for methods in every.values():
        for name, settings in methods.items():
            labels = [setting.label for setting in settings]
            assert labels and len(set(labels)) == len(labels), name


def test_what_is_there_is_not_measured_again(selection, monkeypatch):
    """Row by row, kept after each; what nothing is found for leaves no row."""
    asked, kept, rows = [], [], {}
    monkeypatch.setattr(selection, "row", lambda case, layers: {"error": float(case)})

    def setting(label: str, case: int | None):
        return selection.Setting(label, lambda layers: asked.append(label) or case)

    methods = {"m": [setting("a", 1), setting("b", None)], "n": [setting("c", 3)]}
    selection.sweep("text", {}, methods, rows, lambda: kept.append(len(rows)))
    assert (asked, kept) == (["a", "b", "c"], [1, 2])
    del rows["text", "n", "c"]
    selection.sweep("text", {}, methods, rows, lambda: kept.append(len(rows)))
    assert (asked[3:], kept[2:]) == (["b", "c"], [2])
    assert rows["text", "m", "a"] == {"input": "text", "method": "m", "setting": "a", "error": 1.0}


def test_rows_are_taken_over_from_the_same_machine_and_length_only(selection, capsys):
    head = selection.header(8192)
    assert selection.resumed(head) == {}
    one = {"input": "text", "method": "m", "setting": "a", "error": 1.0}
    for wrong in ({"tokens": 4096}, {"machine": {**head["machine"], "torch": "other"}}, {}):
        selection.PART.write_text(json.dumps({**head, **wrong, "rows": [one]}))
        found = selection.resumed(head)
        assert found == ({} if wrong else {("text", "m", "a"): one})
        assert ("begun anew" in capsys.readouterr().out) is bool(wrong)
