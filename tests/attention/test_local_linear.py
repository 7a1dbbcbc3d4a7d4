"""Local linear attention: against its closed form, softmax attention, ridge regression, and its claims."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.conformance.common import over_budget
from tests.conformance.test_memory import allocations
from tilewise.attention import attend
from tilewise.attention.local_linear import LocalLinear, LocalLinearAttention, local_linear_attention
from tilewise.attention.local_linear.blockwise import Row
from tilewise.attention.local_linear.definition import definition
from tilewise.tiles import Causal, Documents, Padding, Window, as_mask

WIDE = torch.float64
SOLVERS = ("cg", "cholesky")
GRID = torch.rand(17, 33, generator=torch.Generator().manual_seed(9)) < 0.4
# heads, kv heads, queries, keys, mask
CASES = {
    "causal": (2, 2, 40, 40, "causal"),
    "grouped": (4, 2, 40, 40, "causal"),
    "one kv head": (3, 1, 17, 33, None),
    "later chunk": (2, 1, 5, 33, "causal"),
    "more queries than keys": (2, 2, 33, 5, "causal"),
    "window": (2, 2, 33, 33, Window(5, 2)),
    "documents": (2, 1, 40, 40, Causal() & Documents(torch.tensor([0, 3, 3, 20, 40]))),
    "grid": (2, 2, 17, 33, GRID),
}


def inputs(heads=2, kv_heads=2, n_q=40, n_k=40, d=6, d_v=5, b=2, seed=0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, heads, n_q, d), (b, kv_heads, n_k, d), (b, kv_heads, n_k, d_v))
    return [torch.randn(shape, generator=g, dtype=WIDE) for shape in shapes]


def with_gradients(run, leaves: list[Tensor]) -> list[Tensor]:
    """The output of `run(*leaves)` and the gradients of all leaves for a fixed gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = run(*leaves)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=WIDE)
    return [out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))]


def rounding(q: Tensor, k: Tensor, mask, ridge: Tensor) -> float:
    """What rounding may change in the closed form and its gradients, relative to the largest of them.

    Moments are sums of n + d terms. Solving with Sigma multiplies their errors by its condition number c, at most
    (trace + ridge) / ridge; the denominator, 1 - mu . Sigma^-1 mu >= 1 / c, by c again. 8 covers the chain of
    products.
    """
    mean = attend(q, k, k, mask=mask)
    square = attend(q, k, k.square().sum(-1, keepdim=True), mask=mask)
    trace = square.squeeze(-1) - 2 * (mean * q).sum(-1) + q.square().sum(-1)
    condition = float((trace / ridge + 1).max())
    return 8 * (k.shape[2] + k.shape[3]) * 2.0**-52 * condition**2


@pytest.mark.evidence
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", CASES)
def test_tiles_equal_the_direct_solve_forward_and_backward(case, solver):
    """Output and gradients of q, k, v and ridge are those of the closed form, differentiated by autograd.

    Controls, each of which must be off: softmax attention; conjugate gradients cut after two steps; and, for the
    gradient, treating each query's slope as a constant, which is what leaving out the implicit part would do.
    """
    *sizes, mask = CASES[case]
    leaves = [*inputs(*sizes), torch.linspace(0.1, 0.5, sizes[0], dtype=WIDE).unsqueeze(1)]

    def direct(q, k, v, ridge):
        return definition(q, k, v, mask=mask, ridge=ridge)

    def tiled(q, k, v, ridge, **options):
        options = {"solver": solver, "tile": (16, 8), **options}
        return local_linear_attention(q, k, v, mask=mask, ridge=ridge, **options)

    share = rounding(*leaves[:2], mask, leaves[3])
    assert share < 1e-7, "the tolerance must mean something"
    want, got = with_gradients(direct, leaves), with_gradients(tiled, leaves)
    limits = [share * float(x.abs().max()) for x in want]
    for name, a, b, limit in zip(("out", "q", "k", "v", "ridge"), got, want, limits):
        assert (a - b).abs().max() <= limit, (
            f"{name} is off by {float((a - b).abs().max()):.1e} > {limit:.1e}"
        )
    others = [attend(*leaves[:3], mask=mask)]
    if solver == "cg":
        others.append(tiled(*leaves, steps=2))
    for other in others:
        assert (other - want[0]).abs().max() > 1e4 * limits[0]
    held = with_gradients(lambda q, k, v, ridge: _slopes_held(q, k, v, ridge, mask), leaves)
    assert (held[0] - want[0]).abs().max() <= limits[0]
    assert (held[1] - want[1]).abs().max() > 1e4 * limits[1]


def _slopes_held(q, k, v, ridge, mask) -> Tensor:
    """The right output, whose gradient takes the solution rho of each query's system for a constant."""
    heads = q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    seen = as_mask(mask).bind(q.shape[2], k.shape[2]).tokens()
    empty = ~seen.any(-1, keepdim=True)
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~seen & ~empty, -math.inf)
    weights = scores.softmax(-1).masked_fill(empty, 0)
    mean = weights @ k
    off = k.unsqueeze(2) - mean.unsqueeze(3)
    covariance = torch.einsum("bhqk,bhqkd,bhqke->bhqde", weights, off, off)
    system = covariance + ridge[..., None, None] * torch.eye(q.shape[3], dtype=WIDE)
    rho = torch.linalg.solve(system, mean - q).detach()
    return (weights * (1 - (off * rho.unsqueeze(3)).sum(-1))) @ v + 0 * ridge.sum()


@pytest.mark.evidence
def test_the_closed_form_is_the_regression():
    """One query at a time: minimising the weighted squares by least squares over a stacked design gives the same.

    Controls: penalising the intercept too, and centring at zero instead of the query.
    """
    q, k, v = inputs(n_q=12, n_k=12, b=1)
    ridge, scale = 0.3, 0.4
    got = local_linear_attention(q=q, k=k, v=v, mask="causal", ridge=ridge, scale=scale)
    for h, i in [(0, 0), (0, 5), (1, 1), (1, 11)]:
        keys, values = k[0, h, : i + 1], v[0, h, : i + 1]
        weights = (scale * keys @ q[0, h, i]).softmax(0).sqrt().unsqueeze(1)

        def fit(z: Tensor, penalty: list[float], weights=weights, values=values) -> Tensor:
            design = torch.cat([torch.ones(len(z), 1, dtype=WIDE), z], 1)
            rows = torch.cat([weights * design, torch.tensor(penalty, dtype=WIDE).sqrt().diag()])
            targets = torch.cat([weights * values, torch.zeros(len(penalty), values.shape[1], dtype=WIDE)])
            return torch.linalg.lstsq(rows, targets).solution[0]

        d = keys.shape[1]
        want = fit(keys - q[0, h, i], [0.0] + [ridge] * d)
        # Least squares by QR: 13 + 6 terms a sum, condition number below 1 / sqrt(ridge) times the design's norm.
        torch.testing.assert_close(got[0, h, i], want, rtol=0, atol=1e-12)
        if i:  # one key alone says nothing of slopes
            for wrong in (fit(keys - q[0, h, i], [ridge] * (d + 1)), fit(keys, [0.0] + [ridge] * d)):
                assert (got[0, h, i] - wrong).abs().max() > 1e-2


@pytest.mark.evidence
def test_limits_are_softmax_attention_and_linear_regression():
    """Ridge to infinity: softmax attention. Scale 0: a ridge regression with intercept over the keys so far.

    The output differs from softmax attention by Cov(v, k) (C + ridge I)^-1 (m - q), with m the mean key: by at most
    |Cov(v, k)| |m - q| / ridge. Control: at a middling ridge and scale it is neither.
    """
    q, k, v = inputs(b=1)
    soft = attend(q, k, v, mask="causal")
    far = (attend(q, k, k, mask="causal") - q).norm(dim=-1, keepdim=True)
    for ridge in (1e2, 1e4, 1e8):
        out = local_linear_attention(q, k, v, mask="causal", ridge=ridge)
        largest = v.abs().amax() * k.norm(dim=-1).amax() * far / ridge
        assert ((out - soft).abs() <= largest + 1e-13).all()
    flat = local_linear_attention(q, k, v, mask="causal", ridge=0.2, scale=0.0)
    for i in (0, 1, 7, 39):
        keys, values = k[:, :, : i + 1], v[:, :, : i + 1]
        off, rest = keys - keys.mean(2, keepdim=True), values - values.mean(2, keepdim=True)
        gram = off.mT @ off + 0.2 * (i + 1) * torch.eye(
            6, dtype=WIDE
        )  # ridge is relative to the sum of weights
        slope = torch.linalg.solve(gram, off.mT @ rest)
        want = values.mean(2) + ((q[:, :, i] - keys.mean(2)).unsqueeze(2) @ slope).squeeze(2)
        torch.testing.assert_close(flat[:, :, i], want, rtol=0, atol=1e-12)
    between = local_linear_attention(q, k, v, mask="causal", ridge=0.2)
    for limit in (soft, flat):
        assert (between - limit)[:, :, 8:].abs().mean() > 0.1


@pytest.mark.evidence
def test_no_boundary_bias():
    """At the end of the data the bias of softmax attention falls as the width h of its kernel, that of LLA faster.

    Keys lie on an arc, so that exp(scale q . k) is a kernel of width h = 1 / sqrt(scale) in the angle. A weighted
    mean at the end is off by f'(0) h sqrt(2 / pi) to first order; a local line has no such term: what is left is of
    order h^2 or higher. Control: in the middle of the arc both are of second order, so the end is what differs.
    """
    angles = torch.linspace(0, 1, 4001, dtype=WIDE)
    k = torch.stack([angles.cos(), angles.sin()], 1)[None, None]
    v = (2 * angles).exp().view(1, 1, -1, 1)
    widths = torch.tensor([0.1, 0.05, 0.025], dtype=WIDE)

    def biases(at: int) -> tuple[Tensor, Tensor]:
        q = k[:, :, at : at + 1]
        soft = torch.stack([attend(q, k, v, scale=float(h**-2)) for h in widths]).flatten()
        line = [local_linear_attention(q, k, v, scale=float(h**-2), ridge=1e-9) for h in widths]
        return soft - v[0, 0, at], torch.stack(line).flatten() - v[0, 0, at]

    def order(bias: Tensor) -> float:
        return float((bias[0] / bias[-1]).abs().log() / math.log(4))

    soft, line = biases(0)
    assert 0.9 < order(soft) < 1.1 and order(line) > 1.9
    first = 2 * widths * math.sqrt(2 / math.pi)
    assert (
        (soft / first - 1).abs() < 3 * widths
    ).all()  # the next term is f'' h^2 / 2, or h sqrt(pi / 2) of it
    assert (line.abs() < soft.abs() / 10).all()
    soft, line = biases(2000)
    assert order(soft) > 1.9 and order(line) > 1.9


SEGMENT, LENGTH = 64, 512
SCALES, RIDGES = (0.0, 10.0, 30.0, 100.0, 300.0), (1e-3, 1e-2, 1e3)


def stream(kind: str, seed: int, b: int = 4, d: int = 8, d_v: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Unit keys, values and the function without noise, `[b, 1, LENGTH, *]`, in segments of keys around one centre.

    piecewise: each segment has a linear function of its own. linear: one for all. constant: the same value.
    """
    g = torch.Generator().manual_seed(seed)
    segments = LENGTH // SEGMENT

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=WIDE)

    centres, maps = normalize(draw(b, segments, d), dim=-1), draw(b, segments, d_v, d)
    if kind == "linear":
        maps = maps[:, :1].expand(-1, segments, -1, -1)
    centres, maps = (x.repeat_interleave(SEGMENT, 1) for x in (centres, maps))
    k = normalize(centres + 0.3 * draw(b, LENGTH, d) / d**0.5, dim=-1)
    f = torch.einsum("bnij,bnj->bni", maps, k)
    if kind == "constant":
        f = draw(b, 1, d_v).expand(-1, LENGTH, -1)
    return tuple(x.unsqueeze(1) for x in (k, f + 0.05 * draw(*f.shape), f))  # type: ignore[return-value]


def mesa(q: Tensor, k: Tensor, v: Tensor, ridge: float) -> Tensor:
    """Linear attention solved to the end: q (sum k k^T + ridge I)^-1 sum k v^T over the keys so far."""
    gram = torch.einsum("bhnd,bhne->bhnde", k, k).cumsum(2) + ridge * torch.eye(k.shape[3], dtype=k.dtype)
    cross = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    return (q.unsqueeze(3) @ torch.linalg.solve(gram, cross)).squeeze(3)


def predictions(k: Tensor, v: Tensor, settings: dict | None = None) -> dict[str, dict[tuple, Tensor]]:
    """The next value predicted from those before it, by each method at each (or the chosen) setting."""
    q, k, v = k[:, :, 1:], k[:, :, :-1], v[:, :, :-1]

    def line(scale: float, ridge: float) -> Tensor:
        return local_linear_attention(q, k, v, mask="causal", scale=scale, ridge=ridge, solver="cholesky")

    run = {
        "softmax": (lambda scale: local_linear_attention(q, k, v, mask="causal", scale=scale, ridge=1e12)),
        "linear": (lambda ridge: mesa(q, k, v, ridge)),
        "affine": (lambda ridge: line(0.0, ridge)),
        "lla": line,
    }
    grid = {
        "softmax": [(s,) for s in SCALES],
        "linear": [(r,) for r in (*RIDGES, 1.0, 10.0)],
        "affine": [(r,) for r in RIDGES],
        "lla": [(s, r) for s in SCALES for r in RIDGES],
    }
    chosen = grid if settings is None else {name: [setting] for name, setting in settings.items()}
    return {name: {x: run[name](*x) for x in chosen[name]} for name in run}


def errors(out: Tensor, f: Tensor) -> Tensor:
    """Mean squared error at every place within a segment, from the second segment on, `[SEGMENT]`."""
    by_place = (out - f[:, :, 1:]).square().mean((0, 1, 3))
    return by_place[SEGMENT - 1 :].view(-1, SEGMENT).mean(0)


def measured(kind: str) -> dict[str, Tensor]:
    """Errors of each method on two fresh batches of streams, at the setting that was best on another."""
    k, v, f = stream(kind, seed=0)
    settings = {
        name: min(outs, key=lambda x: float(errors(outs[x], f).mean()))
        for name, outs in predictions(k, v).items()
    }
    runs = []
    for seed in (1, 2):
        k, v, f = stream(kind, seed)
        outs = {name: next(iter(x.values())) for name, x in predictions(k, v, settings).items()}
        outs["backwards"] = 2 * outs["softmax"] - outs["lla"]
        if settings["softmax"] != settings["lla"][:1]:
            q = k[:, :, 1:]
            same = attend(q, k[:, :, :-1], v[:, :, :-1], mask="causal", scale=settings["lla"][0])
            outs["backwards"], outs["no slope"] = 2 * same - outs["lla"], same
        runs.append({name: errors(out, f) for name, out in outs.items()})
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


@pytest.mark.evidence
def test_adapts_where_softmax_attention_and_linear_regression_do_not():
    """Predicting the next value of a function that changes from segment to segment; settings from other streams.

    Local linear attention errs less than softmax attention, and late in a segment much less: it goes on learning
    where a weighted mean has stopped. One linear regression over everything, which is linear attention at its best,
    errs more by far. Controls: without the slope, or with its sign changed, the gain is gone; and so it is where
    there is nothing to gain, for one constant function, and over the affine regression for one linear function.
    """
    e = measured("piecewise")
    late = {name: x[:, SEGMENT // 2 :].mean(1) for name, x in e.items()}
    assert (e["lla"].mean(1) < 0.85 * e["softmax"].mean(1)).all()
    assert (late["lla"] < late["softmax"] / 3).all()
    assert (e["lla"].mean(1) < e["affine"].mean(1) / 4).all() and (
        e["lla"].mean(1) < e["linear"].mean(1) / 4
    ).all()
    for name in ("no slope", "backwards"):
        assert (e[name].mean(1) > e["softmax"].mean(1)).all(), f"{name} should be worse"
    early = {name: x[:, SEGMENT // 8 : SEGMENT // 4].mean(1) for name, x in e.items()}
    assert (early["lla"] / late["lla"] > 2 * early["softmax"] / late["softmax"]).all()

    constant = measured("constant")
    ratio = constant["lla"].mean(1) / constant["softmax"].mean(1)
    assert ((ratio - 1).abs() < 0.01).all(), "an advantage where there is none to have"
    linear = measured("linear")
    assert (linear["lla"].mean(1) / linear["affine"].mean(1) - 1).abs().max() < 0.2
    assert (linear["lla"].mean(1) < linear["softmax"].mean(1) / 10).all()


@pytest.mark.evidence
@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_is_linear_forward_and_backward(solver):
    """Nothing larger than q, or than a tile's scores or (Cholesky) matrices, is made; twice the tokens hold twice.

    Control: the closed form makes N x N x D numbers.
    """
    d, tile = 16, 64

    def bytes_of(n: int) -> tuple[int, int]:
        leaves = [x.float().requires_grad_() for x in inputs(1, 1, n, n, d, d, b=1)]

        def both():
            out = local_linear_attention(*leaves, mask="causal", solver=solver, tile=(tile, tile), steps=2)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        return allocations(both)

    largest, held = bytes_of(512)
    twice_largest, twice_held = bytes_of(1024)
    tiles = 4 * tile * (tile if solver == "cg" else d * d)
    assert largest <= max(4 * 512 * d, tiles) and twice_largest <= max(4 * 1024 * d, tiles)
    assert twice_held - held <= 1.1 * held  # what tiles need comes once
    small = [x.float() for x in inputs(1, 1, 128, 128, d, d, b=1)]
    assert allocations(lambda: definition(*small, mask="causal"))[0] >= 4 * 128 * 128 * d


@pytest.mark.evidence
def test_steps_do_not_grow_with_length(monkeypatch):
    """Each step is a pass over the keys; their number depends on the ridge, not on N: work stays that of attention.

    Control: a ridge 100 times smaller takes more.
    """
    passes = 0
    times = Row._times

    def counted(self, x):
        nonlocal passes
        passes += 1
        return times(self, x)

    monkeypatch.setattr(Row, "_times", counted)

    def steps(n: int, ridge: float) -> float:
        nonlocal passes
        passes = 0
        q, k, v = inputs(1, 1, n, n, d=32, b=1)
        result = local_linear_attention(
            q, k, v, ridge=ridge, tolerance=1e-6, tile=(64, 256), return_bound=True
        )
        assert float(result.bound.max()) <= 1e-6
        return passes / (n // 64)

    few, many = steps(256, 0.5), steps(1024, 0.5)
    assert many <= few + 1 and many < 32 / 2
    assert steps(256, 0.005) > 1.5 * few


# The solver


def test_the_bound_holds_at_every_step():
    """|out - exact| <= bound * deviation of the values, and the bound falls; the last step reaches rounding."""
    q, k, v = inputs(n_q=60, n_k=60, d=8)
    exact = definition(q, k, v, mask="causal", ridge=0.05)
    mean, square = attend(q, k, v, mask="causal"), attend(q, k, v.square(), mask="causal")
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    last = math.inf
    for steps in (1, 2, 4, 6, 8, 12):
        got = local_linear_attention(q, k, v, mask="causal", ridge=0.05, steps=steps, return_bound=True)
        assert ((got.out - exact).abs() <= got.bound.unsqueeze(3) * deviation + 1e-11).all()
        last = min(last, float(got.bound.max()))
        if steps < 8:
            assert (got.out - exact).abs().max() > 1e-6, "too easy to say anything"
    assert last < 1e-13
    loose = local_linear_attention(q, k, v, mask="causal", ridge=0.05, tolerance=1e-3, return_bound=True)
    assert 1e-6 < loose.bound.max() <= 1e-3 and not loose.bound.requires_grad


def test_the_backward_solve_stops_at_the_tolerance():
    leaves = inputs(n_q=30, n_k=30)

    def tiled(tolerance):
        return with_gradients(
            lambda q, k, v: local_linear_attention(q, k, v, mask="causal", ridge=0.2, tolerance=tolerance),
            leaves,
        )

    fine = tiled(None)
    previous = math.inf
    for tolerance in (1e-1, 1e-3, 1e-5, 1e-7):
        off = max(float((a - b).abs().max()) for a, b in zip(tiled(tolerance), fine))
        assert 0 < off < 100 * tolerance and off < previous
        previous = off


def test_queries_far_from_keys_lose_less_than_in_the_closed_form():
    """The mean-centred system is the better conditioned one: in float32, at queries 30 times as long."""
    q, k, v = inputs(n_q=64, n_k=64, d=8)
    q = 30 * q
    exact = definition(q, k, v, ridge=0.1, scale=0.01)
    low = [x.float() for x in (q, k, v)]
    naive = (definition(*low, ridge=0.1, scale=0.01) - exact).square().mean().sqrt()
    for solver in SOLVERS:
        ours = (
            (local_linear_attention(*low, ridge=0.1, scale=0.01, solver=solver) - exact)
            .square()
            .mean()
            .sqrt()
        )
        assert ours < naive / 20


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck(solver):
    q, k, v = (x.requires_grad_() for x in inputs(2, 1, 4, 5, d=3, d_v=2, b=1))
    ridge = torch.rand(1, 2, 4, dtype=WIDE).add(0.2).requires_grad_()

    def run(q, k, v, ridge):
        return local_linear_attention(q, k, v, mask="causal", ridge=ridge, solver=solver, tile=(2, 3))

    assert torch.autograd.gradcheck(run, (q, k, v, ridge))


def test_affine_functions_are_reproduced():
    """Values on a line give that line, also for queries outside the keys: no weights matter.

    The ridge shrinks the slope S: what is lost, ridge S A^-1 (m - q), is at most ridge |S| |m - q| over the least
    variance of the keys.
    """
    q, k, _ = inputs(n_q=30, n_k=30)
    q = 3 * q
    slope, start = inputs(1, 1, 5, 1, b=1)[0][0, 0], torch.arange(5, dtype=WIDE)
    v, want = (x @ slope.mT + start for x in (k, q))
    weights = (0.1 * q @ k.mT).softmax(-1)
    mean = weights @ k
    covariance = torch.einsum("bhqk,bhkd,bhke->bhqde", weights, k, k) - mean.unsqueeze(3) * mean.unsqueeze(4)
    least = torch.linalg.eigvalsh(covariance)[..., :1]
    lost = 1e-8 * torch.linalg.matrix_norm(slope, 2) * (mean - q).norm(dim=-1, keepdim=True) / least
    for solver in SOLVERS:
        out = local_linear_attention(q, k, v, ridge=1e-8, scale=0.1, solver=solver)
        assert ((out - want).abs() <= 1.1 * lost).all() and lost.max() < 1e-4
    assert (attend(q, k, v, scale=0.1) - want).abs().max() > 1


# Calls


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_the_closed_form(dtype, solver):
    """Against float64 at the same inputs; the closed form runs in float32, which is all that solves support."""
    low = [x.to(dtype) for x in inputs(n_q=200, n_k=200, d=8)]
    for ridge in (1.0, 0.1):
        exact = definition(*(x.double() for x in low), mask="causal", ridge=ridge)
        naive = definition(*(x.float() for x in low), mask="causal", ridge=ridge).to(dtype)
        got = local_linear_attention(*low, mask="causal", ridge=ridge, solver=solver)
        assert got.dtype == dtype
        assert over_budget(got, naive, exact) is None


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 300])
def test_lengths(n):
    q, k, v = inputs(2, 1, n, n, d=4, b=1)
    want = definition(q, k, v, mask="causal", ridge=0.5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for tile in ((128, 128), (16, 32)) if n < 129 else ((128, 128),):
        out = local_linear_attention(*leaves, mask="causal", ridge=0.5, tile=tile)
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))
    none = local_linear_attention(q, k[:, :, :0], v[:, :, :0])
    assert none.shape == (1, 2, n, 5) and (none == 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_future_does_not_change_a_bit(solver):
    """Nor in the gradients that earlier outputs send back."""
    q, k, v = (x.float() for x in inputs(n_q=70, n_k=70))
    for first in (1, 17, 32, 69):
        changed = []
        for _ in range(2):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = local_linear_attention(*leaves, mask="causal", ridge=0.3, solver=solver, tile=(32, 32))
            grads = torch.autograd.grad(out[:, :, :first].sum(), leaves)
            changed.append([x[:, :, :first] for x in (out, *grads)])
            q, k, v = (
                torch.cat([x[:, :, :first], 50 * torch.randn_like(x[:, :, first:])], 2) for x in (q, k, v)
            )
        assert all(torch.equal(a, b) for a, b in zip(*changed))


def test_token_by_token_equals_the_whole():
    """Keys and values are the state: chunks of any length, down to one query, give the rows of the full call."""
    q, k, v = inputs(4, 2, 30, 30)
    whole = local_linear_attention(q, k, v, mask="causal", ridge=0.3)
    start = 0
    for length in (11, 1, 1, 16, 1):
        end = start + length
        part = local_linear_attention(
            q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask="causal", ridge=0.3
        )
        torch.testing.assert_close(part, whole[:, :, start:end], rtol=0, atol=1e-11)
        start = end


def test_padding_equals_leaving_tokens_out():
    leaves = inputs(n_q=24, n_k=24)
    for shown in (slice(5, 24), slice(0, 19)):
        keep = torch.zeros(2, 24, dtype=torch.bool)
        keep[0], keep[1, shown] = True, True
        mask = Causal() & Padding(keep)
        out = local_linear_attention(*leaves, mask=mask, ridge=0.3, tile=(8, 8))
        alone = definition(*(x[1:, :, shown] for x in leaves), mask="causal", ridge=0.3)
        torch.testing.assert_close(out[1:, :, shown], alone, rtol=1e-9, atol=1e-9)
        assert shown.start == 0 or (out[1, :, :5] == 0).all()


def test_rows_that_see_nothing_give_zeros_and_no_gradients():
    for solver in SOLVERS:
        leaves = [x.requires_grad_() for x in inputs(n_q=9, n_k=9)]
        seen = torch.ones(9, 9, dtype=torch.bool).tril()
        seen[[0, 4]] = False
        got = local_linear_attention(*leaves, mask=seen, solver=solver, tile=(4, 4), return_bound=True)
        assert (got.out[:, :, [0, 4]] == 0).all() and (got.bound[:, :, [0, 4]] == 0).all()
        grads = torch.autograd.grad(got.out.square().sum(), leaves)
        assert (grads[0][:, :, [0, 4]] == 0).all() and all(g.isfinite().all() for g in grads)
        out = local_linear_attention(*leaves, mask=seen & False, solver=solver)
        assert (out == 0).all() and all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_strides_do_not_matter():
    q, k, v = inputs()
    want = local_linear_attention(q, k, v)
    other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    wide = torch.cat([v, v], 3)[..., 5:]
    # Products of transposed operands may add up in another order, on some processors.
    torch.testing.assert_close(local_linear_attention(*other, wide), want, rtol=0, atol=1e-12)
    expanded = local_linear_attention(
        q[:1].expand(3, -1, -1, -1), k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)
    )
    torch.testing.assert_close(expanded[2:], want[:1], rtol=0, atol=1e-12)


def test_module_learns_its_ridge():
    q, k, v = inputs(heads=4)
    k, v = k[:, :2], v[:, :2]
    fixed = LocalLinearAttention(
        ridge=0.3, heads=None, scale=0.2, solver="cholesky", tolerance=1e-9, steps=5, tile=(8, 16)
    )
    want = definition(q, k, v, mask="causal", ridge=0.3, scale=0.2)
    torch.testing.assert_close(fixed(q, k, v, mask="causal"), want, rtol=1e-9, atol=1e-9)
    assert not list(fixed.parameters())
    learned = LocalLinearAttention(0.3, heads=4, solver="cholesky").double()
    torch.testing.assert_close(learned(q, k, v), definition(q, k, v, ridge=0.3), rtol=1e-6, atol=1e-6)
    target = definition(q, k, v, ridge=torch.tensor([[0.1], [0.2], [0.5], [1.0]], dtype=WIDE))
    optimizer, losses = torch.optim.Adam(learned.parameters(), lr=0.1), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append((learned(q, k, v) - target).square().mean((0, 2, 3)))
        losses[-1].sum().backward()
        optimizer.step()
    assert (losses[-1] < losses[0] / 20).all()


def test_compiles_whole():
    torch._dynamo.reset()
    q, k, v = (x.float().requires_grad_() for x in inputs(n_q=20, n_k=20))
    ridge = torch.tensor(0.5, requires_grad=True)

    def run(q, k, v, ridge):
        return local_linear_attention(q, k, v, mask="causal", ridge=ridge, return_bound=True)

    eager, compiled = (
        run(q, k, v, ridge),
        torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, ridge),
    )
    assert torch.equal(eager.out, compiled.out) and torch.equal(eager.bound, compiled.bound)
    grads = [torch.autograd.grad(x.out.square().sum(), (q, k, v, ridge)) for x in (eager, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_opcheck():
    q, k, v = (x.requires_grad_() for x in inputs(2, 1, 6, 7, b=1))
    ridge = torch.full((1, 2, 6, 1), 0.5, dtype=WIDE, requires_grad=True)
    view = as_mask("causal").bind(6, 7)
    args = (q, k, v, ridge, view.lo, view.hi, view.pos, view.q_pos, None, 0.4, 1e-12, 12, 4, 4)
    torch.library.opcheck(torch.ops.tilewise.local_linear_attention, args)


def test_bad_arguments():
    q, k, v = inputs(n_q=6, n_k=6)
    for change, error, message in (
        ({"ridge": 0.0}, ValueError, "ridge must be a finite number > 0"),
        ({"ridge": math.inf}, ValueError, "ridge must be a finite number > 0"),
        ({"ridge": "small"}, ValueError, "ridge must be a finite number > 0 or a tensor, got 'small'"),
        ({"ridge": torch.tensor([1, 2])}, TypeError, "a ridge tensor must be floating"),
        ({"ridge": torch.ones(3, 6)}, ValueError, r"broadcast to \[B, H, N_q\] = \[2, 2, 6\], got \[3, 6\]"),
        ({"ridge": torch.ones(1, 2, 2, 6)}, ValueError, "must broadcast"),
        ({"ridge": torch.tensor(-1.0)}, ValueError, "finite and > 0 everywhere"),
        ({"solver": "lu"}, ValueError, "solver must be one of"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be"),
        ({"steps": 0}, ValueError, "steps must be None or an integer >= 1"),
        ({"tile": (4, 0)}, ValueError, "tile must be two integers"),
        ({"mask": torch.zeros(6, 6)}, TypeError, "a mask tensor must be boolean"),
        ({"mask": "diagonal"}, ValueError, "mask must be"),
        ({"q": q[0]}, ValueError, "q must be a tensor"),
        ({"k": k.float()}, TypeError, "share one floating dtype"),
        ({"v": v[:, :, :3]}, ValueError, "k and v must be"),
    ):
        with pytest.raises(error, match=message):
            local_linear_attention(**{"q": q, "k": k, "v": v, **change})
    for change, message in (
        ({"ridge": -1.0}, "ridge must be"),
        ({"heads": 0}, "heads must be"),
        ({"solver": "qr"}, "solver must be"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalLinearAttention(**change)
    assert isinstance(local_linear_attention(q, k, v, return_bound=True), LocalLinear)
