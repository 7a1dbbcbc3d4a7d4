"""The comparison on a tiny random model: the shape of its result, what its figures mean, and interruption."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import tilewise
from tests import tiny
from tilewise import cli, papers
from tilewise.attention import PISA, Dense, MoBA, PBSAttention, Plan, SinkWindow, XAttention, named
from tilewise.attention.gates import BlockGate, Gates
from tilewise.compare import Settings, conclude, maps, page, quality, run, run_compare, timing
from tilewise.compare.catalogue import BY_NAME, everything, left_out, parse_method, unnamed
from tilewise.errors import UserError
from tilewise.models import gated_names, save_gates

TOKENS = 640  # whole tiles, so that drawn tile maps can be counted against densities
SPARSE = (
    "moba:block=32:top_k=4",
    "xattention:tile=32:threshold=0.5",
    "pbs:tile=32:segment=64:threshold=0.5",
    "sink-window:window=64",
)
TASKS = ("perplexity", "recall", "passkey")
NULL = type(None)
NUMBER = (int, float)
ROW = {
    "method": str, "parameters": dict, "paper": (dict, NULL), "modes": list, "reads": str, "needs": str,
    "lookahead": str,
    "engine": str, "density": float, "prefill_ms": float, "prefill_ms_low": float, "prefill_ms_high": float,
    "prefill_speedup": float, "prefill_speedup_low": float, "prefill_speedup_high": float,
    "first_call_ms": float, "choose_ms": float, "attention_ms": float, "decode_ms_per_token": float,
    "decodes_with": str, "peak_mb": float, "bits_per_byte": float, "bits_per_byte_change": float,
    "kl_mean": float, "kl_p99": float, "top1_agreement": float, "tasks": dict, "reasons": dict,
}  # fmt: skip
WHOLE = {
    "tilewise": str, "created": str, "command": str, "partial": bool, "machine": dict, "settings": dict,
    "methods": list, "left_out": dict, "task_notes": dict, "lengths": list, "crossovers": list, "heatmap": list,
    "tile_maps": dict, "ranking": list, "advice": str,
}  # fmt: skip
MACHINE = {
    "cpu": str, "cores": int, "memory_gb": NUMBER, "os": str, "python": str, "torch": str,
    "transformers": str, "device": str, "device_name": (str, NULL),
}  # fmt: skip
SETTINGS = {
    "model": str, "layers": int, "heads": int, "kv_heads": int, "head_dim": int, "context": int, "text": str,
    "text_preview": str, "tokens": int, "dtype": str, "seed": int, "repeats": int, "warmup": int,
    "threads": int, "tasks": list,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("models") / "tiny"))


def _compare(model, **given):
    options = {"model": model, "tokens": 300, "methods": (), "tasks": ("perplexity",), "repeats": 1}
    return run_compare(Settings(**options | given), Console(file=io.StringIO(), width=200))


@pytest.fixture(scope="module")
def result(model, tmp_path_factory):
    """One run of everything, as the JSON file has it."""
    path = tmp_path_factory.mktemp("reports") / "compare.json"
    _compare(model, tokens=TOKENS, methods=SPARSE, tasks=TASKS, repeats=2, json=path)
    return json.loads(path.read_text(encoding="utf-8"))


def _shaped(value, wanted):
    assert set(value) == set(wanted)
    for key, kind in wanted.items():
        assert isinstance(value[key], kind), (key, value[key])


# --- the shape of the result


def test_result_has_every_key_with_its_type(result):
    _shaped(result, WHOLE)
    _shaped(result["machine"], MACHINE)
    _shaped(result["settings"], SETTINGS)
    for row in result["methods"]:
        _shaped(row, ROW)
    assert result["partial"] is False
    assert result["tilewise"] == tilewise.__version__
    assert result["machine"]["torch"] == torch.__version__
    assert [row["tokens"] for row in result["lengths"]] == [TOKENS // 2, TOKENS]
    for row in result["lengths"]:
        assert set(row["methods"]) == {"dense", *SPARSE}
        assert all(set(value) == {"ms", "low", "high"} for value in row["methods"].values())
    assert [set(crossing) for crossing in result["crossovers"]] == [{"method", "tokens", "note"}] * len(
        SPARSE
    )


def test_settings_are_the_ones_used(result, model):
    settings = result["settings"]
    assert (settings["model"], settings["tokens"], settings["context"]) == (model, TOKENS, 1024)
    assert (settings["layers"], settings["heads"], settings["kv_heads"], settings["head_dim"]) == (3, 4, 2, 8)
    assert (settings["seed"], settings["repeats"], settings["dtype"]) == (0, 2, "float32")


def test_times_and_densities_are_sensible(result):
    for row in result["methods"]:
        assert 0 < row["prefill_ms_low"] <= row["prefill_ms"] <= row["prefill_ms_high"]
        assert row["prefill_speedup_low"] <= row["prefill_speedup"] <= row["prefill_speedup_high"]
        assert row["choose_ms"] >= 0 < row["attention_ms"]
        assert row["peak_mb"] >= 0 < row["decode_ms_per_token"]
        assert row["kl_p99"] >= 0 <= row["kl_mean"]
        change = row["bits_per_byte"] - result["methods"][0]["bits_per_byte"]
        assert row["bits_per_byte_change"] == pytest.approx(change)
    assert all(row["density"] < 0.9 for row in result["methods"][1:])
    moba = result["methods"][1]
    assert (moba["parameters"], moba["paper"]["id"]) == ({"block": 32, "top_k": 4}, 15)
    assert moba["decodes_with"] == moba["method"], "MoBA decodes with itself"
    assert result["methods"][3]["decodes_with"] == "dense", "PBS-Attn reads prompts only"


def test_dense_is_first_and_the_measure_of_all(result):
    dense = result["methods"][0]
    assert dense["method"] == "dense"
    assert (dense["prefill_speedup"], dense["density"], dense["engine"]) == (1, 1, "sdpa")
    assert (dense["kl_mean"], dense["kl_p99"], dense["top1_agreement"]) == (0, 0, 1)
    assert dense["bits_per_byte_change"] == 0


def test_bits_per_byte_are_those_of_the_model(result, model):
    """Against the loss that transformers computes; the tiny model has a token per byte."""
    loaded, tokenizer = tilewise.models.load_model(model)
    text = tilewise.compare.material.read_text(None)
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :TOKENS]
    with torch.no_grad():
        loss = loaded(tokens, labels=tokens).loss.item()
    assert result["methods"][0]["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)


def test_full_density_is_dense(model):
    full = ("moba:block=32:top_k=1000", "xattention:tile=32:threshold=1", "sink-window:window=5000",
            "pbs:tile=32:segment=64:threshold=1")  # fmt: skip
    control = "sink-window:sink=0:window=2"
    rows = _compare(model, methods=(*full, control))["methods"]
    assert [row["method"] for row in rows] == ["dense", *full, control]
    for row in rows[:-1]:
        assert row["kl_p99"] < 1e-6, row["method"]
        assert row["top1_agreement"] == 1, row["method"]
        assert abs(row["bits_per_byte_change"]) < 1e-5
    assert rows[-1]["kl_mean"] > 1e-3
    assert rows[-1]["top1_agreement"] < 0.9


def test_fidelity_by_hand(model):
    """Two positions, three tokens; KL is from dense to the method, in nats."""
    on = run.material.prepare(Settings(model=model, tokens=3))
    on = replace(on, tokens=torch.tensor([[0, 1, 0]]), bytes_per_token=2.0)
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    mine = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.25, 0.625]]).log()
    found = quality.fidelity(on, torch.tensor([0, 1]), dense, mine)
    kl = 0.5 * math.log(0.5 / 0.125) + 0.25 * math.log(0.25 / 0.625)
    assert found["bits_per_byte"] == pytest.approx((2 + 3) / 2 / 2)
    assert found["kl_mean"] == pytest.approx(kl / 2, rel=1e-5)
    assert found["kl_p99"] == pytest.approx(0.99 * kl, rel=1e-5)
    assert found["top1_agreement"] == 0.5


def test_rounds(model, monkeypatch):
    """Every round times every method, the first is not counted, and ratios are of one round."""
    asked = []
    taken = {"dense": iter([999, 10, 20, 40] * 2), "moba": iter([1, 5, 10, 20] * 2)}

    def patched(self, name, *args, patched=run.Run.patched, **kwargs):
        asked.append(name)
        return patched(self, name, *args, **kwargs)

    monkeypatch.setattr(run.Run, "patched", patched)
    monkeypatch.setattr(run.Run, "_fidelity", lambda self, progress: asked.clear())
    monkeypatch.setattr(run.Run, "_observe", lambda self, name: None)
    monkeypatch.setattr(run.Run, "_decode", _interrupt)
    monkeypatch.setattr(timing, "prefill", lambda *args: next(taken[asked[-1]]))
    kept = []
    monkeypatch.setattr(run.table, "show", lambda result, console: kept.append(result))
    with pytest.raises(KeyboardInterrupt):
        _compare(model, methods=("moba",), repeats=3)
    assert asked == ["dense", "moba"] * 4
    dense, moba = kept[0]["methods"]
    assert (dense["prefill_ms"], moba["prefill_ms"]) == (20, 10)
    assert (moba["prefill_ms_low"], moba["prefill_ms_high"]) == pytest.approx((7, 16))
    assert {moba[f"prefill_speedup{end}"] for end in ("", "_low", "_high")} == {2}


def test_choosing_and_attending_are_summed_over_layers(model):
    loaded, _ = tilewise.models.load_model(model)
    events, seen = [], run.Observed()
    with tilewise.patch(loaded, "moba", observer=events.append), torch.no_grad():
        loaded(torch.arange(100).unsqueeze(0))
    for event in events:
        seen(event)
    assert len(events) == 3
    assert seen.choose_ms == pytest.approx(1000 * sum(event.plan.seconds for event in events))
    assert seen.attention_ms == pytest.approx(1000 * sum(event.seconds for event in events))
    assert (seen.engines, len(seen.densities)) == ({"native"}, 3)


def test_equal_seeds_give_equal_figures(model):
    first, second = (_compare(model, methods=("xattention:tile=32",))["methods"] for _ in range(2))
    for key in ("density", "bits_per_byte", "kl_mean", "kl_p99", "top1_agreement"):
        assert [row[key] for row in first] == [row[key] for row in second]
    on = run.material.prepare(Settings(model=model, tokens=TOKENS))
    one, same, other = (quality.questions(on, TASKS, seed) for seed in (1, 1, 2))
    assert one == same != other


def test_dense_is_not_run_twice(model):
    rows = _compare(model, tokens=40, methods=("sink-window", "dense"))["methods"]
    assert [row["method"] for row in rows] == ["dense", "sink-window"]


def test_what_was_not_measured_has_a_reason(model):
    """Two tokens: nothing to decode; no perplexity asked for; too short for the task."""
    found = _compare(model, tokens=2, methods=("sink-window",), tasks=("recall",))
    for row in found["methods"]:
        missing = {key for key, value in row.items() if value is None and key != "paper"}
        assert {"decode_ms_per_token", "bits_per_byte", "kl_mean"} <= missing
        assert missing == set(row["reasons"])
    assert found["task_notes"] == {"recall": "2 tokens are too few for it"}
    assert page.render(found)


# --- retrieval


def test_a_task_that_dense_cannot_do_is_not_shown(result):
    assert all(row["tasks"] == {} for row in result["methods"])
    assert result["heatmap"] == []
    assert set(result["task_notes"]) == {"recall", "passkey"}
    assert all("below 90%: not shown" in note for note in result["task_notes"].values())


def _answers(monkeypatch, right):
    """Questions are answered as `right(method, question, answer number)` says instead of by the model."""
    asked = []

    def patched(self, name, *args, patched=run.Run.patched, **kwargs):
        asked.append(name)
        return patched(self, name, *args, **kwargs)

    monkeypatch.setattr(run.Run, "patched", patched)
    monkeypatch.setattr(
        quality, "answer", lambda on, q: [right(asked[-1], q, i) for i in range(len(q.answers))]
    )


def test_tasks_are_shown_with_intervals_when_dense_does_them(model, monkeypatch):
    _answers(
        monkeypatch, lambda name, q, i: q.task == "passkey" and (name == "dense" or q.length == TOKENS // 2)
    )
    found = _compare(model, tokens=TOKENS, methods=("sink-window",), tasks=("recall", "passkey"))
    dense, other = (row["tasks"] for row in found["methods"])
    assert set(dense) == set(other) == {"passkey"}
    assert dense["passkey"] == quality.wilson(20, 20)
    assert other["passkey"] == quality.wilson(10, 20)
    assert "dense reaches 0%" in found["task_notes"]["recall"]
    assert [(entry["method"], entry["task"]) for entry in found["heatmap"]] == [
        ("dense", "passkey"), ("sink-window", "passkey"),
    ]  # fmt: skip
    cells = found["heatmap"][1]["cells"]
    assert {(cell["length"], cell["depth"]) for cell in cells} == {
        (length, depth) for length in (TOKENS // 2, TOKENS) for depth in quality.DEPTHS
    }
    assert all(cell["accuracy"] == (cell["length"] == TOKENS // 2) and cell["n"] == 2 for cell in cells)


def test_the_gate_is_at_90_percent(model, monkeypatch):
    """Of 20 pass keys, 18 are enough and 17 are not."""
    for wrong, shown in ((2, True), (3, False)):
        counter = iter(range(1000))
        _answers(monkeypatch, lambda name, q, i, wrong=wrong, counter=counter: next(counter) >= wrong)
        found = _compare(model, tokens=TOKENS, tasks=("passkey",))
        assert ("passkey" in found["methods"][0]["tasks"]) is shown
        assert ("passkey" in found["task_notes"]) is not shown


def test_answers_are_by_teacher_forcing(model, monkeypatch):
    """A model that always continues rightly gets everything, one that is wrong in the last byte nothing."""
    on = run.material.prepare(Settings(model=model, tokens=TOKENS))
    made = quality.questions(on, ("recall", "passkey"), seed=0)
    assert {q.task for q in made} == {"recall", "passkey"}
    for question in made:
        ends = {last - 1 for _, last in question.answers}
        for spoiled in (set(), ends):

            class Oracle:
                def __call__(self, input_ids, logits_to_keep, use_cache, spoiled=spoiled):
                    following = input_ids[0, logits_to_keep + 1].clone()
                    for i, place in enumerate((logits_to_keep + 1).tolist()):
                        following[i] = (following[i] + (place in spoiled)) % 256
                    logits = torch.nn.functional.one_hot(following, 257).float()
                    return type("Output", (), {"logits": logits.unsqueeze(0)})

            answers = quality.answer(replace(on, model=Oracle()), question)
            assert answers == [not spoiled] * len(question.answers)


def test_answers_are_what_the_text_says(model):
    on = run.material.prepare(Settings(model=model, tokens=TOKENS))
    for question in quality.questions(on, ("recall", "passkey"), seed=3):
        text = bytes(question.tokens)
        for first, last in question.answers:
            answer = text[first:last]
            assert answer.isdigit()
            before = text[:first]
            key = before[-39:] if question.task == "passkey" else before[before.rfind(b" ") :]
            if question.task == "passkey":
                assert key == b" What is the pass key? The pass key is " and answer in before
            else:
                assert key + answer in before


# Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_the_published_interval(right, n, low, high):
    found = quality.wilson(right, n)
    assert (found["accuracy"], found["n"]) == (right / n, n)
    assert found["low"] == pytest.approx(low, abs=6e-5)
    assert found["high"] == pytest.approx(high, abs=6e-5)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_accuracy_and_mirrors(counts):
    right, n = counts
    found, mirrored = quality.wilson(right, n), quality.wilson(n - right, n)
    assert 0 <= found["low"] <= found["accuracy"] + 1e-12 and found["accuracy"] - 1e-12 <= found["high"] <= 1
    assert found["low"] == pytest.approx(1 - mirrored["high"], abs=1e-9)


# --- crossovers and advice


def _lengths(points):
    return [
        {"tokens": n, "methods": {"dense": {"ms": dense}, "m": {"ms": mine}}} for n, dense, mine in points
    ]


def _crossing(points):
    (found,) = conclude.crossovers(_lengths(points), ["m"])
    assert found.pop("method") == "m"
    return found


def test_crossing_between_measured_lengths():
    found = _crossing([(1000, 10, 20), (2000, 20, 30), (4000, 60, 40)])
    assert found["note"] == "measured between 2,000 and 4,000"
    assert 2000 < found["tokens"] < 4000
    even = _crossing([(1000, 10, 20), (4000, 20, 10)])
    assert even["tokens"] == 2000, "as far from one as from the other, on a scale of ratios"


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(0.1, 1e4), st.floats(0.1, 1e4)),
        min_size=2, max_size=5, unique_by=lambda point: point[0],
    ),
    st.sampled_from([0.25, 2.0, 1024.0]),
)  # fmt: skip
def test_crossings_are_where_the_last_change_was_measured(points, unit):
    found = _crossing(points)
    ordered = sorted(points)
    if ordered[-1][2] >= ordered[-1][1]:
        assert found["tokens"] is None and "slower up to" in found["note"]
    elif all(mine < dense for _, dense, mine in ordered):
        assert found["tokens"] is None and "faster at every measured length" in found["note"]
    else:
        last = max(i for i, (_, dense, mine) in enumerate(ordered) if mine >= dense)
        assert ordered[last][0] <= found["tokens"] <= ordered[last + 1][0]
    assert _crossing(points[::-1]) == found
    scaled = _crossing([(n, dense * unit, mine * unit) for n, dense, mine in points])
    assert (scaled["tokens"] or 0) == pytest.approx(found["tokens"] or 0, abs=1)


def test_faster_everywhere():
    found = _crossing([(512, 10, 9), (1024, 20, 12)])
    assert found == {"tokens": None, "note": "faster at every measured length, from 512 tokens"}


@given(st.integers(1100, 50_000))
def test_trend_beyond_the_last_length_is_marked_as_such(where):
    """Dense grows with N^2, the method with N; they meet at `where`."""
    found = _crossing([(n, 1e-5 * n * n, 1e-5 * n * where) for n in (250, 500, 1000)])
    assert found["tokens"] is None, "nothing was measured there"
    near = re.fullmatch(
        r"slower up to 1,000 tokens; the trend crosses near ([\d,]+) \(extrapolated\)", found["note"]
    )
    assert int(near[1].replace(",", "")) == pytest.approx(where, rel=0.06)


def test_no_trend():
    never = "slower up to 1,000 tokens, and its trend does not cross"
    assert _crossing([(n, n, 2 * n) for n in (250, 500, 1000)])["note"] == never
    far = [(n, 1e-9 * n * n + n, 2 * n) for n in (250, 500, 1000)]
    assert _crossing(far)["note"] == never, "a million times the measured lengths is no trend"
    two = _crossing([(500, 1, 3), (1000, 2, 4)])["note"]
    assert two == "slower up to 1,000 tokens; too few lengths were measured to see a trend"


def test_no_crossing_from_one_length():
    assert conclude.crossovers(_lengths([(1000, 10, 20)]), ["m"]) == []
    assert conclude.crossovers([], ["m"]) == []


def _row(name, speedup=None, change=0.0, tasks=None, low=None, high=None):
    return {
        "method": name, "prefill_ms": 10.0, "prefill_speedup": speedup, "prefill_speedup_low": low or speedup,
        "prefill_speedup_high": high or speedup,
        "bits_per_byte": None if change is None else 2 + change, "bits_per_byte_change": change,
        "tasks": {task: {"accuracy": accuracy} for task, accuracy in (tasks or {}).items()},
    }  # fmt: skip


DENSE = _row("dense", 1.0, tasks={"recall": 0.97})
GOOD = _row("good", 1.5, 0.009, {"recall": 0.93})


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "Nothing was measured to the end, so there is no advice."),
        (
            [{"method": "dense", "prefill_ms": None}],
            "Nothing was measured to the end, so there is no advice.",
        ),
        ([DENSE], "Only dense attention was measured, so there is nothing to choose from."),
        (
            [DENSE, _row("a", 0.5), _row("b", 0.8)],
            "Dense is faster here: at 4,096 tokens no method reads the prompt surely faster (the nearest, b,"
            " takes 1.25 times as long).",
        ),
        (
            [DENSE, _row("noisy", 1.25, low=0.9)],
            "Dense is faster here: at 4,096 tokens no method reads the prompt surely faster (the nearest, noisy,"
            " takes 0.80 times as long).",
        ),
        (
            [DENSE, GOOD, _row("lossy", 3.0, 0.5, {"recall": 0.9})],
            "Use good: at 4,096 tokens it reads the prompt 1.50 times as fast as dense at +0.009 bits per byte,"
            " with recall at 93%.",
        ),
        (
            [DENSE, _row("forgets", 2.0, 0.0, {"recall": 0.5})],
            "Stay with dense where quality counts: the faster methods lose more than 0.01 bits per byte or 5% of"
            " a retrieval task (forgets is 2.00 times as fast).",
        ),
        (
            [_row("dense", 1.0, None), _row("a", 2.0, None)],
            "a reads the prompt 2.00 times as fast as dense at 4,096 tokens; what that costs in quality was not"
            " measured.",
        ),
    ],
)
def test_advice(rows, sentence):
    assert conclude.advice(rows, 4096) == sentence


def test_ranking():
    """As good as dense by speed, then by what is lost; who outdoes whom; what was not measured has no place."""
    rows = [
        DENSE,
        _row("lossy", 3.0, 0.5, {"recall": 0.2}),
        _row("slow", 0.8, 0.02, {"recall": 0.9}),
        GOOD,
        _row("worse", 1.4, 0.01, {"recall": 0.93}),
        _row("forgets", 2.0, 0.0, {"recall": 0.5}),
        {"method": "stopped", "prefill_speedup": None},
    ]
    found = conclude.ranking(rows)
    assert [(entry["method"], entry["as_good"]) for entry in found] == [
        ("good", True), ("worse", True), ("dense", True), ("forgets", False), ("slow", False), ("lossy", False),
    ]  # fmt: skip
    outdone = {entry["method"]: entry["outdone_by"] for entry in found}
    assert outdone == {
        "good": [], "worse": ["good"], "dense": [], "forgets": [], "slow": ["good", "worse", "dense"], "lossy": [],
    }  # fmt: skip
    assert conclude.ranking([]) == []


def test_what_lies_within_the_spread_is_not_faster():
    """A method of equal quality outdoes another only beyond both spreads; a better one need not be faster."""
    outdone = lambda *rows: {  # noqa: E731
        entry["method"]: entry["outdone_by"] for entry in conclude.ranking([DENSE, *rows])
    }
    same = {"recall": 0.97}
    assert outdone(_row("even", 1.003, 0.0, same, 0.997, 1.02)) == {"even": [], "dense": []}
    assert outdone(_row("sure", 1.003, 0.0, same, 1.001, 1.02)) == {"sure": [], "dense": ["sure"]}
    assert outdone(_row("slow", 0.997, 0.0, same, 0.98, 0.999)) == {"dense": [], "slow": ["dense"]}
    one, two = _row("a", 1.5, 0.0, same, 1.4, 1.6), _row("b", 1.55, 0.0, same, 1.5, 1.7)
    assert outdone(one, two) == {"a": [], "b": [], "dense": ["b", "a"]}
    better = _row("better", 1.45, -0.001, same, 1.38, 1.5)
    assert outdone(one, better)["a"] == ["better"] and outdone(one, better)["better"] == []
    rounded = _row("rounded", 1.5, -1e-7, same, 1.4, 1.6)
    assert outdone(one, rounded) == {"a": [], "rounded": [], "dense": ["a", "rounded"]}


def test_crossings_count_beyond_the_spread():
    def lengths(*times):
        """(tokens, dense, method), each with a spread of 5 %."""
        spread = lambda ms: {"ms": ms, "low": 0.95 * ms, "high": 1.05 * ms}  # noqa: E731
        return [{"tokens": n, "methods": {"dense": spread(a), "m": spread(b)}} for n, a, b in times]

    (found,) = conclude.crossovers(lengths((1000, 10, 12), (2000, 20, 19.5)), ["m"])
    assert found == {
        "method": "m",
        "tokens": None,
        "note": "as fast as dense up to 2,000 tokens, within the spread",
    }
    (found,) = conclude.crossovers(lengths((1000, 10, 9.8), (2000, 20, 15)), ["m"])
    assert found == {"method": "m", "tokens": 1000, "note": "measured between 1,000 and 2,000"}
    (found,) = conclude.crossovers(lengths((1000, 10, 8), (2000, 20, 15)), ["m"])
    assert found["note"] == "faster at every measured length, from 1,000 tokens"


def test_ranking_without_perplexity_is_by_speed():
    found = conclude.ranking([_row("dense", 1.0, None), _row("a", 0.5, None), _row("b", 2.0, None)])
    assert [entry["method"] for entry in found] == ["b", "dense", "a"]
    assert [entry["outdone_by"] for entry in found] == [[], ["b"], ["b", "dense"]]


def test_a_task_that_was_not_finished_counts_as_lost():
    assert conclude.advice([DENSE, _row("half", 2.0)], 10).startswith("Stay with dense")


@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=20))
def test_spread_is_ordered_and_of_the_values(values):
    found = timing.spread(values)
    assert set(found) == {"ms", "low", "high"}
    assert min(values) <= found["low"] <= found["ms"] <= found["high"] <= max(values)
    assert found == timing.spread(values[::-1])


def test_spread_of_five():
    assert timing.spread([50, 10, 30, 20, 40]) == pytest.approx({"ms": 30, "low": 18, "high": 42})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no resettable peak")
def test_peak_memory_is_the_rise_within_the_block():
    ballast = numpy.ones(30_000_000, dtype=numpy.uint8)
    with timing.PeakMemory(torch.device("cpu")) as memory:
        numpy.ones(60_000_000, dtype=numpy.uint8)
    assert 55 < memory.mb < 90 and len(ballast)
    with timing.PeakMemory(torch.device("cpu")) as memory:
        pass
    assert memory.mb < 20, "an earlier peak is forgotten"


# --- methods by text


def test_parse_method():
    assert parse_method("dense") == Dense()
    assert parse_method("moba:block=32:top_k=4") == MoBA(32, 4)
    assert parse_method("pbs:queries=True:segment=512") == PBSAttention(512, queries=True)
    assert parse_method("xattention:threshold=0.5") == XAttention(threshold=0.5)
    assert all(parse_method(name) == kind() for name, kind in named().items())
    assert parse_method("pisa:density=0.1:taylor=0") == PISA(0.1, taylor=0)
    assert parse_method("hyper-attention").causal, "as a prompt of a language model needs it"


def test_all_is_every_name_once_and_dense_first():
    chosen = Settings(methods=("moba:top_k=2", "all", "moba")).configured()
    assert next(iter(chosen)) == "dense"
    plain = {*named(), *unnamed()} - set(BY_NAME)
    assert set(chosen) == {"moba:top_k=2", *gated_names(), *plain}
    assert set(Settings(model="other", methods=("all",)).configured()) == plain
    gates = Settings(methods=("seer-attention",)).configured()["seer-attention"]
    assert gates.needs == "trained gates" and gates.parameters()["0"] == "SeerAttention"
    assert set(Settings().methods) < set(named())


def test_every_paper_about_attention_can_be_compared_or_has_a_reason():
    """The register's room of attention is parted in two; what can be compared runs on the bundled model."""
    room = {paper.key for paper in papers.load() if paper.room == "attention"}
    every, out = everything(bundled=True), left_out()
    reached = {type(m) for m in every.values()}
    comparable = {key for key in room if key in every or papers.resolve(papers.find(key)) in reached}
    assert comparable | set(out) == room and not comparable & set(out)
    converted = {"lawcat"}  # of another room: recurrences that took attention's place
    assert set(every) - room <= {"dense", "sage2", *named(), *converted}
    assert {"pisa", "psa", "llsa", "hyper-attention", *gated_names()} - converted <= comparable
    assert (out["vmoba"], out["squeezed"]) == ("needs a grid of tokens", "needs clusters of a fixed context")
    assert all(why and not why.endswith(".") for why in out.values())
    assert set(BY_NAME) <= set(out) and set(BY_NAME) <= set(unnamed())
    loaded, _ = tilewise.models.load_model()
    for method in every.values():
        with tilewise.patch(loaded, method, check=False), torch.no_grad():
            assert loaded(torch.arange(100).unsqueeze(0), use_cache=False).logits.isfinite().all()


def test_rows_of_methods_without_a_name():
    found = _compare(None, tokens=64, methods=("pisa", "dhsa", "chunk-llm"), tasks=("recall",), repeats=1)
    pisa, dhsa, chunks = found["methods"][1:]
    assert json.loads(json.dumps(found["methods"], allow_nan=False)) == found["methods"]
    assert [row["paper"]["id"] for row in (pisa, dhsa, chunks)] == [145, 58, 30]
    assert pisa["parameters"] == {
        "density": 0.15, "taylor": 1, "tile": 64, "order": {"kind": "AsGiven"}, "aware": False,
    }  # fmt: skip
    assert [row["decodes_with"] for row in (pisa, dhsa, chunks)] == ["dense", "dense", "chunk-llm"]


def test_all_leaves_out_what_this_model_cannot_run(tmp_path):
    """Gemma caps scores: what cannot is left out and said, unless it was asked for by name."""
    path = str(tiny.save(tmp_path / "gemma", "gemma2"))
    found = _compare(path, tokens=128, methods=("all",), tasks=("recall",), repeats=1)
    assert found["left_out"].keys() == {"pisa", "sage2"} and "softcap" in found["left_out"]["pisa"]
    assert {row["method"] for row in found["methods"]} == {*named(), *unnamed()} - {"pisa", "sage2", *BY_NAME}
    with pytest.raises(UserError, match="cannot run pisa: .*softcap"):
        _compare(path, tokens=128, methods=("all", "pisa"))


def _gates_file(path, **sizes):
    settings = {"head_dim": 8, "heads": 4, "kv_heads": 2, "width": 6} | sizes
    save_gates(Gates({layer: BlockGate(**settings, seed=layer) for layer in (0, 2)}), path)
    return str(path)


def test_gates_of_ones_own(model, tmp_path):
    """By their file, or by the file and the name of what they serve; both are the same, and rank like any other."""
    file = _gates_file(tmp_path / "mine.safetensors")
    by_file, by_name = f"{file}:top_k=2:tile=32", f"seer-attention:gates={file}:top_k=2:tile=32"
    rows = _compare(model, methods=(by_file, by_name), tasks=("perplexity",), repeats=1)["methods"]
    assert [row["method"] for row in rows] == ["dense", "mine:top_k=2:tile=32", by_name]
    assert rows[1]["kl_mean"] == rows[2]["kl_mean"] > 1e-4
    assert [row["paper"] and row["paper"]["id"] for row in rows] == [None, None, 168]
    assert rows[1]["needs"] == "trained gates"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            "seer-attention",
            "needs gates trained for this model: seer-attention:gates=FILE.safetensors",
        ),
        ("dhsa:gates={file}", "holds gates of seer-attention"),
        ("seer-attention:gates=nowhere", "gates 'nowhere' do not exist"),
        ("seer-attention:gates={file}:gates={file}", "gates must be one file, got 2"),
        ("{file}:odd=1", "the settings of seer-attention are threshold, tile, top_k, got odd"),
        ("{file}:top_k", "settings are given as name=value, got 'top_k'"),
        ("{file}:top_k=0", "must be an integer >= 1, got 0"),
        ("{other}", "cannot run other: this BlockGate is for 2 query heads"),
        ("{late}", "layers must be indices in 0..2, got 3"),
        ("nowhere.safetensors", "gates 'nowhere.safetensors' do not exist"),
    ],
)
def test_gates_that_do_not_serve(model, tmp_path, method, said):
    files = {"file": _gates_file(tmp_path / "g.safetensors")}
    files["other"] = _gates_file(tmp_path / "other.safetensors", heads=2)
    save_gates(Gates({3: BlockGate(8, 4, 2, 6)}), tmp_path / "late.safetensors")
    with pytest.raises(UserError) as refused:
        _compare(model, methods=(method.format(**files, late=tmp_path / "late.safetensors"),))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xatention", "unknown attention method 'xatention'; did you mean xattention?"),
        (
            "zzz",
            "known methods: chunk-llm, dense, dhsa, flexprefill, hisa, hyper-attention, lawcat, llsa, moba",
        ),
        ("pisaa", "did you mean pisa"),
        ("pisa:dense=1", "its settings are aware, density, order, taylor, tile, got 'dense=1'"),
        ("pisa:density=0", r"density must be in \(0, 1\], got 0"),
        ("moba:blocks=3", "method 'moba:blocks=3': its settings are block, top_k, got 'blocks=3'"),
        ("moba:block", "its settings are block, top_k, got 'block'"),
        ("dense:block=3", "its settings are none, got 'block=3'"),
        ("moba:block=many", "block must be an integer >= 1, got 'many'"),
        ("moba:block=__import__('os')", "block must be an integer >= 1, got"),
        ("xattention:threshold=2", r"threshold must be in \(0, 1\], got 2"),
        ("xattention:tile=0", "method 'xattention:tile=0': tile must be an integer >= 1, got 0"),
        ("pbs:tile=0", "method 'pbs:tile=0': "),
        ("", "unknown attention method ''"),
    ],
)
def test_parse_method_says_what_is_wrong(text, message):
    with pytest.raises(UserError, match=message):
        parse_method(text)


# --- interruption, and reports that are whole or not at all


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def _nulls(row):
    return {key for key, value in row.items() if value is None and key != "paper"}


def test_interruption_through_the_command(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run.Run, "_decode", _interrupt)
    out, file = tmp_path / "r.html", tmp_path / "r.json"
    arguments = ["compare", model, "--tokens", "300", "--methods", "sink-window:window=16"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--out", str(out), "--json", str(file)])
    printed, err = capsys.readouterr()
    assert (stop.value.code, err) == (130, "tilewise: interrupted\n")
    assert "interrupted: measured in part" in printed
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["partial"] is True
    for row in kept["methods"]:
        assert _nulls(row) == {"decode_ms_per_token"}
        assert row["reasons"] == dict.fromkeys(
            ("decode_ms_per_token", "tasks"), "interrupted before it was measured"
        )
    assert kept["tile_maps"]["kept"] == kept["heatmap"] == []
    assert '"partial":true' in out.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


@pytest.mark.parametrize(
    ("phase", "measured"),
    [
        ("_fidelity", set()),
        ("_prefill", {"kl_mean"}),
        ("_retrieval", {"kl_mean", "prefill_ms", "decode_ms_per_token"}),
        ("_maps", {"kl_mean", "prefill_ms", "decode_ms_per_token"}),
    ],
)
def test_every_phase_can_be_interrupted(model, monkeypatch, tmp_path, phase, measured):
    monkeypatch.setattr(run.Run, phase, _interrupt)
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        _compare(model, methods=("sink-window:window=16",), tasks=TASKS, json=path)
    kept = json.loads(path.read_text(encoding="utf-8"))
    for row in kept["methods"]:
        for key in ("kl_mean", "prefill_ms", "decode_ms_per_token"):
            assert (row[key] is not None) is (key in measured), key
            assert (key in row["reasons"]) is (key not in measured)
        assert _nulls(row) <= set(row["reasons"])
    assert kept["partial"] and page.render(kept)


def test_finished_rounds_survive_an_interruption(model, monkeypatch, tmp_path):
    """Two methods, three rounds: stopped in the third, two are kept."""
    calls = iter(range(100))
    real = timing.prefill

    def prefill(*args):
        # two calls of fidelity, then a warm-up round and the timed ones
        return real(*args) if next(calls) < 2 + 2 + 2 * 2 + 1 else _interrupt()

    monkeypatch.setattr(timing, "prefill", prefill)
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        _compare(model, methods=("sink-window:window=16",), repeats=3, json=path)
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert [row["tokens"] for row in kept["lengths"]] == [300]
    for row in kept["methods"]:
        assert row["prefill_ms"] > 0 and row["prefill_speedup"] > 0 and row["peak_mb"] is not None
        assert row["reasons"]["density"] == "interrupted before it was measured"


def test_interrupted_retrieval_shows_no_task_that_was_not_gated(model, monkeypatch, tmp_path):
    _answers(monkeypatch, lambda name, q, i: True if name == "dense" else _interrupt())
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        _compare(model, methods=("sink-window",), tasks=("passkey",), json=path)
    kept = json.loads(path.read_text(encoding="utf-8"))
    dense, other = kept["methods"]
    assert dense["tasks"] and not other["tasks"]
    assert "tasks" in other["reasons"] and "tasks" not in dense["reasons"]
    assert {entry["method"] for entry in kept["heatmap"]} == {"dense"}


@pytest.mark.parametrize("step", ["render", "os.replace"])
def test_a_report_that_fails_leaves_the_old_one(result, monkeypatch, tmp_path, step):
    old = tmp_path / "report.html"
    old.write_text("older", encoding="utf-8")
    monkeypatch.setattr(page, "render", _interrupt) if step == "render" else monkeypatch.setattr(
        page.os, "replace", _interrupt
    )
    with pytest.raises(KeyboardInterrupt):
        page.write(result, old)
    assert old.read_text(encoding="utf-8") == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_one_report_that_cannot_be_written_does_not_cost_the_other(model, monkeypatch, tmp_path):
    out, file = tmp_path / "r.html", tmp_path / "gone" / "r.json"
    file.parent.mkdir()
    monkeypatch.setattr(run.Run, "_maps", lambda self, progress: file.parent.rmdir())
    with pytest.raises(UserError, match=r"cannot write .*r\.json': No such file or directory"):
        _compare(model, tokens=20, out=out, json=file)
    assert out.exists()


# --- the page and the tile maps


def test_the_page_renders_the_real_result(result):
    text = page.render(result)
    inside = re.search(r'<script type="application/json" id="result">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(inside) == result
    assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text


def _bits(entry):
    packed = base64.b64decode(entry["bits"], validate=True)
    assert len(packed) == math.ceil(entry["rows"] * entry["cols"] / 8)
    flat = numpy.unpackbits(numpy.frombuffer(packed, dtype=numpy.uint8))[: entry["rows"] * entry["cols"]]
    return flat.reshape(entry["rows"], entry["cols"]).astype(bool)


def test_tile_maps_decode_to_their_rows_and_columns(result):
    drawn = result["tile_maps"]
    assert (drawn["tokens"], drawn["tile"], drawn["layers"], drawn["heads"]) == (
        TOKENS, [128, 128], [0, 1, 2], 4,
    )  # fmt: skip
    places = {(layer, head) for layer in range(3) for head in range(4)}
    assert {(entry["layer"], entry["head"]) for entry in drawn["mass"]} == places
    for entry in drawn["mass"]:
        data = base64.b64decode(entry["data"], validate=True)
        assert (entry["rows"], entry["cols"], len(data)) == (5, 5, 25)
        mass = numpy.frombuffer(data, dtype=numpy.uint8).reshape(5, 5) / 255.0
        assert (numpy.triu(mass, 1) == 0).all(), "attention mass in the future"
        assert (mass**2).sum(1) == pytest.approx(numpy.ones(5), abs=0.02), "shares of a row, as square roots"
    for name in ("dense", *SPARSE):
        found = [entry for entry in drawn["kept"] if entry["method"] == name]
        assert {(entry["layer"], entry["head"]) for entry in found} == places
        for entry in found:
            kept = _bits(entry)
            assert kept.shape == (TOKENS // maps.POINT, TOKENS // maps.POINT)
            assert not numpy.triu(kept, 1).any(), "reads the future"
            assert kept.diagonal().all(), "does not read its own neighbourhood"


def test_drawn_maps_agree_with_densities(result):
    """XAttention's tiles of 32 are 2 x 2 points; of the diagonal ones, one point lies in the future."""
    visible = 15 * 128 * 128  # by the cut of 128 in which densities are counted
    drawn = [entry for entry in result["tile_maps"]["kept"] if entry["method"].startswith("xattention")]
    points = [_bits(entry).sum() + TOKENS // 32 for entry in drawn]
    density = numpy.mean(points) * maps.POINT**2 / visible
    row = next(row for row in result["methods"] if row["method"].startswith("xattention"))
    assert density == pytest.approx(row["density"], rel=1e-6)


def test_both_pictures_cover_the_same_tokens(model):
    """Also where no tile divides the text: the viewer lays one over the other."""
    drawn = _compare(model, tokens=300, methods=("moba",))["tile_maps"]
    for entry in drawn["kept"]:
        assert entry["rows"] * maps.POINT == drawn["mass"][0]["rows"] * maps.TILE == 384
        assert _bits(entry)[-1].any()


@pytest.mark.parametrize(
    "method", [MoBA(32, 4), XAttention(8, 0.5, 32), PBSAttention(64, 0.5, 32), SinkWindow(3, 50), Dense()]
)
def test_kept_agrees_with_the_density_of_the_plan(model, method):
    """Counting the tiles in which some pair of tokens is read gives the density, pass by pass."""
    loaded, tokenizer = tilewise.models.load_model(model)
    tokens = tokenizer(tilewise.compare.material.read_text(None), return_tensors="pt", verbose=False)
    events = []
    with tilewise.patch(loaded, method, observer=events.append), torch.no_grad():
        loaded(tokens["input_ids"][:, :300])
    every = torch.arange(300)
    for event in events:
        heads, plan = event.q.shape[1], event.plan
        computed = torch.zeros(1, heads)
        for part in plan.passes:
            kept = Plan((part,), plan.view).kept(every, every, heads)
            if part.k_order is not None:
                order = part.k_order.repeat_interleave(heads // part.k_order.shape[1], 1)
                kept = kept.gather(3, order.unsqueeze(2).expand_as(kept))
            sizes = (128, 128) if part.tiles is None else (part.tiles.q_tiling.size, part.tiles.k_tiling.size)
            for rows in kept.split(sizes[0], 2):
                for tile in rows.split(sizes[1], 3):
                    computed += tile.any(-1).any(-1) * (tile.shape[2] * tile.shape[3])
        visible = sum((min(a + 128, 300) - a) * min(a + 128, 300) for a in (0, 128, 256))
        torch.testing.assert_close((computed / visible).double(), plan.density_by_head().expand(1, heads),
                                   rtol=1e-6, atol=0)  # fmt: skip
        assert plan.density == pytest.approx(float(computed.mean()) / visible)
