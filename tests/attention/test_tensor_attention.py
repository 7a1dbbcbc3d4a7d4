"""Tensor attention: exact against its definition, polynomials against their proof, cost, and a task of triples."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.conformance.common import over_budget
from tests.conformance.test_memory import allocations
from tilewise.attention import attend
from tilewise.attention.tensor import (
    Expansion,
    Series,
    TensorAttention,
    definition,
    lowest_degree,
    polynomial,
    streamed,
    tensor_attention,
)
from tilewise.attention.tensor.call import Call
from tilewise.attention.tensor.monomials import count, monomials, multinomials
from tilewise.attention.tensor.series import output_error
from tilewise.tiles import BlockCausal, Documents, Padding, Partial, Prefix, Window, merge

WIDE = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    """Many small operations, and processor time that is measured: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def uniform(*shape: int, top: float = 1.0, dtype: torch.dtype = WIDE) -> Tensor:
    return ((torch.rand(*shape, dtype=WIDE) * 2 - 1) * top).to(dtype)


def inputs(
    n: int = 20, lengths=None, b: int = 2, heads: int = 2, kv_heads: int = 2, d: int = 5, d_v: int = 4,
    top: float = 1.0, dtype: torch.dtype = WIDE,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Queries, keys and values with entries in [-top, top]; two sequences of n keys unless lengths are given."""
    lengths = (n, n) if lengths is None else lengths
    q = uniform(b, heads, n, d, top=top, dtype=dtype)
    keys = [uniform(b, kv_heads, m, d, top=top, dtype=dtype) for m in lengths]
    return q, keys, [uniform(b, kv_heads, m, d_v, dtype=dtype) for m in lengths]


def by_loops(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, scale: float, causal: bool) -> Tensor:
    """The paper's formula token by token for one head, `[N, D]` each: D^-1 exp(scale Q (K1 x K2)^T) (V1 x V2)."""
    out = torch.zeros(len(q), v1.shape[1], dtype=q.dtype)
    for i in range(len(q)):
        pairs = [(j, m) for j in range(len(k1)) for m in range(len(k2)) if not causal or max(j, m) <= i]
        weights = torch.stack([torch.exp(scale * (q[i] * k1[j] * k2[m]).sum()) for j, m in pairs])
        products = torch.stack([v1[j] * v2[m] for j, m in pairs])
        out[i] = weights @ products / weights.sum()
    return out


# Exact


@pytest.mark.evidence
@pytest.mark.parametrize("causal", [False, True])
def test_definition_is_the_papers_formula(causal):
    """Against explicit loops. Control: scores that are sums over single keys, q . (k1 + k2), answer differently."""
    q, (k1, k2), (v1, v2) = inputs(7, b=1, heads=1, kv_heads=1, top=2.0)
    got = definition(q, (k1, k2), (v1, v2), mask="causal" if causal else None).out[0, 0]
    one = [x[0, 0] for x in (q, k1, k2, v1, v2)]
    torch.testing.assert_close(got, by_loops(*one, scale=1 / 5, causal=causal), rtol=1e-12, atol=1e-12)
    mask = "causal" if causal else None
    apart = attend(q, k1, v1, mask=mask, scale=1 / 5) * attend(q, k2, v2, mask=mask, scale=1 / 5)
    assert (apart[0, 0] - got)[1:].abs().max() > 0.05, "sums over single keys must not do"


@pytest.mark.evidence
@pytest.mark.parametrize("mask", [None, "causal", Window(3, 1)], ids=str)
@pytest.mark.parametrize("tile", [(4, 3, 5), (7, 64, 2), None], ids=str)
def test_streamed_equals_the_definition(mask, tile):
    """Whatever the tiles, out, lse and all gradients are those of the N^3 formula. Control: one key less shows."""
    q, keys, values = inputs(20, heads=4)
    every = [x.requires_grad_() for x in (q, *keys, *values)]
    weight = torch.randn(2, 4, 20, 4, dtype=WIDE)
    found = []
    for run in (definition, TensorAttention(tile=tile).attend):
        extra = {} if run is definition else {"return_lse": True}
        result = run(q, keys, values, mask=mask, **extra)
        loss = (result.out * weight).sum() + result.lse.sin().sum()
        found.append((result.out, result.lse, *torch.autograd.grad(loss, every)))
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    less = definition(q, [keys[0][:, :, 1:], keys[1]], [values[0][:, :, 1:], values[1]]).out
    assert (less - definition(q, keys, values).out).abs().max() > 1e-3


@pytest.mark.evidence
def test_any_cut_of_the_pairs_merges_to_one_answer():
    """Pairs of halves, four partial results, merged. Control: three of them do not make the answer."""
    q, keys, values = inputs(24, top=2.0)
    whole = TensorAttention()(q, *keys, *values, return_lse=True)
    halves = slice(0, 10), slice(10, 24)
    parts = [
        TensorAttention()(
            q, keys[0][:, :, a], keys[1][:, :, b], values[0][:, :, a], values[1][:, :, b], return_lse=True
        )
        for a, b in itertools.product(halves, halves)
    ]
    merged = merge(parts)
    torch.testing.assert_close(merged.out, whole.out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-11, atol=1e-12)
    assert (merge(parts[:3]).out - whole.out).abs().max() > 1e-3


@pytest.mark.evidence
def test_exact_memory_is_linear():
    """Forward and backward hold tiles, not N^3 (nor N x N) numbers. Control: the definition does hold N^3."""
    tile = (16, 16, 32)

    def run(n: int, method) -> tuple[int, int]:
        q, keys, values = inputs(n, b=1, heads=1, kv_heads=1, d=4, dtype=torch.float32)
        every = [x.requires_grad_() for x in (q, *keys, *values)]
        return allocations(lambda: torch.autograd.grad(method(q, keys, values).sum(), every))

    small, large = (run(n, TensorAttention(tile=tile).attend) for n in (64, 128))
    rows = 16 * 16 * (32 + 4 + 4)  # a tile of scores, and what its rows multiply and sum
    assert large[0] <= 4 * rows < 4 * 128**2, f"a tensor of {large[0]} bytes"
    assert large[1] <= 2.2 * small[1] and large[1] < 4 * 128**3 / 32
    assert run(64, lambda *x: definition(*x).out)[0] >= 4 * 64**3


# The polynomial and its proof


def weight_error(coefficients: list[float], radius: float, d: int, dtype: torch.dtype = WIDE) -> float:
    """Largest |P(s) / exp(s) - 1| over scores in [-radius, radius], as the attention itself computes P.

    One pair of keys, so the log of the row's sum is log P(s); signs are spread over the dimensions.
    """
    k1, k2 = torch.randn(1, 1, 1, d, dtype=WIDE).sign(), torch.randn(1, 1, 1, d, dtype=WIDE).sign()
    scores = torch.linspace(-radius, radius, 2001, dtype=WIDE)
    q = scores.view(1, 1, -1, 1) * k1 * k2
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    call = Call.bind(q.to(dtype), (k1.to(dtype), k2.to(dtype)), (one, one), None, None)
    lse = polynomial.attend(call, coefficients, dtype).lse[0, 0].to(WIDE)
    error = ((lse - scores).exp() - 1).abs()
    return float(error.nan_to_num(nan=math.inf).max())  # the log of a sum below 0 is NaN


PROVEN = [("chebyshev", 0.5**3, 2), ("chebyshev", 1.0, 4), ("chebyshev", 1.0, 6), ("chebyshev", 3.375, 8)]
PROVEN += [("taylor", 0.5**3, 2), ("taylor", 1.0, 6), ("taylor", 3.375, 12)]


@pytest.mark.evidence
@pytest.mark.parametrize(("kind", "radius", "degree"), PROVEN)
def test_weights_err_less_than_proven_and_not_much_less(kind, radius, degree):
    """The relative error of the weights lies between half of the bound and the bound, so mistakes break it.

    Controls: the highest degree dropped, factorials of l - 1 for those of l, l! for multinomials, and scores of
    twice the radius each exceed the bound.
    """
    series = Series(kind, radius, degree)
    right, bound = series.coefficients(), series.relative_error
    for d in (1, 4):
        error = weight_error(right, radius, d)
        assert bound / 2 < error <= bound + series.rounding(WIDE)
    late = [c * max(level, 1) for level, c in enumerate(right)]
    for wrong in (right[:-1], late):
        assert weight_error(wrong, radius, 4) > 2 * bound
    assert weight_error(right, 2 * radius, 4) > 2 * bound


@pytest.mark.evidence
def test_monomials_make_powers(monkeypatch):
    """Weighted products of monomials are powers of a product sum; without multinomials the proof is broken."""
    x, y, z = uniform(3, 50, 4)
    factors, degrees = multinomials(4, 7)
    terms = monomials(x, 7) * monomials(y, 7) * monomials(z, 7) * factors
    assert terms.shape[1] == count(4, 7) == math.comb(11, 4)
    sums = torch.zeros(50, 8, dtype=WIDE).index_add_(1, degrees, terms)
    want = (x * y * z).sum(1, keepdim=True) ** torch.arange(8)
    torch.testing.assert_close(sums, want, rtol=1e-12, atol=1e-13)
    series = Series("chebyshev", 1.0, 6)
    monkeypatch.setattr(
        polynomial, "multinomials", lambda *x: (torch.ones_like(multinomials(*x)[0]), multinomials(*x)[1])
    )
    assert weight_error(series.coefficients(), 1.0, 4) > 100 * series.relative_error


def measured(top: float, degree: int, seed: int = 0, series_top: float | None = None) -> tuple[float, float]:
    """Error of the output over max |v1| max |v2|, and its bound, for entries uniform in [-top, top], N = 32, D = 4.

    The polynomial is that for entries up to `series_top`, by default `top`.
    """
    torch.manual_seed(seed)
    q, keys, values = inputs(32, d=4, top=top)
    series = Series("chebyshev", (top if series_top is None else series_top) ** 3, degree)
    got = polynomial.attend(Call.bind(q, keys, values), series.coefficients(), WIDE).out
    largest = values[0].abs().max() * values[1].abs().max()
    error = (got - definition(q, keys, values).out).abs().max() / largest
    return float(error), series.error(WIDE)


@pytest.mark.evidence
def test_output_error_is_below_the_bound_falls_with_degree_and_grows_with_entries():
    """Over degrees at one bound on entries, over bounds at one degree.

    Controls: with entries beyond the bound it was made for, the polynomial errs far more than its bound, though
    each is within the bound of its own.
    """
    falling = [measured(1.0, degree) for degree in (2, 4, 6, 8, 10)]
    for (error, bound), (after, _) in itertools.pairwise(falling):
        assert error <= bound and after < error / 10
    growing = [measured(top, 8) for top in (0.6, 0.8, 1.0, 1.25, 1.5)]
    for (error, bound), (after, above) in itertools.pairwise(growing):
        assert error <= bound and after <= above and after > 10 * error
    for top, times in ((1.5, 10), (2.0, 10_000)):
        error, bound = measured(top, 8, series_top=1.0)
        assert error > times * bound


@pytest.mark.evidence
def test_degree_follows_the_theory():
    """The degree for an error is the least that is proven, and grows as the paper's rule for scores up to R = B^3:
    max(R, log(1/error) / log(log(1/error) / R)). Control: the Taylor series needs more for the same."""
    ratios = []
    for radius, error in itertools.product((0.125, 0.5, 1.0, 2.0, 4.0, 8.0), (1e-1, 1e-2, 1e-3, 1e-4)):
        degree = lowest_degree(radius, error, kind="chebyshev", dtype=WIDE)
        assert Series(kind="chebyshev", radius=radius, degree=degree).error(WIDE) <= error
        assert degree == 0 or Series("chebyshev", radius, degree - 1).error(WIDE) > error
        assert lowest_degree(radius, error, "taylor") >= degree + (radius >= 1)
        # For relative errors the paper asks for an absolute one of error e^-R.
        need = math.log(1 / error) + radius
        ratios.append(degree / max(radius, need / math.log(math.e + need / radius)))
    assert max(ratios) < 3 and min(ratios) > 0.75, (min(ratios), max(ratios))
    assert lowest_degree(30.0, 1e-2) is None, "rounding, e^(2R) units, is part of the promise"


@pytest.mark.evidence
@pytest.mark.parametrize("dtype", [torch.float32, WIDE], ids=str)
def test_a_wanted_error_is_kept(dtype):
    """`error` is kept on entries at the bound, with the least degree. Control: a degree of half of it is not enough
    for the weights at the bound."""
    for top, error in ((0.8, 1e-3), (1.0, 1e-4), (1.25, 1e-2)):
        q, keys, values = inputs(96, d=3, top=top, dtype=dtype)
        q = torch.full_like(q, top).copysign(q)
        method = TensorAttention(error=error, bound=top)
        made = method.expansion(q, keys, values)
        assert made.error <= error
        got = method.attend(q, keys, values)
        wide = [x.to(WIDE) for x in (q, *keys, *values)]
        want = definition(wide[0], wide[1:3], wide[3:]).out
        largest = values[0].abs().max() * values[1].abs().max()
        assert (got - want).abs().max() <= error * largest + torch.finfo(dtype).eps
        half = Series("chebyshev", top**3, made.series.degree // 2)
        assert weight_error(half.coefficients(), top**3, 3) > 10 * error


@pytest.mark.evidence
def test_fast_only_while_entries_are_bounded():
    """At one length and error the polynomial's work grows with the entries until the exact way costs less, and is
    taken: the paper's dichotomy. Longer sequences can afford larger entries, but never those of 2.5."""
    assert _ways(64) == [True, True, False, False, False, False]
    assert _ways(256) == [True, True, True, True, False, False]
    assert _ways(4096) == [True, True, True, True, True, False]


def _ways(n: int) -> list[bool]:
    """Whether growing bounds on entries take the polynomial; its work must not fall as they grow."""
    taken, work = [], 0
    for top in (0.5, 1.0, 1.25, 1.5, 1.75, 2.5):
        x = torch.full((1, 1, n, 8), top)
        made = TensorAttention(error=1e-2, bound=top).expansion(x, (x, x), (x, x))
        taken.append(made is not None)
        if made is not None:
            assert made.multiply_adds <= made.exact_multiply_adds and made.multiply_adds > work
            work = made.multiply_adds
    return taken


@pytest.mark.evidence
def test_rounding_stays_below_its_allowance():
    """Equal scores of -R, where sums of P cancel most, in float32. Control: ordinary rounding is far below."""
    for radius, n in itertools.product((1.0, 2.0, 4.0, 6.0), (16, 1000)):
        series = Series("chebyshev", radius, lowest_degree(radius, 1e-7, dtype=WIDE))
        entry = radius ** (1 / 3)
        q, k = torch.full((1, 1, 1, 1), -entry), torch.full((1, 1, n, 1), entry)
        one = torch.ones(1, 1, n, 1)
        lse = polynomial.attend(Call.bind(q, (k, k), (one, one)), series.coefficients(), torch.float32).lse
        exact = definition(q.double(), (k.double(), k.double()), (one.double(), one.double())).lse
        lost = abs(math.expm1(float(lse.double() - exact)))
        assert lost <= series.rounding(torch.float32) + 2 * series.relative_error
    assert lost > 1e3 * torch.finfo(torch.float32).eps


# Cost


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.evidence
def test_counted_work_is_cubic_and_linear():
    """Multiply-adds of matrix products, counted as they run: N^3 (D + D_v), and 3 N binomial(D + g, g) (D_v + 1).

    Doubling N makes 8 times and twice as many. Control: the exact way at the same lengths.
    """
    d, d_v, degree = 6, 5, 3
    exact, fast = [], []
    for n in (32, 64, 128):
        x, v = uniform(1, 1, n, d), uniform(1, 1, n, d_v)
        exact.append(flops(lambda x=x, v=v: tensor_attention(x, x, x, v, v)))
        fast.append(flops(lambda x=x, v=v: tensor_attention(x, x, x, v, v, degree=degree)))
        assert exact[-1] == 2 * streamed.multiply_adds(n, (n, n), d, d_v) == 2 * n**3 * (d + d_v)
        assert fast[-1] == 2 * polynomial.multiply_adds(n, (n, n), d, d_v, degree)
        assert fast[-1] == 2 * 3 * n * math.comb(d + degree, degree) * (d_v + 1)
    assert [b / a for a, b in itertools.pairwise(exact)] == [8, 8]
    assert [b / a for a, b in itertools.pairwise(fast)] == [2, 2]


def seconds(n: int, method: TensorAttention) -> float:
    """Processor time of one call, the least of three: what others do on the machine does not count."""
    q, keys, values = inputs(n, b=1, heads=1, kv_heads=1, d=8, d_v=8, dtype=torch.float32)
    took = []
    for _ in range(3):
        start = time.process_time()
        method.attend(q, keys, values)
        took.append(time.process_time() - start)
    return min(took)


@pytest.mark.evidence
def test_time_grows_as_counted():
    """Four times the length: about 64 times as long exactly, about 4 times by polynomial. Margins are wide."""
    exact, fast = TensorAttention(), TensorAttention(degree=4, bound=1.0)
    slow = seconds(384, exact) / seconds(96, exact)
    quick = seconds(16384, fast) / seconds(4096, fast)
    assert slow > 20, slow
    assert quick < 12, quick
    assert seconds(4096, fast) < seconds(384, exact), "ten times the length in less time"


@pytest.mark.parametrize("mask", [None, "causal"], ids=str)
def test_polynomial_memory_is_linear(mask):
    """No tensor of N x N / 8 numbers, forward and backward."""
    n, method = 8192, TensorAttention(degree=3, bound=1.0)
    q, keys, values = inputs(n, b=1, heads=1, kv_heads=1, d=3, d_v=2, dtype=torch.float32)
    every = [x.requires_grad_() for x in (q, *keys, *values)]
    largest, _ = allocations(
        lambda: torch.autograd.grad(method.attend(q, keys, values, mask=mask).sum(), every)
    )
    assert largest < 4 * n * n // 8


# Triples


def circle(symbols: Tensor, modulus: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k1, k2 `[..., 4]` of numbers a, b, c with <q, k1 * k2> = cos(2 pi (a + b + c) / modulus)."""
    angle = 2 * math.pi * symbols.to(WIDE) / modulus
    c, s = angle.cos(), angle.sin()
    return torch.stack([c, -c, -s, -s], -1), torch.stack([c, s, c, s], -1), torch.stack([c, s, s, c], -1)


def finds_triples(x: Tensor, modulus: int, method: TensorAttention | None = None) -> Tensor:
    """For each number of x `[B, N]`, a value above 1/2 if it and two others sum to 0 mod `modulus`; width 5.

    The fifth dimension is that of one blank token, whose pair with itself scores between a match and the nearest
    miss and has value 0, where all others have 1. Third-order attention with these weights does it all.
    """
    batch, n = x.shape
    gap = 1 - math.cos(2 * math.pi / modulus)
    sharp = 8 * math.log(n) / gap
    q, k1, k2 = circle(x, modulus)
    blank = torch.tensor([0.0, 0, 0, 0, 1], dtype=WIDE).expand(batch, 1, 5)
    q = torch.cat([q, torch.ones(batch, n, 1, dtype=WIDE)], -1) * sharp
    k1, k2 = (torch.cat([nn.functional.pad(k, (0, 1)), blank], 1) for k in (k1, k2))
    k2 = k2 * torch.tensor([1.0, 1, 1, 1, 1 - gap / 2], dtype=WIDE)
    v = torch.cat([torch.ones(batch, n, 1, dtype=WIDE), torch.zeros(batch, 1, 1, dtype=WIDE)], 1)
    method = TensorAttention(scale=1.0) if method is None else method
    return method(*(t.unsqueeze(1) for t in (q, k1, k2, v, v)))[:, 0, :, 0]


def has_triple(x: Tensor, modulus: int) -> Tensor:
    sums = x[:, :, None, None] + x[:, None, :, None] + x[:, None, None]
    return (sums % modulus == 0).flatten(2).any(-1)


class Head(nn.Module):
    """An attention head over symbols: any queries, keys and values of `width` for each symbol, learned.

    With `pairs` it weighs pairs of keys, by scores that are sums over single keys, and reads the first one's value.
    Then a readout of the head's output and the symbol: an MLP, or a threshold on a weighted sum.
    """

    def __init__(self, modulus: int, width: int, hidden: int | None, pairs: bool = False) -> None:
        super().__init__()
        self.q, self.v, self.own = (nn.Embedding(modulus, width) for _ in range(3))
        self.k = nn.ModuleList(nn.Embedding(modulus, width) for _ in range(2 if pairs else 1))
        if hidden is None:
            self.readout: nn.Module = nn.Linear(width, 1)
        else:
            self.readout = nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        q, v, *keys = (table(x) for table in (self.q, self.v, *self.k))
        scores = [q @ k.mT for k in keys]
        if len(keys) == 1:
            weights = scores[0].softmax(-1)
        else:
            pairs = scores[0].unsqueeze(-1) + scores[1].unsqueeze(-2)  # [b, i, j, l]
            weights = pairs.flatten(2).softmax(-1).view_as(pairs).sum(-1)
        out = weights @ v
        return self.readout(out if self.hidden is None else torch.cat([out, self.own(x)], -1))[..., 0]


@pytest.mark.evidence
def test_third_order_detects_triples_where_second_order_does_not():
    """Is there a pair whose sum with mine is 0 mod 64? Third-order attention of width 5 with the weights above is
    always right, and with most pairs hidden from it (its control) not. A second-order head of the same width,
    free to choose any vectors for every symbol and an MLP to read it, trained on 51,200 sequences, hardly beats
    guessing."""
    modulus, n = 64, 10
    g = torch.Generator().manual_seed(0)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(modulus, (size, n), generator=g)
        return x, has_triple(x, modulus)

    x, right = batch(1000)
    assert torch.equal(finds_triples(x, modulus) > 0.5, right)
    flat = TensorAttention(scale=0.0)
    guess = max(float(right.float().mean()), 1 - float(right.float().mean()))
    assert ((finds_triples(x, modulus, flat) > 0.5) == right).float().mean() <= guess
    torch.manual_seed(0)
    head = Head(modulus, 5, hidden=64)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(800):
        seen, label = batch(64)
        loss = nn.functional.binary_cross_entropy_with_logits(head(seen), label.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        share = float(((head(x) > 0) == right).float().mean())
    assert share < guess + 0.1, (share, guess)


@pytest.mark.evidence
def test_no_second_order_head_of_any_width_exceeds_three_quarters():
    """The best possible second-order head, read by a threshold: pairs that complete a triple against mixed ones.

    The sign of a head's output less a threshold is that of a sum f over keys, and two right pairs hold the same
    keys as two mixed ones: f(b, b') + f(c, c') = f(b, c) + f(b', c'). So right and mixed pairs cannot be told apart
    better than 3 of 4, whatever the weights and the width. Training finds that 3/4, and no more where pairs are
    weighed by sums over single keys (control). Third-order attention of width 5 tells all apart.
    """
    modulus = 16
    right = [(3, 11), (5, 9)]
    mixed = [(3, 5), (11, 9), (3, 9), (11, 5)]
    x = torch.tensor([(2, *pair) for pair in right + mixed])  # the query is a 2
    label = torch.tensor([True] * 2 + [False] * 4)
    weight = torch.tensor([1 / 4] * 2 + [1 / 8] * 4)
    assert torch.equal(has_triple(x, modulus)[:, 0], label)
    assert torch.equal(finds_triples(x, modulus)[:, 0] > 0.5, label)
    head = Head(modulus, 32, hidden=None).to(WIDE)
    with torch.no_grad():
        q, k, v = head.q(x)[:, :1], head.k[0](x), head.v(x)
        f = ((q @ k.mT).exp() * head.readout(v)[..., 0].unsqueeze(1)).sum((1, 2))
    torch.testing.assert_close(f[0] + f[1], f[2] + f[3])
    best = dict.fromkeys(((4, False), (32, False), (4, True)), 0.0)
    for width, pairs in best:
        for seed in (0, 1):
            torch.manual_seed(seed)
            head = Head(modulus, width, None, pairs)
            optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
            for _ in range(300):
                logits = head(x)[:, 0]
                share = float((weight * ((logits > 0) == label)).sum())
                best[width, pairs] = max(best[width, pairs], share)
                losses = nn.functional.binary_cross_entropy_with_logits(
                    logits, label.float(), reduction="none"
                )
                optimizer.zero_grad()
                (weight * losses).sum().backward()
                optimizer.step()
    assert max(best.values()) == 0.75 and best[4, False] == 0.75, best


# Causal, and gradients


@pytest.mark.evidence
@pytest.mark.parametrize("method", [TensorAttention(), TensorAttention(degree=6, bound=1.0)], ids=str)
def test_causal_never_looks_ahead(method):
    """Later tokens changed, earlier outputs stay bit for bit. Control: the changed ones do change."""
    q, keys, values = inputs(30, dtype=torch.float32, heads=4)
    before = method.attend(q, keys, values, mask="causal")
    changed = [x.clone() for x in (q, *keys, *values)]
    for x in changed:
        x[:, :, 20:] = -x[:, :, 20:]
    after = method.attend(changed[0], changed[1:3], changed[3:], mask="causal")
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert (before - after)[:, :, 20:].abs().max() > 1e-3


def test_a_measured_bound_would_look_ahead():
    q, keys, values = inputs(8)
    for mask in ("causal", BlockCausal(3), Prefix(2)):
        with pytest.raises(ValueError, match="bound is needed"):
            TensorAttention(degree=4).attend(q, keys, values, mask=mask)


MASKS = {
    "none": None,
    "causal": "causal",
    "blocks": BlockCausal(7),
    "prefix": Prefix(5),
    "padding": Padding(torch.tensor([[1] * 20, [0] * 6 + [1] * 14])),
    "both": BlockCausal(1) & Padding(torch.tensor([[1] * 18 + [0] * 2, [0] * 6 + [1] * 14])),
}


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("numbers", [polynomial.NUMBERS, 3000], ids=["whole", "pieces"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_polynomial_is_within_its_bound_under_masks(mask, numbers, heads, monkeypatch):
    monkeypatch.setattr(polynomial, "NUMBERS", numbers)
    mask = MASKS[mask]
    q, keys, values = inputs(20, heads=heads[0], kv_heads=heads[1], d=3)
    method = TensorAttention(degree=10, bound=1.0)
    got, want = (
        method.attend(q, keys, values, mask=mask, return_lse=True),
        definition(q, keys, values, mask=mask),
    )
    error = method.expansion(q, keys, values, mask=mask).error
    assert (got.out - want.out).abs().max() <= error < 1e-8
    empty = want.lse == -torch.inf
    assert torch.equal(got.lse == -torch.inf, empty)
    assert (got.lse - want.lse)[~empty].abs().max() <= -math.log1p(-error)


@pytest.mark.parametrize("mask", ["causal", "both"])
@pytest.mark.parametrize(
    "method", [TensorAttention(tile=(2, 3, 2)), TensorAttention(degree=3, bound=1.0)], ids=str
)
def test_gradcheck(method, mask, monkeypatch):
    """Through output and lse, with grouped heads and rows that see nothing."""
    monkeypatch.setattr(polynomial, "NUMBERS", 300)
    n = 4
    mask = "causal" if mask == "causal" else BlockCausal(1) & Padding(torch.tensor([[0, 1, 0, 1]]))
    q, keys, values = inputs(n, b=1, heads=2, kv_heads=1, d=2, d_v=2, top=0.9)
    every = [x.requires_grad_() for x in (q, *keys, *values)]

    def run(q, k1, k2, v1, v2):
        result = method(q, k1, k2, v1, v2, mask=mask, return_lse=True)
        return result.out, result.lse.masked_fill(result.lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(run, every)
    if mask != "causal":
        grads = torch.autograd.grad([x.sum() for x in run(*every)], every)
        assert all(g.isfinite().all() for g in grads)
        assert not grads[0][:, :, 0].any() and not grads[1][:, :, [0, 2]].any()


@pytest.mark.evidence
def test_gradients_of_the_polynomial_approach_the_exact_ones():
    """Within a bound from the derivative of what the series cuts off. Control: a degree lower by 4 is outside it.

    |T_l'| <= l^2 / R on the interval, so relative to exp P' is off by at most b = e^R 2 sum over l > g of
    I_l(R) l^2 / R. The gradient of a score, p (y - out), is then off by at most p M (2 (b + epsilon) + epsilon) /
    (1 - epsilon) with M = max |v1| max |v2|, and that of q by this times scale max |k1| max |k2|.
    """
    q, keys, values = inputs(24, d=4)
    q.requires_grad_()
    weight = torch.randn(2, 2, 24, 4, dtype=WIDE)
    tops = [float(x.abs().max()) for x in (*keys, *values)]

    def gradient(run) -> Tensor:
        return torch.autograd.grad((run(q, keys, values) * weight).sum(), q)[0]

    want, errors, bounds = gradient(TensorAttention().attend), {}, {}
    for degree in (4, 6, 8):
        got = gradient(TensorAttention(degree=degree, bound=1.0).attend)
        errors[degree] = float(((got - want).abs().amax(-1) / weight.abs().sum(-1)).max())
        epsilon = Series("chebyshev", 1.0, degree).relative_error
        b = math.e * 2 * sum(bessel(level, 1.0) * level**2 for level in range(degree + 1, 40))
        bounds[degree] = (2 * (b + epsilon) + epsilon) / (1 - epsilon) * math.prod(tops) / 4
        assert errors[degree] <= bounds[degree]
    assert errors[4] > bounds[8] and errors[4] > 50 * errors[6] > 2500 * errors[8]


def bessel(order: int, x: float) -> float:
    """The modified Bessel function I_order(x), for x about 1."""
    terms = ((x / 2) ** (2 * k + order) / math.factorial(k) / math.factorial(k + order) for k in range(30))
    return math.fsum(terms)


# Other orders, and edges


@pytest.mark.parametrize("mask", [None, "causal"], ids=str)
def test_order_two_is_attention(mask):
    q, keys, values = inputs(20, (20,), heads=4, top=2.0)
    want = attend(q, keys[0], values[0], mask=mask, scale=1 / 5, return_lse=True)
    for method, near in ((TensorAttention(), 1e-6), (TensorAttention(degree=20, bound=2.0), 1e-6)):
        got = method.attend(q, keys, values, mask=mask, return_lse=True)
        torch.testing.assert_close(got.out, want.out, rtol=near, atol=near)
        torch.testing.assert_close(got.lse, want.lse.to(WIDE), rtol=near, atol=near)


@pytest.mark.evidence
def test_order_four_and_the_tradeoff_of_order_and_entries():
    """The same code for triples of keys: exact, within the bound, N^4 against linear work; and for entries above 1
    a higher order needs a higher degree, as scores reach B^m. Control: below 1 it needs a lower one."""
    q, keys, values = inputs(9, (9, 8, 7), top=1.2)
    want = definition(q, keys, values, mask="causal")
    got = TensorAttention(tile=(4, 3, 5, 2)).attend(q, keys, values, mask="causal", return_lse=True)
    torch.testing.assert_close(got.out, want.out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-11, atol=1e-12)
    fast = TensorAttention(degree=10, bound=1.2)
    made = fast.expansion(q, keys, values, mask="causal")
    assert made.series.radius == pytest.approx(1.2**4)
    assert (fast.attend(q, keys, values, mask="causal") - want.out).abs().max() <= made.error < 1e-4
    x = torch.zeros(1, 1, 4, 2)
    work = [
        flops(lambda n=n: TensorAttention().attend(x, (x, x, x[:, :, :n]), (x, x, x[:, :, :n])))
        for n in (2, 4)
    ]
    assert work[1] == 2 * work[0] == 2 * 4**4 * (2 + 2)
    degrees = {top: [lowest_degree(top**m, 1e-3) for m in (2, 3, 4)] for top in (0.7, 1.4)}
    assert degrees[1.4] == sorted(degrees[1.4]) and degrees[1.4][0] < degrees[1.4][2]
    assert degrees[0.7][0] > degrees[0.7][2]


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 31, 33, 65])
@pytest.mark.parametrize("method", [TensorAttention(), TensorAttention(degree=5, bound=1.0)], ids=str)
def test_lengths(n, method):
    q, keys, values = inputs(n, b=1, d=3)
    for m in (n, 7, 0):
        lengths = [keys[0], keys[1][:, :, :m]], [values[0], values[1][:, :, :m]]
        for mask in (None, "causal"):
            got, want = (
                method.attend(q, *lengths, mask=mask, return_lse=True),
                definition(q, *lengths, mask=mask),
            )
            torch.testing.assert_close(got.out, want.out, rtol=0, atol=2e-4)
            torch.testing.assert_close(got.lse, want.lse, rtol=0, atol=2e-4)
            assert got.out.shape == (1, 2, n, 4) and got.lse.shape == (1, 2, n)


def test_measured_radius_needs_no_promise():
    """What scores the entries allow, far below the bound by the largest entry where few are large."""
    q, keys, values = inputs(30, d=6)
    keys[0][:, :, 0, 0] = 3.0
    made = TensorAttention(degree=8).expansion(q, keys, values)
    scores = torch.einsum("bhid,bhjd,bhkd->bhijk", q, *keys) / 6
    assert scores.abs().max() <= made.series.radius < TensorAttention(degree=80, bound=3.0).bound ** 3 / 10
    got, want = TensorAttention(degree=8).attend(q, keys, values), definition(q, keys, values).out
    assert (got - want).abs().max() <= made.error
    assert isinstance(made, Expansion) and made.features == math.comb(14, 6) and made.dtype == WIDE
    assert output_error(0.5) == 1 and output_error(1.0) == math.inf


def test_uneven_magnitudes_do_not_overflow():
    """Entries of 1e6 against 1e-6: their monomials of degree 8 leave float32, balanced ones do not."""
    q, keys, values = inputs(16, d=3, dtype=torch.float32)
    want = TensorAttention(degree=8).attend(q, keys, values)
    stretched = [keys[0] * 2.0**20, keys[1] * 2.0**-40], values
    torch.testing.assert_close(TensorAttention(degree=8).attend(q * 2.0**20, *stretched), want)
    tiny = [keys[0] * 1e-40, keys[1]], values
    assert TensorAttention(degree=8).attend(q, *tiny).isfinite().all()


def naive(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The formula with every step in the inputs' own precision."""
    scores = torch.einsum("bhid,bhjd,bhkd->bhijk", q, *keys) / q.shape[3]
    weights = scores.flatten(3).softmax(-1).view_as(scores)
    return torch.einsum("bhijk,bhjd,bhkd->bhid", weights, *values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("error", [None, 1e-5], ids=["exact", "polynomial"])
def test_low_precision_errs_no_more_than_naive(dtype, error):
    q, keys, values = inputs(40, d=4, dtype=dtype)
    want = definition(q.to(WIDE), [k.to(WIDE) for k in keys], [v.to(WIDE) for v in values]).out
    degree = None if error is None else 10
    method = TensorAttention(degree=degree)
    got = method.attend(q, keys, values, return_lse=True)
    assert got.out.dtype == dtype and got.lse.dtype == torch.float32
    assert over_budget(got.out, naive(q, keys, values), want) is None


def test_padding_may_be_anything():
    keep = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
    q, keys, values = inputs(12)
    dirty = [[x.clone() for x in xs] for xs in (keys, values)]
    for x in (*dirty[0], *dirty[1]):
        x[1, :, 8:] = torch.nan
    for method in (TensorAttention(), TensorAttention(degree=6)):
        clean = method.attend(q, keys, values, mask=Padding(keep))
        assert torch.equal(method.attend(q, *dirty, mask=Padding(keep)), clean)
        torch.testing.assert_close(
            method.attend(q[1:], [k[1:, :, :8] for k in keys], [v[1:, :, :8] for v in values]),
            clean[1:], rtol=1e-4, atol=1e-5,
        )  # fmt: skip


ANY = {
    "documents": Documents(torch.tensor([0, 3, 9, 20])),
    "dense": torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.3,
    "heads": torch.rand(2, 4, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.1,
    "padding": Padding(torch.tensor([[1] * 20, [0] * 20])),
}


@pytest.mark.parametrize("mask", ANY, ids=str)
def test_the_exact_way_takes_any_mask(mask):
    q, keys, values = inputs(20, heads=4, top=2.0)
    got = TensorAttention(tile=(3, 4, 5)).attend(q, keys, values, mask=ANY[mask], return_lse=True)
    want = definition(q, keys, values, mask=ANY[mask])
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-30])
@pytest.mark.parametrize("batch", [0, 2])
def test_scales_and_empty_batches(scale, batch):
    q, keys, values = inputs(12, b=batch)
    want = definition(q, keys, values, scale=scale).out
    for method in (TensorAttention(scale=scale), TensorAttention(degree=14, scale=scale)):
        torch.testing.assert_close(method.attend(q, keys, values), want, rtol=1e-7, atol=1e-7)


def test_function_and_method_are_one():
    q, (k1, k2), (v1, v2) = inputs(16)
    got = tensor_attention(
        q=q, k1=k1, k2=k2, v1=v1, v2=v2, degree=4, error=None, bound=1.0, series="taylor", scale=0.1,
        mask="causal", return_lse=True,
    )  # fmt: skip
    method = TensorAttention(degree=4, error=None, bound=1.0, series="taylor", scale=0.1, tile=None)
    want = method(q=q, k1=k1, k2=k2, v1=v1, v2=v2, mask="causal", return_lse=True)
    assert isinstance(got, Partial) and all(torch.equal(a, b) for a, b in zip(got, want))
    exact = definition(q=q, keys=(k1, k2), values=(v1, v2), mask="causal", scale=0.1)
    assert (got.out - exact.out).abs().max() < 1e-3
    made = TensorAttention(error=1e-2).expansion(q=q, keys=(k1, k2), values=(v1, v2), mask=None)
    assert made.series.degree == lowest_degree(made.series.radius, 1e-2) and made.error <= 1e-2
    assert TensorAttention().expansion(q, (k1, k2), (v1, v2)) is None, "exact"


def test_strides_are_honoured():
    wide = uniform(2, 12, 5, 2, 4).permute(2, 0, 3, 1, 4)  # one fused tensor, transposed
    q, k1, k2, v1, v2 = wide
    whole = [x.contiguous() for x in wide]
    for degree in (None, 6):
        assert torch.equal(
            tensor_attention(q, k1, k2, v1, v2, degree=degree), tensor_attention(*whole, degree=degree)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degree": 3, "error": 0.1}, "not both"),
        ({"degree": -1}, "degree must be"),
        ({"degree": 1.5}, "degree must be"),
        ({"error": 0}, "error must be"),
        ({"bound": -1.0}, "bound must be"),
        ({"series": "pade"}, "series must be"),
        ({"tile": (4, 0, 4)}, "tile must be"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TensorAttention(**settings)


def test_bad_calls():
    q, (k1, k2), (v1, v2) = inputs(8)
    run = TensorAttention()
    for arguments, message in (
        ((q, k1[0], k2, v1, v2), "k1 must be a tensor"),
        ((q, k1, k2[..., :3], v1, v2), "k2 must be"),
        ((q, k1, k2, v1, v2[:, :, :5]), "v2 must be"),
        ((q, k1[:, :1].expand(2, 3, 8, 5), k2, v1, v2), "multiple of the kv heads"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)
    with pytest.raises(TypeError, match="one floating dtype"):
        run(q, k1.float(), k2, v1, v2)
    with pytest.raises(TypeError, match="bool"):
        run(q, k1, k2, v1, v2, mask=torch.zeros(8, 8))
    with pytest.raises(ValueError, match="as many"):
        run.attend(q, (k1, k2), (v1,))
    with pytest.raises(ValueError, match="as many"):
        run.attend(q, (), ())
    with pytest.raises(ValueError, match="tile must have 3"):
        TensorAttention(tile=(4, 4))(q, k1, k2, v1, v2)
    with pytest.raises(ValueError, match=r"batch|heads"):
        run(q, k1, k2, v1, v2, mask=torch.ones(3, 1, 8, 8, dtype=torch.bool))


def test_bad_polynomials():
    q, keys, values = inputs(8, top=2.0)
    with pytest.raises(ValueError, match="bound is 1.0, but there is an entry of size"):
        TensorAttention(degree=4, bound=1.0).attend(q, keys, values)
    with pytest.raises(ValueError, match="proves nothing.*lowest degree that does is 16"):
        TensorAttention(degree=4, bound=2.0).attend(q, keys, values)
    with pytest.raises(ValueError, match="no degree does"):
        TensorAttention(degree=4, bound=4.0).attend(q, keys, values)
    with pytest.raises(ValueError, match="monomials"):
        TensorAttention(degree=40, bound=2.0).attend(q, keys, values)
    small = inputs(8)
    for mask in (Window(2, 0), Documents(torch.tensor([0, 3, 8])), torch.ones(8, 8, dtype=torch.bool)):
        with pytest.raises(ValueError, match="prefix"):
            TensorAttention(degree=4, bound=1.0).attend(*small, mask=mask)
        with pytest.raises(ValueError, match="prefix"):  # also where the exact way would be taken
            TensorAttention(error=1e-4, bound=1.0).attend(*small, mask=mask)
    for arguments, message in (
        (("pade", 1.0, 2), "series"),
        (("taylor", -1.0, 2), "radius"),
        (("taylor", 1.0, -2), "degree"),
    ):
        with pytest.raises(ValueError, match=message):
            Series(*arguments)
    with pytest.raises(ValueError, match="error must be > 0"):
        lowest_degree(radius=1.0, error=0.0)
