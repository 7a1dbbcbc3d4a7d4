"""The search on a tiny model: what it writes works, wrong settings are one error, interrupts keep what is there."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import tilewise
from tests import tiny
from tilewise import cli
from tilewise.attention import Dense, MoBA, SinkWindow, as_data, from_data, named, plan
from tilewise.errors import UserError
from tilewise.models import load_model, read_recipe
from tilewise.tune import Sample, Settings, composed, measure, published, run_tune, search
from tilewise.tune.search import Board, Tried, promising


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A line of text, not very long; and 17 more. " * 40)
    return path


@pytest.fixture
def given(model, text, tmp_path):
    return {"model": str(model), "text": text, "tokens": 256, "seconds": 1.5, "out": tmp_path / "mine.json"}


def tune(**given):
    return run_tune(Settings(**given), Console(file=io.StringIO(), width=100))


@pytest.mark.parametrize("judge", ["logits", "output"])
@pytest.mark.parametrize("cost", ["density", "time"])
def test_what_it_writes_works(given, model, judge, cost):
    budget = 0.5 if cost == "density" else 1.0  # at this size nothing is surely faster than dense
    recipe = tune(**given, cost=cost, judge=judge, budget=budget)
    again = read_recipe(given["out"])
    assert again.methods == recipe.methods and again.layers == 3
    about = again.about
    assert (about["cost"], about["judge"], about["budget"], about["tokens"]) == (cost, judge, budget, 256)
    assert about["expected"][cost] <= budget and about["tried"] > 3 and not about["partial"]
    loaded, _ = load_model(str(model))
    tokens = torch.randint(256, (1, 200), generator=torch.Generator().manual_seed(0))
    seen = []
    with torch.no_grad(), tilewise.patch(loaded, given["out"], observer=seen.append):
        loaded(input_ids=tokens)
    for event in seen:
        assert event.method == recipe.methods.get(event.layer, Dense())


def test_compare_takes_the_file(given, text, capfd):
    tune(**given, cost="density")
    with pytest.raises(SystemExit) as stop:
        methods = f"sink-window,{given['out']}"
        cli.main(["compare", given["model"], "--text", str(text), "--tokens", "128", "--methods", methods])
    out, err = capfd.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert "mine" in out and "outdone by" in out


def test_the_command(given, capfd):
    with pytest.raises(SystemExit) as stop:
        options = [
            "--text",
            given["text"],
            "--tokens",
            256,
            "--seconds",
            2,
            "--out",
            given["out"],
            "--cost",
            "density",
        ]
        options += [
            "--judge",
            "output",
            "--budget",
            0.4,
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--seed",
            1,
        ]
        cli.main(["tune", given["model"], *map(str, options)])
    out, err = capfd.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert "what the layers use" in out and f"wrote {given['out']}" in out
    assert json.loads(given["out"].read_text())["about"]["budget"] == 0.4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cost": "money"}, "cost must be time or density, got 'money'"),
        ({"judge": "me"}, "judge must be logits or output, got 'me'"),
        ({"budget": 0.0}, r"budget must be a share of dense attention in \(0, 1\], got 0"),
        ({"budget": 1.5}, "budget must be a share"),
        ({"budget": float("nan")}, "budget must be a share"),
        ({"seconds": 0.0}, "seconds must be a number > 0, got 0"),
        ({"tokens": 10}, "tokens must be at least 64, got 10"),
        ({"tokens": 5000}, "tokens is 5000, but the model's context is 1024"),
        ({"model": "/nowhere/to/be/found"}, "does not exist"),
        ({"device": "toaster"}, "device must be like cpu"),
        ({"dtype": "float31"}, "dtype must be one of"),
    ],
)
def test_wrong_settings(given, change, said):
    given["out"].write_text("older")
    with pytest.raises(UserError, match=said):
        tune(**given | change)
    assert given["out"].read_text() == "older"


def test_files_that_do_not_fit(given, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        tune(**given | {"out": tmp_path / "no" / "where.json"})
    with pytest.raises(UserError, match="is a directory"):
        tune(**given | {"out": tmp_path})
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(UserError, match="the text has 5 tokens"):
        tune(**given | {"text": short, "tokens": None})


def test_a_budget_nothing_meets(given):
    with pytest.raises(UserError, match=r"nothing found costs as little as 0\.001; the least is"):
        tune(**given, cost="density", budget=0.001)
    assert not given["out"].exists()


def test_an_interrupt_keeps_what_was_found(given, monkeypatch):
    real, calls = search._search, []

    def stopping(*args):
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(search, "_search", stopping)
    recipe = tune(**given, cost="density", budget=0.9)
    assert set(recipe.methods) <= {0} and recipe.about["partial"]
    assert read_recipe(given["out"]).about["partial"]


def test_layers_are_held_in_groups(given, monkeypatch):
    """However few fit in memory at once, every layer is searched on its own calls."""
    held, real = [], search._events
    monkeypatch.setattr(search, "_events", lambda *args: held.append(args[2]) or real(*args))
    for limit, groups in ((2**31, {range(3)}), (1, {range(1), range(1, 2), range(2, 3)})):
        held.clear()
        monkeypatch.setattr(search, "HELD", limit)
        found = search.explore(Settings(**given), Console(file=io.StringIO()))
        assert set(held) == groups and list(found.layers) == [0, 1, 2]
        assert all(len(tried) > 1 for tried in found.layers.values())


def test_an_interrupt_before_anything(given, monkeypatch):
    def stopping(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "_search", stopping)
    with pytest.raises(KeyboardInterrupt):
        tune(**given)
    assert not given["out"].exists()


def test_every_named_method_is_searched_over_its_budget():
    """One that is new and has no entry would be searched at its default only; say so here if that is meant."""
    assert set(search.published()) == set(named())
    assert {name for name, settings in published().items() if len(settings) == 1} <= {"dense", "sage2"}


def test_compositions_are_all_different_and_can_be_written():
    every = [method for settings in composed().values() for method in settings]
    assert len({repr(m) for m in every}) == len(every) > 400
    assert all(from_data(as_data(method)) == method for method in every)
    assert all(1 < len(name) < 60 for name in composed())


def test_measure_against_the_definition():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 128, 16, generator=g)
    sample = Sample.of(q, k, v, "causal", 0.3)
    found = measure(SinkWindow(1, 8), sample, repeats=2)
    scores = (0.3 * q @ k.mT).masked_fill(~torch.ones(128, 128).tril().bool(), -torch.inf)
    dense = scores.softmax(-1) @ v
    i, j = torch.arange(128)[:, None], torch.arange(128)
    part = scores.masked_fill(~((j < 1) | (i - j < 8)), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(sample.out, dense)
    torch.testing.assert_close(sample.lse, scores.logsumexp(-1))
    assert found.error == pytest.approx(float((part - dense).norm() / dense.norm()), rel=1e-4)
    assert found.density == plan(SinkWindow(1, 8), q, k, mask="causal").density
    assert found.choose >= 0 and found.attend > 0
    assert measure(Dense(), sample).error < 1e-6


def test_promising_begins_with_the_front():
    tried = [
        Tried(name, MoBA(16, number + 1), cost, error, 1.0)
        for number, (name, cost, error) in enumerate(
            [
                ("far", 0.5, 0.9),
                ("front", 0.1, 0.8),
                ("near", 0.2, 0.35),
                ("front", 0.2, 0.3),
                ("front", 0.6, 0.1),
            ]
        )
    ]
    assert [family for family, _ in promising(tried, "density")] == ["front", "front", "front", "near", "far"]


def test_weights_move_the_budget_to_layers_that_matter():
    choices = [Tried("a", MoBA(16, 1), 0.2, 0.5, 1.0), Tried("b", MoBA(16, 9), 0.8, 0.1, 1.0)]
    alike = Board("density", 99, {0: choices, 1: choices})
    for heavy in (0, 1):
        board = Board("density", 99, alike.layers, {heavy: 1.0, 1 - heavy: 0.01})
        best = board.best(0.5)
        assert (best[heavy].family, best[1 - heavy].family) == ("b", "a")
