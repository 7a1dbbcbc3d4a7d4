"""Retrieval tasks: exact lengths, the same text for the same seed, and answers that earlier text really tells."""

import hashlib
import re

import pytest

from tilewise.data import Example, copying, far, passkey, recall

FILLER = b"It is a truth universally acknowledged, that a text must be in want of words. " * 40
LENGTHS = (96, 97, 255, 256, 1000, 4096)


def make(task: str, length: int, seed: int) -> Example:
    if task == "passkey":
        return passkey(length, seed, filler=FILLER)
    return {"recall": recall, "copying": copying}[task](length, seed)


every_task = pytest.mark.parametrize("task", ["recall", "passkey", "copying"])


def told_before(example: Example) -> list[bool]:
    """For each answer: does the same text stand at the stated distance before it, and wholly before it?"""
    found = []
    for (start, end), distance in zip(example.spans, example.distances, strict=True):
        earlier = start - distance
        same = example.text[earlier : earlier + end - start] == example.text[start:end]
        found.append(earlier >= 0 and distance >= end - start and same)
    return found


CUES = {"recall": rb" [a-z]{3,4}:$", "passkey": rb"pass key is $", "copying": rb"\{$"}


def cue_before(task: str, example: Example) -> list[bool]:
    """For each answer: does the same cue (a key, the question, a brace) end here and at the place that tells it?"""
    found = []
    for (start, _), distance in zip(example.spans, example.distances, strict=True):
        here = re.search(CUES[task], example.text[:start])
        there = re.search(CUES[task], example.text[: start - distance])
        found.append(bool(here and there and here.group() == there.group()))
    return found


def answers_by_rule(example: Example) -> dict[int, bytes]:
    """Every repeated key's value by reading the text alone: start of the value -> value told last before it."""
    told: dict[bytes, bytes] = {}
    answers = {}
    for match in re.finditer(rb" ([a-z]{3,4}):(\d{2,4})(?= |$)", example.text):
        key, value = match.groups()
        if key in told:
            answers[match.start(2)] = told[key]
        told[key] = value
    return answers


@every_task
@pytest.mark.parametrize("length", LENGTHS)
def test_length_is_exact(task, length):
    for seed in range(20):
        example = make(task, length, seed)
        assert len(example.text) == length
        assert all(0 < start < end <= length for start, end in example.spans)
        assert len(example.spans) == len(example.distances) > 0


@every_task
def test_seed_decides_everything(task):
    assert make(task, 512, 7) == make(task, 512, 7)
    assert len({make(task, 512, seed).text for seed in range(50)}) == 50


def test_texts_stay_the_same_between_versions():
    """Stored results are only comparable while equal seeds give equal texts, on every Python."""
    texts = recall(512, 3).text + passkey(512, 3, 0.5, filler=FILLER).text + copying(512, 3).text
    assert hashlib.sha256(texts).hexdigest()[:16] == "f570cef5fb54bfe1"


@every_task
@pytest.mark.parametrize("length", LENGTHS)
def test_answers_are_told_at_the_stated_distance(task, length):
    for seed in range(20):
        example = make(task, length, seed)
        assert all(told_before(example))
        assert all(cue_before(task, example))


@every_task
@pytest.mark.parametrize("shift", [-1, 1])
def test_the_check_fails_for_shifted_spans(task, shift):
    """The check above must notice spans that are off by one byte, or distances that are."""
    example = make(task, 1024, 5)
    moved = Example(example.text, tuple((a + shift, b + shift) for a, b in example.spans), example.distances)
    wrong = Example(example.text, example.spans, tuple(distance + shift for distance in example.distances))
    assert not any(cue_before(task, moved))
    assert not any(told_before(wrong))


@pytest.mark.parametrize("length", LENGTHS)
def test_recall_scores_every_repeated_key_and_nothing_else(length):
    for seed in range(20):
        example = recall(length, seed)
        found = {start: example.text[start:end] for start, end in example.spans}
        expected = answers_by_rule(example)
        cut = max(expected, default=-1)
        assert found == expected or found == {key: value for key, value in expected.items() if key != cut}
        assert {start: expected[start] for start in found} == found


def test_recall_names_the_most_recent_place():
    example = recall(2048, 11, entries=5)
    for (start, end), distance in zip(example.spans, example.distances, strict=True):
        entry = example.text[example.text.rfind(b" ", 0, start) : end]
        between = example.text[start - distance : start]
        assert entry + b" " not in between
        assert distance > end - start


def test_recall_keys_do_not_end_in_one_another():
    keys = set(re.findall(rb" ([a-z]+):", recall(60_000, 1).text))
    assert len(keys) > 2_000
    assert not [key for key in keys if key[1:] in keys]


def test_more_entries_lie_further_back():
    few, many = recall(8192, 2, entries=4), recall(8192, 2, entries=400)
    assert max(few.distances) < 8192 / 8
    assert len(far(many)) > 50
    assert not far(few)


def test_far_keeps_the_distant_answers():
    example = recall(4096, 0)
    spans = far(example, 0.25)
    assert spans == tuple(s for s, d in zip(example.spans, example.distances, strict=True) if d >= 1024)
    assert 20 < len(spans) < len(example.spans)
    assert far(example, 0.0) == example.spans
    assert far(example, 1.0) == ()


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 0.75, 1])
def test_passkey_lies_at_the_depth_asked_for(depth):
    example = passkey(4096, 1, depth, filler=FILLER)
    (start, end), (distance,) = example.spans[0], example.distances
    number = example.text[start:end]
    assert re.fullmatch(rb"\d{5}", number)
    assert end == 4096
    assert example.text.count(number) == 2
    assert abs((start - distance) / 4096 - depth) < 0.04


def test_passkey_fills_up_from_short_text_and_takes_any():
    example = passkey(300, 1, filler=b"ab ")
    assert len(example.text) == 300
    assert all(told_before(example))
    assert passkey(96, 1, filler=b"x").text.startswith(b"x")


def test_passkey_without_depth_covers_all_depths():
    depths = [1 - passkey(2048, seed, filler=FILLER).distances[0] / 2048 for seed in range(200)]
    assert min(depths) < 0.1
    assert max(depths) > 0.9


def test_copying_repeats_the_block_in_braces():
    example = copying(1024, 4)
    (start, end), (distance,) = example.spans[0], example.distances
    assert end - start == 32
    assert example.text[start - 1 : start] == b"{" == example.text[start - distance - 1 : start - distance]
    assert example.text.count(b"{") == 2
    assert example.text.count(example.text[start:end]) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall(47, 0), "length is 47; recall needs at least 48 bytes"),
        (lambda: recall(-1, 0), "length is -1"),
        (lambda: recall(256, 0, entries=0), "entries is 0; it must lie between 1 and 100000"),
        (lambda: recall(48, 0, entries=50_000), "no key is repeated within 48 bytes"),
        (lambda: passkey(95, 0, filler=FILLER), "length is 95; passkey needs at least 96 bytes"),
        (lambda: passkey(256, 0, -0.1, filler=FILLER), "depth is -0.1; it must lie between 0 and 1"),
        (lambda: passkey(256, 0, 1.5, filler=FILLER), "depth is 1.5"),
        (lambda: passkey(256, 0, float("nan"), filler=FILLER), "depth is nan"),
        (lambda: passkey(256, 0, filler=b""), "filler is empty"),
        (lambda: copying(63, 0), "length is 63; copying needs at least 64 bytes"),
        (lambda: far(copying(64, 0), 2), "fraction is 2; it must lie between 0 and 1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_smallest_lengths_always_work():
    for seed in range(500):
        assert recall(48, seed).spans
        assert passkey(96, seed, filler=FILLER).spans
        assert copying(64, seed).spans
