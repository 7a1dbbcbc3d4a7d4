"""Long kernels learned tap by tap: what squashing and smoothing are worth, and the learned transform."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.clock import least_times
from tilewise.convolution import LearnedButterfly, LongConv, long_conv, smooth, squash
from tilewise.kernels.long_conv.monarch import Monarch, factor

CHANNELS, TAPS, N, EACH = 8, 256, 512, 6


def test_squash_and_smooth_by_their_definitions():
    kernel = torch.tensor([[0.5, -0.2, 0.05, -1.0, 0.1]])
    torch.testing.assert_close(squash(kernel, 0.1), torch.tensor([[0.4, -0.1, 0.0, -0.9, 0.0]]))
    assert squash(kernel, 0.0) is kernel and smooth(kernel, 1) is kernel
    torch.testing.assert_close(smooth(kernel, 3)[0, :2], torch.tensor([0.1, 0.35 / 3]))
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        squash(kernel, -1)
    with pytest.raises(ValueError, match="width must be odd and at least 1, got 2"):
        smooth(kernel, 2)
    with pytest.raises(ValueError, match="taps must be an integer >= 1, got 0"):
        LongConv(8, taps=0)


def kernels(kind: str) -> Tensor:
    """What is to be learned: a few echoes, slow waves that fade, or noise; each of length 1."""
    gen = torch.Generator().manual_seed(5)
    if kind == "echoes":
        made = torch.zeros(CHANNELS, TAPS)
        places = torch.rand(CHANNELS, TAPS, generator=gen).argsort(1)[:, :4]
        made = made.scatter(1, places, torch.randn(CHANNELS, 4, generator=gen).sign())
    elif kind == "waves":
        t = torch.arange(TAPS) / TAPS
        rates, turns = torch.rand(2, CHANNELS, 1, generator=gen)
        made = torch.exp(-(1 + 3 * rates) * t) * torch.cos(2 * torch.pi * (1 + 3 * turns) * t)
    else:
        made = torch.randn(CHANNELS, TAPS, generator=gen)
    return made / made.norm(dim=1, keepdim=True)


def signals(kind: str, count: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Noise that passed a kernel, and noise upon it."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, N, generator=gen)
    y = long_conv(x, kernels(kind))
    return x, y + noise * torch.randn(y.shape, generator=gen)


def fitted(kind: str, change: Callable[[Tensor], Tensor], start: float = 0.0) -> tuple[float, float]:
    """Kernels learned from three noisy signals: their error where they learned, in units of the noise, and on
    clean ones that they never saw, as a share of those.

    Every output is a weighted sum of a few kernels, as in a layer; weights decay alike, whatever `change`
    does.
    """
    x, y = signals(kind, 3, 1, 1.0)
    gen = torch.Generator().manual_seed(2)
    taps = 0.02 * torch.randn(CHANNELS * EACH, TAPS, generator=gen)
    taps = (taps + start * taps.sign()).requires_grad_()
    weights = (torch.randn(CHANNELS, EACH, 1, generator=gen) / EACH**0.5).requires_grad_()
    optimiser = torch.optim.Adam([taps, weights], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 200)

    def model(x: Tensor) -> Tensor:
        return long_conv(x, (change(taps).unflatten(0, (CHANNELS, EACH)) * weights).sum(1))

    for _ in range(200):
        loss = (model(x) - y).square().mean((0, 2)).sum() + 0.1 * (
            taps.square().sum() + weights.square().sum()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        fresh, clean = signals(kind, 8, 3, 0.0)
        unseen = (model(fresh) - clean).square().mean() / clean.square().mean()
        return float((model(x) - y).square().mean()), float(unseen)


SQUASHED = functools.partial(fitted, change=functools.partial(squash, threshold=0.1), start=0.1)
SMOOTHED = functools.partial(fitted, change=functools.partial(smooth, width=9))
PLAIN = functools.partial(fitted, change=lambda kernel: kernel)


@pytest.mark.evidence
def test_squashed_kernels_generalise_where_plain_ones_fit_noise():
    """Four echoes among 256 taps: the plain kernels fit their signals better than the truth does, and others
    worse."""
    plain_seen, plain = PLAIN("echoes")
    squashed_seen, squashed = SQUASHED("echoes")
    assert plain_seen < 0.9 and squashed_seen > 0.95, (
        plain_seen,
        squashed_seen,
    )  # below 1 is noise that was learned
    assert squashed < 0.6 * plain, (plain, squashed)
    # Where nothing is small enough to leave out, it is no help.
    assert SQUASHED("noise")[1] > PLAIN("noise")[1]


@pytest.mark.evidence
def test_smoothed_kernels_generalise_where_plain_ones_fit_noise():
    """Slow waves, from as few signals; of a kernel that is noise itself smoothing loses what there is."""
    plain_seen, plain = PLAIN("waves")
    _, smoothed = SMOOTHED("waves")
    assert plain_seen < 0.9 and smoothed < 0.6 * plain, (plain_seen, plain, smoothed)
    assert SMOOTHED("noise")[1] > 1.2 * PLAIN("noise")[1]


def roughness(kernel: Tensor) -> float:
    """How much neighbouring frequencies of a kernel differ, relative to their size."""
    spectrum = torch.fft.rfft(kernel, 2 * TAPS)
    return float(spectrum.diff(dim=1).abs().square().sum() / spectrum.abs().square().sum())


@pytest.mark.evidence
def test_squashing_smooths_the_spectrum():
    """A short echo under noise: the threshold takes the noise, and the spectrum is smooth again."""
    gen = torch.Generator().manual_seed(0)
    clean = F.pad(torch.randn(CHANNELS, 4, generator=gen), (0, TAPS - 4))
    noisy = clean + 0.1 * torch.randn(CHANNELS, TAPS, generator=gen)
    assert roughness(clean) < roughness(squash(noisy, 0.2)) < roughness(noisy) / 3


def butterflied(x: Tensor, layer: LearnedButterfly) -> Tensor:
    """What the layer starts as."""
    kernel = squash(layer.kernel, layer.squash_at)
    padded = F.pad(x, (0, layer.length - x.shape[2]))
    return long_conv(padded, kernel, causal=False, skip=layer.skip, engine="definition")[..., : x.shape[2]]


@pytest.mark.evidence
@pytest.mark.parametrize(("length", "block"), [(64, None), (96, 8), (512, 16)])
def test_a_learned_transform_starts_as_the_convolution(length, block):
    """To rounding, with the inputs' length or half of it (causal then), gradients too."""
    torch.manual_seed(0)
    layer = LearnedButterfly(3, length, block, squash_at=0.01)
    for n in (length, length // 2):
        x = torch.randn(2, 3, n)
        torch.testing.assert_close(layer(x), butterflied(x, layer), rtol=1e-4, atol=1e-5)
        mine, want = (
            torch.autograd.grad(out.square().sum(), layer.kernel)[0]
            for out in (layer(x), butterflied(x, layer))
        )
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-4)


def turned(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences, and the same from their other end: no convolution does that."""
    x = torch.randn(count, 2, length, generator=torch.Generator().manual_seed(seed))
    return x, x.flip(2)


@pytest.mark.evidence
def test_a_learned_transform_computes_more_than_convolutions():
    """In as many operations; with its coefficients held, the same layer cannot."""
    errors = {}
    for learn in (True, False):
        torch.manual_seed(0)
        layer = LearnedButterfly(2, 32, learn=learn)
        optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 1500)
        for step in range(1500):
            x, y = turned(64, 32, step)
            loss = (layer(x) - y).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        x, y = turned(256, 32, 10**6)
        with torch.no_grad():
            errors[learn] = float((layer(x) - y).square().mean())
        assert layer.transform.products == LearnedButterfly(2, 32, learn=False).transform.products
    assert errors[True] < errors[False] / 2, errors


@pytest.mark.evidence
@pytest.mark.timed
@pytest.mark.parametrize("n", [1024, 4096])
def test_evaluation_in_blocks_is_the_convolution_in_fewer_operations(n):
    """Both forms of the butterfly: products of matrices, and passes whose blocks are finished one by one in
    cache; the latter in less time than torch.fft takes."""
    gen = torch.Generator().manual_seed(0)
    x, kernel = torch.randn(4, 16, n, generator=gen), torch.randn(16, n, generator=gen) / n**0.5
    want = torch.fft.irfft(torch.fft.rfft(x.double(), 2 * n) * torch.fft.rfft(kernel.double(), 2 * n), 2 * n)[
        ..., :n
    ]
    plain = torch.fft.irfft(torch.fft.rfft(x, 2 * n) * torch.fft.rfft(kernel, 2 * n), 2 * n)[..., :n]
    for engine in ("native", "monarch"):
        got = long_conv(x, kernel, engine=engine)
        assert (got - want).norm() <= 2 * (plain - want).norm(), engine
    usual = functools.partial(
        lambda x, k: torch.fft.irfft(torch.fft.rfft(x, 2 * n) * torch.fft.rfft(k, 2 * n)), x, kernel
    )
    mine = functools.partial(long_conv, x, kernel, engine="native")
    spent = least_times({"native": mine, "usual": usual}, rounds=7)
    assert spent["native"] < spent["usual"], spent
    a = factor(2 * n)
    made = Monarch.of(2 * n, a, list(range(a)), list(range(2 * n // a)), torch.complex64, torch.device("cpu"))
    assert 3 * made.products < (2 * n) ** 2 / 4  # three transforms; one sum over all pairs is n * n / 2


def test_inputs_that_do_not_fit():
    layer = LearnedButterfly(3, 16)
    with pytest.raises(ValueError, match=r"x must be \[B, 3, N\] with N up to 16, got shape \(2, 3, 17\)"):
        layer(torch.zeros(2, 3, 17))
    with pytest.raises(ValueError, match="block must divide the length 16, got 3"):
        LearnedButterfly(3, 16, block=3)
