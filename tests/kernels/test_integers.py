"""The solver of integer constraints, and the cuts it finds, against trying everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping

import pytest

from tilewise.kernels.gated_rnn import integers, tiling
from tilewise.kernels.gated_rnn.integers import Problem, Term
from tilewise.kernels.gated_rnn.tiling import Processor

Values = dict[str, int]


def every(problem: Problem) -> Iterator[Values]:
    """All values of the variables within their domains."""
    for values in itertools.product(*problem.domains.values()):
        yield dict(zip(problem.domains, values))


def holds(problem: Problem, values: Values) -> bool:
    """All constraints, counted out."""
    bounds = all(left.value(values) <= right.value(values) for left, right in problem.bounds)
    return bounds and all(
        by.value(values) and of.value(values) % by.value(values) == 0 for by, of in problem.divisions
    )


def drawn(rng: random.Random) -> Problem:
    """Four variables and five constraints between products and sums of some of them."""
    problem = Problem()
    names = [problem.variable(name, rng.sample(range(1, 25), rng.randint(1, 8))) for name in "abcd"]

    def term() -> Term | int:
        made: Term | int = rng.randint(0, 30)
        for _ in range(rng.randint(1, 2)):
            product = rng.choice(names) * rng.randint(1, 3)
            made = made + (product * rng.choice(names) if rng.random() < 0.5 else product)
        return made

    for _ in range(3):
        problem.at_most(term(), term())
    for _ in range(2):
        problem.divides(rng.choice(names), term())
    return problem


def wrong(problem: Problem) -> str | None:
    """How the solver's answers differ from all that there are, or None."""
    want = [values for values in every(problem) if holds(problem, values)]
    got = list(problem.solutions())
    if sorted(map(sorted, map(Mapping.items, got))) != sorted(map(sorted, map(Mapping.items, want))):
        return f"{len(got)} solutions, there are {len(want)}"
    kept = problem.narrowed()
    if kept is None:
        return None if not want else "narrowed to nothing"
    lost = [name for name in kept for values in want if values[name] not in kept[name]]
    return f"narrowing lost values of {lost}" if lost else None


@pytest.mark.evidence
def test_all_solutions_are_found_and_no_others():
    """Of 150 drawn problems, of which both kinds, with solutions and without, come often."""
    rng = random.Random(0)
    problems = [drawn(rng) for _ in range(150)]
    assert {wrong(problem) for problem in problems} == {None}
    solvable = sum(next(problem.solutions(), None) is not None for problem in problems)
    assert 20 < solvable < 145


@pytest.mark.parametrize("broken", ["_fits_bound", "_fits_division"])
def test_a_narrowing_that_drops_or_keeps_too_much_is_seen(broken, monkeypatch):
    rng = random.Random(0)
    problems = [drawn(rng) for _ in range(40)]
    right = getattr(integers, broken)
    monkeypatch.setattr(integers, broken, lambda *x: True)
    assert any(wrong(problem) for problem in problems)
    monkeypatch.setattr(
        integers, broken, lambda left, by, now: right(left, by, now) and (12,) not in now.values()
    )
    assert any(wrong(problem) for problem in problems)


def test_the_best_costs_least():
    rng = random.Random(1)
    for _ in range(60):
        problem = drawn(rng)
        weights = {name: rng.uniform(-1, 1) for name in "abcd"}

        def cost(values: Mapping[str, int], weights=weights) -> float:
            return sum(weights[name] * value for name, value in values.items())

        costs = [cost(values) for values in every(problem) if holds(problem, values)]
        if costs:
            assert cost(problem.best(cost)) == min(costs)
        else:
            with pytest.raises(ValueError, match="no values of a, b, c, d meet all constraints"):
                problem.best(cost)


def test_narrowing_alone_solves_chains():
    """Divisibility passes on from constraint to constraint, without a search."""
    problem = Problem()
    a, b, c = (problem.variable(name, range(1, 200)) for name in "abc")
    problem.divides(a * 7, b)
    problem.divides(b * 5, c)
    problem.at_most(36, a + 35)
    problem.at_most(c, 69)
    assert problem.narrowed() == {"a": (1,), "b": (7,), "c": (35,)}


def test_wrong_problems():
    problem = Problem()
    a = problem.variable("a", [2, 3])
    for name, values in (("a", [1]), ("b", []), ("c", [0, 1])):
        with pytest.raises(ValueError, match="must be a new name with some values, all >= 1"):
            problem.variable(name, values)
    with pytest.raises(ValueError, match="a coefficient must be an integer >= 0, got -1"):
        problem.at_most(a * -1, 3)
    with pytest.raises(ValueError, match=r"a coefficient must be an integer >= 0, got 0\.5"):
        problem.at_most(a + 0.5, 3)
    problem.divides(5, 7)
    assert problem.narrowed() is None and list(problem.solutions()) == []


SMALL = Processor(first=4 << 10, second=32 << 10, third=256 << 10)
CALLS = [(1, 1, 4, 16, 1), (9, 1, 4, 40, 2), (6, 3, 3, 32, 4), (30, 2, 1, 100, 3), (12, 8, 4, 24, 2)]


@pytest.mark.evidence
@pytest.mark.parametrize("call", CALLS)
def test_the_chosen_cut_is_the_cheapest_that_fits(call):
    """Every cut tried one by one, on a machine with small caches, so that constraints bind."""
    sequences, heads, gates, width, threads = call
    problem = tiling.problem(*call, SMALL)

    def cost(cut: Mapping[str, int]) -> float:
        return tiling.cost(cut, sequences, heads, gates, width, 4, SMALL)

    fitting = [values for values in every(problem) if holds(problem, values)]
    best = min(map(cost, fitting))
    assert cost(problem.best(cost)) == best
    assert len(fitting) < len(list(every(problem)))
    chosen = tiling.tile_sizes(*call, processor=SMALL)
    assert any(
        (cut["rows"], cut["team"], cut["parts"], cut["rows"] * cut["tokens"])
        == (chosen.rows, chosen.team, chosen.parts, chosen.depth)
        for cut in fitting
        if cost(cut) == best
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_cut_gives_everyone_work_and_fits_the_caches(call):
    """What the constraints are for, said without them."""
    sequences, _, gates, width, threads = call
    chosen = tiling.tile_sizes(*call, processor=SMALL)
    assert threads % chosen.team == 0
    assert chosen.rows * 64 * (chosen.depth // chosen.rows) <= SMALL.first // 2  # a column of the gathered
    vectors = -(-width // SMALL.lanes)
    assert chosen.team <= vectors and 1 <= chosen.parts <= -(-sequences // chosen.rows)
    units = vectors * SMALL.lanes
    assert threads // chosen.team * chosen.depth * (gates + 1) * units * 8 <= SMALL.third // 2


def test_larger_matrices_are_shared_by_threads():
    """A matrix that one core's cache does not hold and two do is split; many small heads are not."""
    processor = Processor(first=32 << 10, second=1 << 20, third=32 << 20)
    assert tiling.tile_sizes(1, 1, 4, 256, 2, processor=processor).team == 2
    assert tiling.tile_sizes(1, 8, 4, 32, 2, processor=processor).team == 1
