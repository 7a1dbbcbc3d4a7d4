"""Lattices, digital nets and Halton points against their definitions, and what each randomisation keeps."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tilewise.kernels.digit_sums.digits import BITS, to_unit
from tilewise.transforms.qmc import DigitalNet, Halton, Lattice, PointSequence, search_lattice
from tilewise.transforms.qmc.digits import from_unit, gray, reverse, words
from tilewise.transforms.qmc.halton import primes

NETS = ["lms", "digital-shift", "nus", None]
HALTON = ["permutations", "digital-shift", "lms", "nus", None]
KINDS = [
    *[("net", how) for how in NETS],
    *[("higher-order net", how) for how in NETS],
    *[("halton", how) for how in HALTON],
    ("lattice", "shift"),
    ("lattice", None),
]
RANDOM = [kind for kind in KINDS if kind[1] is not None]


def make(kind: str, how: str | None, dim: int = 3, **given) -> PointSequence:
    given = {"seed": 7, "randomize": how, **given}
    if kind == "lattice":
        return Lattice(dim, **given)
    if kind == "halton":
        return Halton(dim, **given)
    return DigitalNet(dim, interlace=2 if kind == "higher-order net" else 1, **given)


# Joe and Kuo's numbers of dimensions 2 to 7: degree of the primitive polynomial, its inner coefficients,
# first m.
JOE_KUO = [
    (1, 0, [1]),
    (2, 1, [1, 3]),
    (3, 1, [1, 3, 1]),
    (3, 2, [1, 1, 1]),
    (4, 1, [1, 1, 3, 3]),
    (4, 4, [1, 3, 5, 13]),
]


def direction_numbers(degree: int, inner: int, m: list[int], count: int, digits: int) -> list[int]:
    """Sobol's recurrence, as Joe and Kuo (2008) print it."""
    v = [value << digits - 1 - k for k, value in enumerate(m)]
    for k in range(degree, count):
        new = v[k - degree] ^ v[k - degree] >> degree
        for back in range(1, degree):
            if inner >> degree - 1 - back & 1:
                new ^= v[k - back]
        v.append(new)
    return v


def sobol_columns() -> list[list[int]]:
    """Columns of 30 digits, seven dimensions."""
    first = [1 << 29 - k for k in range(30)]
    return [first, *(direction_numbers(*one, 30, 30) for one in JOE_KUO)]


def net_point(columns: list[list[int]], index: int) -> list[int]:
    """One point by its definition, digits as whole numbers."""
    made = []
    for own in columns:
        total = 0
        for k, column in enumerate(own):
            if index >> k & 1:
                total ^= column
        made.append(total)
    return made


def radical_inverse(index: int, base: int) -> Fraction:
    total, worth = Fraction(0), Fraction(1, base)
    while index:
        total, index, worth = total + index % base * worth, index // base, worth / base
    return total


def test_direction_numbers_are_those_of_joe_and_kuo():
    want = torch.tensor([net_point(sobol_columns(), i) for i in range(40)]).double() / 2**30
    assert torch.equal(DigitalNet(7, randomize=None).points(40), want)
    # A power of two far on shows the last columns.
    far = DigitalNet(7, randomize=None)[2**29 + 5 : 2**29 + 9]
    want = torch.tensor([net_point(sobol_columns(), 2**29 + 5 + i) for i in range(4)]).double() / 2**30
    assert torch.equal(far, want)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 33])
def test_orders_of_a_net(n):
    plain = DigitalNet(3, randomize=None).points(64)
    assert torch.equal(DigitalNet(3, randomize=None, order="gray").points(n), plain[gray(torch.arange(n))])
    if n and not n & n - 1:
        back = reverse(torch.arange(n), n.bit_length() - 1)
        assert torch.equal(DigitalNet(3, randomize=None, order="bit-reversed").points(n), plain[back])


def test_a_net_of_ones_own():
    columns = torch.tensor([[4, 2, 1], [4, 6, 7]])
    net = DigitalNet(2, columns=columns, digits=3, randomize=None)
    want = torch.tensor([net_point(columns.tolist(), i) for i in range(8)]).double() / 8
    assert torch.equal(net.points(8), want)
    with pytest.raises(ValueError, match="n must be at most 8"):
        net.points(9)


def test_interlacing_takes_digits_in_turns():
    base = from_unit(DigitalNet(4, randomize=None).points(32)) >> BITS - 30
    got = from_unit(DigitalNet(2, interlace=2, randomize=None).points(32))
    for i, j in itertools.product(range(32), range(2)):
        first, second = (format(base[i, 2 * j + k].item(), "030b") for k in range(2))
        turns = "".join(a + b for a, b in zip(first, second))[:BITS]
        assert got[i, j] == int(turns, 2)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 64])
def test_lattice_is_its_definition(n):
    vector = [1, 19, 27]
    lattice = Lattice(3, vector=vector, randomize=None)

    def definition(shares: list[Fraction]) -> Tensor:
        rows = [[float(share * z % 1) for z in vector] for share in shares]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)

    assert torch.equal(lattice.points(n), definition([radical_inverse(i, 2) for i in range(n)]))
    coded = Lattice(3, vector=vector, randomize=None, order="gray").points(n)
    assert torch.equal(coded, definition([radical_inverse(i ^ i >> 1, 2) for i in range(n)]))
    if n and not n & n - 1:
        natural = Lattice(3, vector=vector, randomize=None, order="natural").points(n)
        assert torch.equal(natural, definition([Fraction(i, n) for i in range(n)]))


def test_a_shift_moves_all_points_alike():
    plain, moved = (Lattice(4, randomize=how, seed=3) for how in (None, "shift"))
    difference = (moved.integers(0, 100) - plain.integers(0, 100)) & (1 << BITS) - 1
    assert (difference == difference[0]).all()
    assert len(difference[0].unique()) == 4


@pytest.mark.parametrize("start", [0, 1, 4095, 5000, 10**6])
def test_halton_is_radical_inverses(start):
    got = Halton(5, randomize=None)[start : start + 7]
    want = [[float(radical_inverse(start + i, base)) for base in (2, 3, 5, 7, 11)] for i in range(7)]
    # One rounding: the quotient of two whole numbers against the fraction's own.
    assert (got - torch.tensor(want, dtype=torch.float64)).abs().max() <= 2**-53


def test_primes():
    assert primes(1) == (2,) and primes(6) == (2, 3, 5, 7, 11, 13)
    assert primes(1000)[-1] == 7919


@pytest.mark.parametrize(("kind", "how"), KINDS)
@pytest.mark.parametrize("copies", [None, 1, 3])
def test_any_run_of_points_stands_alone(kind, how, copies):
    if how is None and copies == 3:
        copies = None
    sequence = make(kind, how, replications=copies)
    whole = sequence.points(200)
    assert whole.shape == (*([] if copies is None else [copies]), 200, 3)
    assert ((whole >= 0) & (whole < 1)).all()
    for start, end in [(0, 1), (1, 2), (0, 129), (31, 33), (63, 200), (77, 77), (128, 200)]:
        assert torch.equal(sequence[start:end], whole[..., start:end, :])


@pytest.mark.parametrize(("kind", "how"), KINDS)
def test_float32_is_the_first_24_digits(kind, how):
    wide = make(kind, how).points(300)
    narrow = make(kind, how, dtype=torch.float32).points(300)
    assert narrow.dtype == torch.float32 and narrow.max() < 1
    assert torch.equal(narrow.double(), (wide * 2**24).floor() / 2**24)


def test_digits_at_the_ends():
    ends = torch.tensor([0, 1, (1 << BITS) - 1])
    assert to_unit(ends).tolist() == [0.0, 2.0**-52, 1 - 2.0**-52]
    assert torch.equal(from_unit(to_unit(ends)), ends)
    assert to_unit(ends, torch.float32).max() == 1 - 2.0**-24


@pytest.mark.parametrize(("kind", "how"), RANDOM)
def test_seeds_and_replications(kind, how):
    three, five = (make(kind, how, replications=count).points(64) for count in (3, 5))
    assert torch.equal(three, five[:3])  # a replication does not depend on how many there are
    assert torch.equal(three[0], make(kind, how).points(64))
    assert not torch.equal(three[0], make(kind, how, seed=8).points(64))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(five, 2))
    torch.manual_seed(1)
    first = make(kind, how, seed=None).points(8)
    assert not torch.equal(make(kind, how, seed=None).points(8), first)
    torch.manual_seed(1)
    assert torch.equal(make(kind, how, seed=None).points(8), first)


# ------------------------------------------------------------------------------------ what is kept


def shares_hold(x: Tensor, cuts: list[int]) -> bool:
    """Whether each box of a grid of `cuts` boxes along the first coordinates holds as many points as any
    other."""
    place = torch.zeros(len(x), dtype=torch.int64)
    boxes = 1
    for j, count in enumerate(cuts):
        place, boxes = place * count + (x[:, j] * count).long(), boxes * count
    counts = place.bincount(minlength=boxes)
    return len(counts) == boxes and bool((counts == len(x) // boxes).all())


@pytest.mark.evidence
@pytest.mark.parametrize(("kind", "how"), [k for k in KINDS if k[0] != "lattice"])
def test_every_elementary_interval_holds_its_points(kind, how):
    """Sobol's first two coordinates are a (0, m, 2)-net for every m; so they are under each
    randomisation."""
    copies = None if how is None else 4
    sequence = make(kind, how, dim=2, replications=copies)
    if kind == "halton":  # boxes of 2^a x 3^b hold one of 2^a 3^b consecutive points each
        grids = [[2**a, 3**b] for a in range(6) for b in range(5)]
    elif kind == "net":
        grids = [[2**a, 2 ** (m - a)] for m in (3, 6, 9) for a in range(m + 1)]
    else:  # two coordinates of the net before it make one: their boxes are its intervals
        grids = [[2**m] for m in (3, 6, 10)]
    for grid in grids:
        n = grid[0] * (grid[1] if len(grid) > 1 else 1)
        for x in sequence.points(n).reshape(-1, n, 2):
            assert shares_hold(x, grid), grid
    for grid in grids:  # as many random points have no such shares
        n = grid[0] * (grid[1] if len(grid) > 1 else 1)
        assert n <= 16 or not shares_hold(torch.rand(n, 2), grid)


@pytest.mark.evidence
@pytest.mark.parametrize(("kind", "how"), RANDOM)
def test_each_point_is_uniform_and_means_are_unbiased(kind, how):
    copies = 4000
    x = make(kind, how, dim=2, replications=copies).points(8)
    steps = torch.arange(1, copies + 1, dtype=torch.float64) / copies
    limit = 2.2 / copies**0.5  # Kolmogorov's distance exceeds it once in 16,000 for uniform points
    for i, j in itertools.product(range(8), range(2)):
        assert (x[:, i, j].sort().values - steps).abs().max() < limit, (i, j)
    f = (x[..., 0] ** 2 * (1 + x[..., 1]).log()).mean(-1)
    exact = (2 * torch.tensor(2.0).log().item() - 1) / 3
    assert abs(f.mean().item() - exact) < 4 * (f.std() / copies**0.5).item()
    # Control: without randomisation all replications have the same error.
    plain = make(kind, None, dim=2).points(8)
    off = (plain[:, 0] ** 2 * (1 + plain[:, 1]).log()).mean().item() - exact
    assert abs(off) > 4 * (f.std() / copies**0.5).item()


@pytest.mark.evidence
@pytest.mark.parametrize(("kind", "how"), RANDOM)
def test_replications_are_independent(kind, how):
    """Errors of 400 pairs of neighbours are uncorrelated, as are points; those of pairs of equal seeds are
    one."""
    x = make(kind, how, dim=2, replications=800).points(16)
    error = x.square().prod(-1).mean(-1) - 1 / 9
    for values in (error, x[:, 3, 1]):
        pairs = torch.corrcoef(values.view(400, 2).T)[0, 1].item()
        assert abs(pairs) < 4 / 400**0.5
    again = make(kind, how, dim=2, replications=800).points(16).square().prod(-1).mean(-1) - 1 / 9
    assert torch.corrcoef(torch.stack((error, again)))[0, 1] > 0.999


@pytest.mark.evidence
@pytest.mark.parametrize("kind", ["net", "halton"])
def test_nested_scrambling_permutes_below_each_node_on_its_own(kind):
    """Digits that two points share first stay shared; the next ones differ, and do so independently from
    node to node."""
    copies, n = 2000, 8
    j, base = (0, 2) if kind == "net" else (1, 3)
    plain = make(kind, None, dim=2).points(n)[:, j]
    x = make(kind, "nus", dim=2, replications=copies).points(n)[:, :, j]
    for a, b in itertools.combinations(range(n), 2):
        level = next(
            k for k in range(9) if (a - b) % base ** (k + 1)
        )  # radical inverses: the last digits come first
        assert torch.equal((x[:, a] * base**level).long(), (x[:, b] * base**level).long())
        assert ((x[:, a] * base ** (level + 1)).long() != (x[:, b] * base ** (level + 1)).long()).all()
    if kind == "halton":
        return
    # Points 0 and 1 lie in different halves: whether their second digits were flipped is one coin each.
    second = ((x[:, [0, 1]] * 4).long() & 1) ^ ((plain[[0, 1]] * 4).long() & 1)
    both = torch.corrcoef(second.double().T)[0, 1].abs().item()
    assert both < 4 / copies**0.5
    # Control: a linear scramble flips them together or not at all, given its one digit of the matrix.
    linear = make(kind, "digital-shift", dim=2, replications=copies).points(n)[:, :, j]
    second = ((linear[:, [0, 1]] * 4).long() & 1) ^ ((plain[[0, 1]] * 4).long() & 1)
    assert torch.equal(second[:, 0], second[:, 1])


def test_words_are_random_enough():
    x = words(3, (1000, 64))
    ones = torch.stack([(x >> k & 1).double().mean() for k in range(64)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / x.numel() ** 0.5
    assert len(x.unique()) == x.numel()


def test_the_search_finds_what_trying_all_finds():
    """At 2^5 points every odd number is tried by the worst-case error's own sum."""
    m, gammas = 5, [1.0, 0.5, 0.3, 0.2]
    n = 1 << m

    def square(vector: list[int]) -> float:
        x = torch.arange(n)[:, None] * torch.tensor(vector) % n / n
        omega = 2 * torch.pi**2 * (x * x - x + 1 / 6)
        return (1 + torch.tensor(gammas[: len(vector)]) * omega).double().prod(1).mean().item() - 1

    vector = search_lattice(4, m, weights=gammas, least=m)
    assert vector[0] == 1
    for s in range(1, 4):
        tried = {z: square([*vector[:s], z]) for z in range(1, n // 2, 2)}
        assert tried[vector[s]] <= min(tried.values()) * (1 + 1e-4)


def test_the_default_vector_is_the_search_of_its_script():
    known = Lattice(6).vector.tolist()
    assert search_lattice(6) == known
    assert len(set(Lattice(256).vector.tolist())) > 200


# ------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: DigitalNet(0), ValueError, "dim must be at least 1, got 0"),
        (lambda: DigitalNet(2.0), TypeError, "dim must be a whole number"),
        (lambda: DigitalNet(21202), ValueError, "at most 21,201"),
        (lambda: DigitalNet(11000, interlace=2), ValueError, "at most 21,201"),
        (lambda: DigitalNet(2, interlace=0), ValueError, "interlace must be at least 1"),
        (lambda: DigitalNet(2, order="linear"), ValueError, "order must be one of"),
        (lambda: DigitalNet(2, randomize="owen"), ValueError, "randomize must be one of 'lms'"),
        (lambda: DigitalNet(2, randomize=None, replications=2), ValueError, "would be alike"),
        (lambda: DigitalNet(2, replications=0), ValueError, "replications must be at least 1"),
        (lambda: DigitalNet(2, seed=-1), ValueError, "seed must be at least 0"),
        (lambda: DigitalNet(2, dtype=torch.float16), TypeError, "torch.float64 or torch.float32"),
        (lambda: DigitalNet(2).points(2**30 + 1), ValueError, "n must be at most 1,073,741,824"),
        (lambda: DigitalNet(2).points(-1), ValueError, "at least 0"),
        (lambda: DigitalNet(2)[5], TypeError, "slice with an end"),
        (lambda: DigitalNet(2)[5:], TypeError, "slice with an end"),
        (lambda: DigitalNet(2)[0:8:2], TypeError, "slice with an end"),
        (lambda: DigitalNet(2)[8:4], ValueError, "at least 8"),
        (lambda: DigitalNet(2, order="bit-reversed").points(12), ValueError, "nearest are 8 and 16"),
        (lambda: DigitalNet(2, order="bit-reversed")[8:16], ValueError, "all of 2\\^m points at once"),
        (lambda: DigitalNet(3, columns=torch.ones(2, 4).long(), digits=4), ValueError, "at most 2"),
        (lambda: DigitalNet(1, columns=torch.ones(2, 4), digits=4), TypeError, "int64 tensor"),
        (lambda: DigitalNet(1, columns=torch.ones(2, 4).long()), ValueError, "digits must say"),
        (
            lambda: DigitalNet(1, columns=torch.ones(2, 4).long() << 4, digits=4),
            ValueError,
            "numbers of 4 digits",
        ),
        (lambda: DigitalNet(1, columns=torch.ones(2, 4).long(), digits=53), ValueError, "at most 52"),
        (lambda: Lattice(257), ValueError, "at most 256, the numbers that the table has"),
        (lambda: Lattice(3, vector=[1, 3]), ValueError, "at most 2, the numbers that vector has"),
        (lambda: Lattice(2, vector=[1, 4]), ValueError, "odd numbers"),
        (lambda: Lattice(2, vector=[1.0, 3.0]), TypeError, "whole numbers in one row"),
        (lambda: Lattice(2, randomize="nus"), ValueError, "randomize must be one of 'shift', None"),
        (lambda: Lattice(2, order="linear"), ValueError, "order must be one of"),
        (lambda: Lattice(2, order="natural").points(48), ValueError, "nearest are 32 and 64"),
        (lambda: Lattice(2, order="natural")[16:32], ValueError, "all of 2\\^m points at once"),
        (lambda: Lattice(2).points(2**20 + 1), ValueError, "n must be at most 1,048,576"),
        (lambda: Halton(2, randomize="shift"), ValueError, "randomize must be one of 'permutations'"),
        (lambda: search_lattice(0), ValueError, "dim must be at least 1"),
        (lambda: search_lattice(2, 27), ValueError, "log2_points must be from"),
        (lambda: search_lattice(2, 8, weights=[1.0, 0.0]), ValueError, "positive numbers"),
    ],
)
def test_wrong_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
