"""Sub-word encoding: paths are shortest, the likelihood at equal size is above BPE's, texts come back exactly."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.data.subword import SubwordModel, learn_bpe, learn_swe, refit
from tilewise.data.subword_cuts import joined, pair_joined, words
from tilewise.data.subword_merges import frequency, join_best, likelihood, rise

SAMPLE = (files("tilewise.data") / "sample.txt").read_text(encoding="utf-8")
SIZE = 300


@pytest.fixture(scope="module")
def halves() -> tuple[str, str]:
    """Lines to learn from and lines to be tried on, in turn."""
    lines = SAMPLE[:60_000].splitlines(keepends=True)
    return "".join(lines[::2]), "".join(lines[1::2])


@pytest.fixture(scope="module")
def models(halves) -> tuple[SubwordModel, SubwordModel]:
    return learn_bpe(halves[0], SIZE), learn_swe(halves[0], SIZE, rounds=2)


def bits(model: SubwordModel, text: str) -> float:
    """Bits per character."""
    return -model.log_likelihood(text) / math.log(2) / len(text)


def all_cuts(word: str):
    """Every way to write a word in pieces of any length."""
    for ends in itertools.product((False, True), repeat=len(word) - 1):
        parts = [word[0]]
        for letter, cut in zip(word[1:], ends):
            if cut:
                parts.append(letter)
            else:
                parts[-1] += letter
        yield parts


@pytest.mark.evidence
def test_likelihood_is_above_bpe_at_equal_size(models, halves):
    """Fewer bits per character than BPE with as many pieces, on the text learned from and on text held out.

    Controls: BPE's pieces cut along shortest paths, their probabilities counted anew, which is BPE at its best, lie
    between; and as many pieces taken from the text at random are worse than either.
    """
    bpe, swe = models
    best, lucky = refit(bpe, halves[0]), refit(random_pieces(halves[0], SIZE), halves[0])
    for text in halves:
        have = [bits(model, text) for model in (swe, best, bpe, lucky)]
        assert have[0] < 0.95 * have[1] and have[1] < have[2] < have[3], have
    assert len(swe.pieces) == len(bpe.pieces) == len(set(swe.pieces)) == SIZE


def random_pieces(text: str, size: int) -> SubwordModel:
    """All letters and pieces of 2 to 4 letters found at random places, all equally likely."""
    rng, pieces, found = random.Random(0), dict.fromkeys(sorted(set(text))), words(text)
    while len(pieces) < size:
        word = rng.choice(found)
        start, length = rng.randrange(len(word)), rng.randint(2, 4)
        pieces.setdefault(word[start : start + length])
    log = -math.log(size + 1)
    return SubwordModel(tuple(pieces), (log,) * size, log - math.log(256))


@pytest.mark.evidence
def test_every_round_and_move_raises_the_likelihood(halves):
    """More rounds gain, and so do shortest paths for given pieces and then probabilities counted anew."""
    text = halves[0][:12_000]
    logs = [learn_swe(text, 200, rounds=n).log_likelihood(text) for n in (1, 2, 3)]
    assert logs[0] < logs[1] <= logs[2]
    for model in (learn_bpe(text, 200), random_pieces(text, 200)):
        path = replace(model, merges=None)  # the same probabilities, cut along shortest paths
        fitted = refit(model, text)
        logs = [one.log_likelihood(text) for one in (model, path, fitted, refit(fitted, text))]
        assert logs[0] <= logs[1] < 0.999 * logs[1] < logs[2], logs
        assert logs[2] == pytest.approx(logs[3], rel=1e-4)  # nothing is left to gain


@pytest.mark.evidence
@pytest.mark.parametrize("gain", [rise, frequency])
def test_the_pair_that_gains_most_is_joined(gain):
    """Each of eight joins is the best of all pairs, tried one by one. Control: the other rule chooses others."""
    text = SAMPLE[:1500]
    times = Counter(words(text))
    cuts, pieces = {word: list(word) for word in times}, counted({w: list(w) for w in times}, times)
    merges = join_best(cuts, times, pieces, len(pieces) + 8, gain)
    assert len(merges) == 8 and counted(cuts, times) == +pieces
    other = join_best(
        {word: list(word) for word in times},
        times,
        counted({w: list(w) for w in times}, times),
        len(pieces),
        frequency if gain is rise else rise,
    )
    assert merges != other
    now = {word: list(word) for word in times}
    for pair in merges:
        tried = {}
        for candidate in {x for parts in now.values() for x in zip(parts, parts[1:])}:
            after = {word: pair_joined(parts, candidate) for word, parts in now.items()}
            fewer = sum((len(now[word]) - len(after[word])) * times[word] for word in now)
            tried[candidate] = fewer if gain is frequency else likelihood(counted(after, times))
        best = max(tried.values())
        assert tried[pair] >= best - 1e-9 * abs(best), (pair, max(tried, key=tried.get))
        now = {word: pair_joined(parts, pair) for word, parts in now.items()}
    assert now == cuts


def counted(cuts: dict[str, list[str]], times: Counter[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for word, parts in cuts.items():
        for part in parts:
            counts[part] += times[word]
    return counts


@pytest.mark.evidence
@pytest.mark.parametrize("steps", [None, 2, 3, 5, 9])
def test_the_path_is_the_shortest_of_all(steps):
    """Against every way to write words of 9 letters, with random prices. Control: joining pairs costs more."""
    rng = random.Random(0)
    dearer, tried = 0, 0
    for _ in range(60):
        word = "".join(rng.choices("abc", k=9))
        pieces = sorted(
            {*"abc", word[:5], *("".join(rng.choices("abc", k=rng.randint(2, 6))) for _ in range(40))}
        )
        prices = [rng.uniform(0.5, 4) for _ in pieces]
        model = SubwordModel(tuple(pieces), tuple(-price for price in prices), -20.0)
        price = dict(zip(pieces, prices))
        costs = [
            sum(price[part] for part in parts)
            for parts in all_cuts(word)
            if all(part in price for part in parts) and len(parts) <= (steps or 9)
        ]
        if not costs:
            with pytest.raises(ValueError, match=f"cannot be cut into {steps} pieces or fewer"):
                model.cut(word, steps)
            continue
        found = model.cut(word, steps)
        assert "".join(found) == word and len(found) <= (steps or 9)
        assert sum(price[part] for part in found) == pytest.approx(min(costs), rel=1e-12)
        ranks = {(a, b): i for i, (a, b) in enumerate(itertools.product("abc", repeat=2)) if a + b in price}
        tried += 1
        dearer += sum(price[part] for part in joined(word, ranks)) > min(costs) * 1.01
    assert tried > 5 and dearer > 0.5 * tried


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=60) | st.text("the and of a\n\t", max_size=200))
def test_every_text_comes_back(models, text):
    for model in models:
        ids = model.encode(text)
        assert model.decode(ids) == text
        assert all(0 <= i < len(model.pieces) + 256 for i in ids)


def test_round_trip_of_the_sample_and_of_what_was_never_seen(models):
    for model in models:
        assert model.decode(model.encode(SAMPLE)) == SAMPLE
        strange = "na\u00efve \U0001f600 \ud800 end"
        ids = model.encode(strange)
        assert model.decode(ids) == strange and max(ids) >= len(model.pieces)
        assert model.log_likelihood(strange) < model.log_likelihood("naive : end")
        total = sum(map(math.exp, model.log_probs)) + 256 * math.exp(model.log_byte)
        assert total == pytest.approx(1, abs=1e-12)


def test_steps_limit_every_word(models):
    _, swe = models
    free, bound = swe.encode("acquaintance of the "), swe.encode("acquaintance of the ", steps=8)
    assert swe.decode(bound) == "acquaintance of the "
    assert swe.log_likelihood("acquaintance of the ", steps=8) <= swe.log_likelihood("acquaintance of the ")
    assert len(free) >= len(swe.encode("of the ", steps=2))
    assert max(len(swe.cut(word, 8)) for word in words("acquaintance of the ")) <= 8


def test_bpe_joins_by_frequency():
    text = "low low low lower newest newest widest "
    model = learn_bpe(text, 16)
    assert model.merges[0] == ("l", "o") and ("lo", "w") in model.merges
    assert model.cut("low ") == ["low "] if "low " in model.pieces else ["low", " "]
    assert learn_bpe(text, 10**6).encode("low ") and len(learn_bpe(text, 10**6).pieces) < 60


def test_learning_is_repeatable_and_takes_little_text():
    text = SAMPLE[:5000]
    assert learn_swe(text, 150, rounds=2) == learn_swe(text, 150, rounds=2)
    for learn in (learn_bpe, learn_swe):
        assert learn("", 0).encode("") == [] and learn("", 0).decode([104, 105]) == "hi"
        assert learn("a", 1).decode(learn("a", 1).encode("aa")) == "aa"
        assert len(learn("ab ab ab ab", 4).pieces) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learn_swe("abc", 2), "size must be an integer >= 3, the characters of the text, got 2"),
        (lambda: learn_bpe("abc", 2.5), "size must be an integer >= 3"),
        (lambda: learn_swe("abc", 3, rounds=0), "rounds must be an integer >= 1, got 0"),
        (lambda: learn_swe(b"abc", 3), "text must be a str, got bytes"),
        (lambda: learn_bpe("abc", 3).encode(5), "text must be a str, got int"),
        (lambda: learn_bpe("abc", 3).decode([259]), r"ids must lie in 0..258, got 259"),
        (lambda: learn_bpe("abc", 3).decode([-1]), r"ids must lie in 0..258, got -1"),
        (lambda: learn_bpe("abc", 3).decode([3 + 0xFF]), "invalid start byte"),
        (
            lambda: learn_bpe("abc", 3).cut("abc", steps=2),
            "steps must be None for a vocabulary of merges, got 2",
        ),
        (lambda: learn_swe("abc", 3).cut("abc", steps=0), "steps must be None or an integer >= 1, got 0"),
        (lambda: learn_swe("abc", 3).encode("abc", steps=2), "'abc' cannot be cut into 2 pieces or fewer"),
        (lambda: refit(learn_swe("abc", 3), "abd"), "text must be made of the model's characters, got 'd'"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
