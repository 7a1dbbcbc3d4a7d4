"""Kernelized attention with relative positions: against its quadratic form, softmax attention, and its claims."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.conformance.common import over_budget
from tests.conformance.test_memory import allocations
from tilewise.attention.kernelized import rpe as kernelized
from tilewise.attention.kernelized.rpe import (
    FEATURES,
    KernelizedRPE,
    definition,
    draw,
    features,
    kernelized_rpe,
)
from tilewise.attention.kernelized.toeplitz import NUMBERS, Mix, chunks, fast_length, rounding

LENGTHS = (0, 1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 1000)


def inputs(n: int, heads: int = 2, d: int = 8, d_v: int = 5, count: int = 16, b: int = 2, seed: int = 0):
    """float64 q, k, v, bias, draws; the bias leans to one side, so that its orientation shows."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, heads, n, x, generator=g, dtype=torch.float64) for x in (d, d, d_v))
    bias = torch.randn(heads, max(0, 2 * n - 1), generator=g, dtype=torch.float64)
    bias = bias + torch.linspace(-1, 1, bias.shape[1], dtype=torch.float64)
    return q, k, v, bias, draw(count, d, seed)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.evidence
@pytest.mark.parametrize("causal", [False, True])
def test_fft_equals_the_quadratic_form(causal):
    """Each output is the explicit double sum of the paper's equation. Controls: no bias, or i - j for j - i."""
    n, heads = 40, 2
    q, k, v, bias, draws = inputs(n, heads)
    got = kernelized_rpe(q, k, v, bias, draws, causal=causal, product="fft").out
    unit_q, unit_k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)

    def phi(x: Tensor) -> Tensor:
        return torch.stack([torch.exp(w @ x - x @ x / 2) for w in draws]) / math.sqrt(len(draws))

    for b, h, i in [(0, 0, 0), (0, 1, 1), (1, 0, 20), (1, 1, n - 1)]:
        over = range(i + 1 if causal else n)
        shares = [
            phi(unit_q[b, h, i]) @ phi(unit_k[b, h, j]) * math.exp(bias[h, n - 1 + j - i]) for j in over
        ]
        want = sum(share * v[b, h, j] for share, j in zip(shares, over)) / sum(shares)
        close(got[b, h, i], want)
    close(got, definition(q, k, v, bias, draws, causal=causal))
    for wrong in (torch.zeros_like(bias), bias.flip(1)):
        off = (definition(q, k, v, wrong, draws, causal=causal) - got).abs().max()
        assert off > 1e-2, "the control must differ"


def transform_work(monkeypatch, run) -> float:
    """Numbers in all transforms done by `run`, each times the bits of its length."""
    work = 0.0
    real, inverse = torch.fft.rfft, torch.fft.irfft

    def count(x: Tensor, n: int) -> Tensor:
        nonlocal work
        work += x[..., 0].numel() * n * math.log2(n)
        return x

    with monkeypatch.context() as patch:
        patch.setattr(torch.fft, "rfft", lambda x, n: real(count(x, n), n=n))
        patch.setattr(torch.fft, "irfft", lambda x, n: inverse(count(x, n), n=n))
        run()
    return work


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def exponent(sizes: list[int], work: list[float]) -> float:
    """Least-squares slope of log work over log size."""
    x, y = (torch.tensor(z, dtype=torch.float64).log() for z in (sizes, work))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.evidence
def test_work_grows_as_n_log_n(monkeypatch):
    """Transforms times their length grow as N log N, products of matrices as N. Control: the quadratic form, N^2.

    The number of transforms does not depend on N: (R (D_v + 1)) forward and inverse for each batch entry and head.
    """
    sizes = [256, 512, 1024, 2048, 4096]
    work, products, quadratic, direct = [], [], [], []
    for n in sizes:
        given = inputs(n, d=4, d_v=3, count=4, b=1)
        run = partial(kernelized_rpe, *given)
        work.append(transform_work(monkeypatch, partial(run, product="fft")))
        products.append(flops(partial(run, product="fft")))
        if n <= 2048:
            quadratic.append(flops(partial(definition, *given)))
            direct.append(flops(partial(run, product="direct")))
    sequences = 2 * 2 * 4 * (3 + 1) + 2  # rfft and irfft of each channel and head; the weights of two heads
    for n, w in zip(sizes, work):
        assert w == sequences * 2 * n * math.log2(2 * n)
    assert products == [products[0] * n // sizes[0] for n in sizes]
    assert 1 < exponent(sizes, work) < 1.2
    assert exponent(sizes[:4], quadratic) > 1.9 and exponent(sizes[:4], direct) > 1.9
    with_grad = [x.requires_grad_() for x in inputs(64, d=4, d_v=3, count=4, b=1)]
    both = transform_work(monkeypatch, lambda: kernelized_rpe(*with_grad, product="fft").out.sum().backward())
    assert both == (6 * 2 * 4 * (3 + 1) + 3 * 2) * 128 * 7


@pytest.mark.evidence
def test_unit_vectors_bound_the_variance_of_features():
    """Relative variance of an estimate of exp(x . y) is (exp(|x + y|^2) - 1) / R, so e^4 - 1 for unit vectors.

    Then attention: multiplying q and k by 8 leaves the normalised weights as near to their target as they were.
    Control: without normalisation the same vectors lose theirs.
    """
    count, d = 200_000, 8
    for size in (0.2, 0.5, 1.0):
        x, y = (nn.functional.normalize(torch.randn(d, dtype=torch.float64), dim=0) * size / 2 for _ in "xy")
        draws = draw(count, d, seed=3, orthogonal=False)
        (phi_x, log_x), (phi_y, log_y) = features(x, draws), features(y, draws)
        estimates = phi_x * phi_y * count * (log_x + log_y - x @ y).exp()  # each has mean 1
        s = float((x + y).square().sum())
        fourth = math.exp(6 * s) - 4 * math.exp(3 * s) + 6 * math.exp(s) - 3
        error = math.sqrt((fourth - math.expm1(s) ** 2) / count)
        assert abs(float((estimates - 1).square().mean()) - math.expm1(s)) < 5 * error

    def off(scale: float, normalize: bool) -> float:
        """Mean absolute row sum of the difference of attention weights to their target, over eight draws."""
        g = torch.Generator().manual_seed(5)
        q, k = (scale * torch.randn(1, 1, 48, 16, generator=g, dtype=torch.float64) for _ in "qk")
        bias = torch.randn(1, 95, generator=g, dtype=torch.float64)
        eye = torch.eye(48, dtype=torch.float64).expand(1, 1, -1, -1)
        target = weights(q, k, bias, normalize)
        got = [
            kernelized_rpe(q, k, eye, bias, draw(64, 16, seed), normalize=normalize).out for seed in range(8)
        ]
        return float(torch.stack([(x - target).abs().sum(-1).mean() for x in got]).mean())

    unit, plain = [[off(scale, normalize) for scale in (1, 2, 8)] for normalize in (True, False)]
    assert max(unit) - min(unit) < 1e-9, unit
    assert unit[0] < plain[0] < plain[1] < plain[2] and plain[2] > 10 * unit[2], (unit, plain)


def weights(q: Tensor, k: Tensor, bias: Tensor, normalize: bool = True, causal: bool = False) -> Tensor:
    """Softmax attention's weights with relative positions: what the features estimate."""
    n, d = q.shape[2:]
    if normalize:
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    place = torch.arange(n) - torch.arange(n).unsqueeze(1)
    scores = q @ k.mT / (1 if normalize else math.sqrt(d)) + bias[:, place + n - 1]
    return scores.masked_fill(place > 0, -torch.inf).softmax(-1) if causal else scores.softmax(-1)


@pytest.mark.evidence
@pytest.mark.parametrize("causal", [False, True])
def test_approaches_softmax_attention_as_features_grow(causal):
    """The error against softmax(q.k/|q||k| + b) falls as 1/sqrt(R). Control: a target without b, where it stays."""
    q, k, v, bias, _ = inputs(48, d=16)
    target = weights(q, k, bias, causal=causal) @ v
    other = weights(q, k, 0 * bias, causal=causal) @ v
    counts, errors, control = [16, 64, 256, 1024, 4096], [], []
    for count in counts:
        got = [kernelized_rpe(q, k, v, bias, draw(count, 16, seed), causal=causal).out for seed in range(8)]
        errors.append(float(torch.stack([(x - target).square().mean() for x in got]).mean().sqrt()))
        control.append(float(torch.stack([(x - other).square().mean() for x in got]).mean().sqrt()))
    assert -0.6 < exponent(counts, errors) < -0.4, errors
    assert exponent(counts, control) > -0.1 and control[-1] > 10 * errors[-1]


class Copier(nn.Module):
    """One block of attention and feed-forward, that is to say which token stood some places before."""

    def __init__(self, normalize: bool, relative: bool, gain: float, seed: int) -> None:
        super().__init__()
        n, vocab, dim, self.heads = 32, 8, 16, 2
        self.tokens, self.out = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.places = nn.Parameter(torch.zeros(n, dim) if relative else torch.randn(n, dim))
        self.qkv, self.mixed = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.feed = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )
        self.first, self.last = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = KernelizedRPE(
            self.heads, dim // 2, n - 1, 16, causal=True, normalize=normalize, seed=seed
        )
        self.places.requires_grad_(not relative)
        self.attention.bias.requires_grad_(relative)
        with torch.no_grad():
            self.qkv.weight[: 2 * dim] *= gain

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places
        q, k, v = self.qkv(self.first(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.mixed(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return self.out(self.last(h + self.feed(h)))


def trained(normalize: bool, relative: bool, gain: float, seed: int, lag: int = 3) -> float:
    """Mean loss (nats) of the last 20 of 150 steps; directions drawn anew every 10, as the Performer does."""
    torch.manual_seed(seed)
    model = Copier(normalize, relative, gain, seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(150):
        if step % 10 == 0:
            model.attention.redraw(1000 * seed + step)
        x = torch.randint(8, (8, 32))
        loss = nn.functional.cross_entropy(model(x)[:, lag:].flatten(0, 1), x[:, :-lag].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@pytest.mark.evidence
def test_normalised_with_positions_trains_from_scratch():
    """With queries and keys large at the start, only unit vectors with relative positions learn to copy.

    Controls: either left out, or both (the plain kernelized attention, with learned absolute places): they stay at
    1.5 to 2.0, where guessing costs log 8 = 2.08. None of them diverges at this size. At an ordinary start (gain 1)
    positions alone suffice and normalisation gains nothing, which the last lines say too.
    """
    for seed in (0, 1):
        ours = trained(True, True, 8.0, seed)
        assert ours < 0.1
        for normalize, relative in ((True, False), (False, True), (False, False)):
            assert trained(normalize, relative, 8.0, seed) > max(1.0, 10 * ours), (normalize, relative, seed)
        assert trained(True, True, 1.0, seed) < 0.1 and trained(False, True, 1.0, seed) < 0.1
        assert trained(False, False, 1.0, seed) > 1.0


# Correctness


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length(n, causal):
    q, k, v, bias, draws = inputs(n, b=1, count=8)
    for product in ("auto", "direct"):
        close(
            kernelized_rpe(q, k, v, bias, draws, causal=causal, product=product).out,
            definition(q, k, v, bias, draws, causal=causal),
        )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("product", ["auto", "direct"])
def test_every_feature_map(kind, normalize, product):
    q, k, v, bias, draws = inputs(30, count=64)
    for causal in (False, True):
        want = definition(q, k, v, bias, draws, causal=causal, kind=kind, normalize=normalize)
        got = kernelized_rpe(
            q, k, v, bias, draws, causal=causal, kind=kind, normalize=normalize, product=product
        )
        torch.testing.assert_close(got.out, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", FEATURES)
def test_features_estimate_the_exponential(kind):
    """Unbiased: over many draws the product of features is exp(x . y), within five standard errors."""
    x, y = torch.randn(2, 4, dtype=torch.float64) / 2
    draws = draw(100_000, 4, seed=1, orthogonal=False)
    (phi_x, log_x), (phi_y, log_y) = features(x, draws, kind), features(y, draws, kind)
    terms = (phi_x * phi_y).view(-1, len(draws)).sum(0) * len(draws) * (log_x + log_y - x @ y).exp()
    assert abs(float(terms.mean()) - 1) < 5 * float(terms.std()) / math.sqrt(len(draws))


def test_draws_are_normal_orthogonal_and_seeded():
    draws = draw(count=40, dim=16, seed=7)
    assert torch.equal(draws, draw(40, 16, 7)) and not torch.equal(draws, draw(40, 16, 8))
    lengths = draws.norm(dim=1)
    for block in (draws / lengths.unsqueeze(1)).split(16):
        close(block @ block.mT, torch.eye(len(block), dtype=torch.float64))
    free = draw(40, 16, 7, orthogonal=False)
    close(lengths, free.norm(dim=1))
    many = torch.cat([draw(16, 16, seed) for seed in range(500)])
    assert abs(float(many.mean())) < 0.02 and abs(float(many.square().mean()) - 1) < 0.02


def test_orthogonal_draws_vary_less():
    def spread(orthogonal: bool) -> float:
        x = y = torch.full((16,), 0.15, dtype=torch.float64)
        total = []
        for seed in range(400):
            (a, log_a), (b, log_b) = (features(z, draw(16, 16, seed, orthogonal)) for z in (x, y))
            total.append((a @ b) * (log_a + log_b).exp())
        return float(torch.stack(total).var())

    assert spread(True) < 0.7 * spread(False)


@pytest.mark.parametrize("product", ["fft", "direct"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal, product):
    given = [x.requires_grad_() for x in inputs(7, d=3, d_v=2, count=4, b=1)]
    keep = torch.tensor([[False, True, True, True, False, True, True]])

    def run(*arguments):
        return kernelized_rpe(*arguments, causal=causal, keep=keep, product=product).out

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("product", ["auto", "direct"])
def test_gradients_of_the_other_settings(product):
    given = [x.requires_grad_() for x in inputs(5, d=3, d_v=2, count=4, b=1)]
    for kind, normalize in (("trigonometric", True), ("positive", False)):

        def run(*arguments, kind=kind, normalize=normalize):
            return kernelized_rpe(*arguments, kind=kind, normalize=normalize, product=product).out

        assert torch.autograd.gradcheck(run, given)


def test_gradients_of_long_sequences_equal_the_definition():
    """More than one cut of the channels, and a bias gradient that is summed over them."""
    given = inputs(300, d=8, d_v=16, count=64, b=2, heads=2)
    assert len(list(chunks(4, 64, 17, fast_length(300)))) > 1
    d_out = torch.randn_like(given[2])
    grads = []
    for run in (
        lambda *x: kernelized_rpe(*x, causal=True, product="fft").out,
        lambda *x: definition(*x, causal=True),
    ):
        leaves = [x.detach().clone().requires_grad_() for x in given]
        grads.append(torch.autograd.grad(run(*leaves), leaves, d_out))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# Rounding


def test_the_bound_holds_and_rows_beyond_it_are_computed_directly(monkeypatch):
    """A weight of exp(h) that early rows cannot see. FFT alone loses them as h grows; 'auto' does not.

    The bound is never exceeded, and it is what makes the difference: without it the answers are wrong.
    """
    n = 128
    q, k, v, _, draws = inputs(n, heads=1, b=1)
    found = {}
    for height in (0, 10, 20, 30, 40, 700):
        bias = torch.zeros(1, 2 * n - 1, dtype=torch.float64)
        bias[0, n - 1 - 50] = height
        want = definition(q, k, v, bias, draws, causal=True)
        if height == 700:  # exp(700) is a float64, exp(700) times 50 keys' features too; 800 would not be
            assert want.isfinite().all()
        result = kernelized_rpe(q, k, v, bias, draws, causal=True)
        close(result.out, want)
        with monkeypatch.context() as patch:
            patch.setattr(kernelized, "LOST", math.inf)
            alone = kernelized_rpe(q, k, v, bias, draws, causal=True, product="fft").out
        found[height] = float((alone - want).abs().max()), len(result.direct)
        if 20 <= height:
            assert torch.equal(result.direct, torch.arange(50))
            with pytest.raises(ValueError, match="would lose more than"):
                kernelized_rpe(q, k, v, bias, draws, causal=True, product="fft")
    assert found[0][0] < 1e-12 and found[0][1] == 0, found
    assert found[20][0] > 1e-9 and found[40][0] > 0.1 and found[700][0] > 0.1, found


def test_rounding_is_a_bound():
    """Over biases and keys of all spans, no element of a product errs by more; typical ones by far less."""
    g = torch.Generator().manual_seed(0)
    for n in (3, 64, 1000):
        for span in (0, 5, 40):
            queries, keys = (
                (span * torch.randn(1, 2, 3, n, generator=g, dtype=torch.float64)).exp() for _ in range(2)
            )
            bias = (span * torch.randn(2, 2 * n - 1, generator=g, dtype=torch.float64)).exp()
            values = torch.rand(1, 2, 4, n, generator=g, dtype=torch.float64) * 2 - 1
            got = Mix.apply(queries, keys, values, bias)
            place = torch.arange(n) - torch.arange(n).unsqueeze(1) + n - 1
            pairs = (queries.mT @ keys) * bias[:, place]
            want = (pairs @ values.mT).mT
            allowed = rounding(queries, keys, bias) + 2 * n * 2.0**-53 * pairs.sum(-1)
            assert ((got - want).abs() <= allowed.unsqueeze(2)).all()


def test_large_biases_and_norms_do_not_overflow():
    q, k, v, bias, draws = inputs(20)
    want = kernelized_rpe(q, k, v, bias, draws).out
    close(kernelized_rpe(q, k, v, bias + 5000, draws).out, want)  # a constant per head cancels
    steep = kernelized_rpe(q, k, v, 2000 * bias, draws, causal=True).out
    assert steep.isfinite().all()
    best = torch.stack([bias[:, 19 - i : 20].argmax(1) - i for i in range(20)], 1) + torch.arange(20)
    for h in range(2):
        close(steep[:, h], v[:, h, best[h]])
    assert kernelized_rpe(100 * q, 100 * k, v, bias, draws, normalize=False, causal=True).out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_the_plain_formula(dtype):
    """Against float64 at the same inputs; the plain formula runs in the given precision."""
    for causal in (False, True):
        low = [x.to(dtype) for x in inputs(300, count=32)]
        exact = definition(*(x.double() for x in low), causal=causal)
        naive = definition(*(x.float() if dtype == torch.float16 else x for x in low), causal=causal)
        got = kernelized_rpe(*low, causal=causal)
        assert got.out.dtype == dtype and not len(got.direct)
        assert over_budget(got.out, naive.to(dtype), exact) is None


def test_the_future_is_seen_by_rounding_only():
    """Later tokens change earlier outputs by less than the promised share, however large they are."""
    q, k, v, bias, draws = inputs(64)
    for size, normalize in ((1.0, True), (1e3, True), (30.0, False)):
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[:, :, 40:] = size * torch.randn_like(x[:, :, 40:])
        before, after = (
            kernelized_rpe(*x, bias, draws, causal=True, normalize=normalize).out[:, :, :40]
            for x in ((q, k, v), other)
        )
        largest = float(other[2].abs().max())
        assert (before - after).abs().max() <= 2 * kernelized.LOST * largest


# Calls


def test_padding_equals_leaving_tokens_out():
    q, k, v, bias, draws = inputs(24, b=2)
    for side in ("left", "right"):
        keep = torch.ones(2, 24, dtype=torch.bool)
        shown = slice(5, 24) if side == "left" else slice(0, 19)
        keep[1] = False
        keep[1, shown] = True
        for causal in (False, True):
            for product in ("auto", "direct"):
                got = kernelized_rpe(q, k, v, bias, draws, causal=causal, keep=keep, product=product).out
                alone = [x[1:, :, shown] for x in (q, k, v)]
                close(got[1:, :, shown], definition(*alone, bias[:, 5:-5], draws, causal=causal))
                close(got[:1], definition(q[:1], k[:1], v[:1], bias, draws, causal=causal))
                if side == "left" and causal:
                    assert (got[1, :, :5] == 0).all()


def test_a_sequence_of_padding_gives_zeros_and_no_gradients():
    given = [x.requires_grad_() for x in inputs(9, b=1)]
    for product in ("auto", "direct"):
        keep = torch.zeros(1, 9, dtype=torch.bool)
        out = kernelized_rpe(*given, keep=keep, product=product).out
        assert (out == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), given))


def test_zero_vectors_have_finite_gradients():
    q, k, v, bias, draws = inputs(6)
    q[:, :, 2] = k[:, :, 3] = 0
    given = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(kernelized_rpe(*given, bias, draws).out.sum(), given)
    assert all(g.isfinite().all() and g.abs().max() < 100 for g in grads)


def test_groups_strides_and_one_bias_for_all_heads():
    q, k, v, bias, draws = inputs(20, heads=6)
    k, v = k[:, :2], v[:, :2]
    spread = [x.repeat_interleave(3, 1) for x in (k, v)]
    want = definition(q, *spread, bias, draws)
    close(kernelized_rpe(q=q, k=k, v=v, bias=bias, draws=draws).out, want)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    close(kernelized_rpe(q, k, v, bias, draws).out, want)
    shared = kernelized_rpe(q, k, v, bias[:1], draws).out
    close(shared, definition(q, *spread, bias[:1].expand(6, -1), draws))


def test_module_clips_distances_redraws_and_counts_rows():
    module = KernelizedRPE(
        heads=2, head_dim=8, max_distance=3, count=16, kind="positive", causal=True, normalize=True,
        orthogonal=True, seed=5, product="auto",
    ).double()  # fmt: skip
    with torch.no_grad():
        module.bias.normal_()
    q, k, v, *_ = inputs(12)
    full = torch.cat([module.bias[:, :1].expand(-1, 8), module.bias, module.bias[:, -1:].expand(-1, 8)], 1)
    assert torch.equal(module.distances(12), full)
    out = module(q, k, v)
    close(out, definition(q, k, v, full, module.draws, causal=True))
    assert module.direct_rows == 0 and module(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (2, 2, 0, 5)
    before = module.draws.clone()
    module.redraw(6)
    assert not torch.equal(before, module.draws) and module.draws.dtype == torch.float64
    module.redraw(5)
    torch.testing.assert_close(before, module.draws, rtol=1e-6, atol=1e-6)  # it was made in float32
    waves = KernelizedRPE(2, 8, 3, 16, kind="trigonometric", product="direct").double()
    waves(q, k, v)
    assert waves.draws.shape == (8, 8) and waves.direct_rows == 12
    restored = KernelizedRPE(2, 8, 3, 16).double()
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored.draws, module.draws)


def test_memory_is_bounded():
    """Forward and backward hold less than half of R D_v N numbers, and twice the features add what they are."""

    def peak(count: int, n: int = 4096) -> int:
        given = [x.requires_grad_() for x in inputs(n, heads=1, d=16, d_v=64, count=count, b=1)]
        return allocations(lambda: kernelized_rpe(*given, product="fft").out.sum().backward())[1]

    small, large = peak(32), peak(64)
    assert large < 8 * 64 * 64 * 4096 / 2
    held = 8 * 32 * 4096  # one more copy of features
    assert large - small < 16 * held, (small, large)
    assert NUMBERS * 8 < small


def test_bad_arguments():
    q, k, v, bias, draws = inputs(6)
    for change, message in (
        ({"bias": bias[:, :-1]}, r"bias must be \[H or 1, 2N - 1\] = \[2, 11\], got \[2, 10\]"),
        ({"bias": bias[0]}, "bias must be"),
        ({"draws": draws[:, :-1]}, r"draws must be \[R, 8\]"),
        ({"draws": draws[:0]}, "R >= 1"),
        ({"k": k[:, :, :-1], "v": v[:, :, :-1]}, "as many queries as keys"),
        ({"v": v[:, :1]}, "k and v alike"),
        ({"q": q[0]}, r"\[B, H, N, D\]"),
        ({"keep": torch.ones(2, 6)}, r"keep must be bool \[2, 6\]"),
        ({"kind": "relu"}, "kind must be one of"),
        ({"product": "fast"}, "product must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            kernelized_rpe(**{"q": q, "k": k, "v": v, "bias": bias, "draws": draws, **change})
    with pytest.raises(TypeError, match="one floating dtype"):
        kernelized_rpe(q.float(), k, v, bias, draws)
    with pytest.raises(ValueError, match="count and dim"):
        draw(0, 4)
    with pytest.raises(ValueError, match="even"):
        KernelizedRPE(2, 8, 4, 15, kind="trigonometric")
    with pytest.raises(ValueError, match="max_distance"):
        KernelizedRPE(2, 8, -1)
    with pytest.raises(ValueError, match="product"):
        KernelizedRPE(2, 8, 1, product="slow")


def test_lengths_of_transforms():
    for n in (*range(0, 70), 1000, 4097):
        length = fast_length(n)
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert length >= 2 * n and length % 2 == 0 and rest == 1
