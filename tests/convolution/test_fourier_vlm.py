"""Fourier-VLM: what a low pass of vision tokens keeps, against other ways to have as few of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.convolution import FourierVLM

GRID, KEPT = (24, 24), (8, 8)


def features(roughness: float, count: int = 6, channels: int = 32) -> Tensor:
    """Vision-like tokens `[count, 576, channels]`: mixed channels of random fields whose power falls as
    wave^-roughness in amplitude (0: white), on pictures twice as large, so that nothing is periodic."""
    h, w = (2 * n for n in GRID)
    waves = torch.fft.fftfreq(h, 1 / h).unsqueeze(1).square() + torch.fft.rfftfreq(w, 1 / w).square()
    spectrum = torch.fft.rfft2(torch.randn(count, channels, h, w)) * (1 + waves) ** (-roughness / 2)
    field = torch.fft.irfft2(spectrum, s=(h, w))[:, :, : GRID[0], : GRID[1]]
    mixed = torch.einsum("bchw,cd->bhwd", field, torch.randn(channels, channels))
    return (mixed / mixed.std()).flatten(1, 2)


def lost(x: Tensor, again: Tensor) -> float:
    """Share of the tokens' variance that is not in what was made of the few."""
    return float((x - again).square().sum() / (x - x.mean(1, keepdim=True)).square().sum())


def pooled(x: Tensor) -> Tensor:
    """Means of 3 x 3 tokens, drawn as large again in whichever way loses least."""
    small = F.avg_pool2d(x.mT.unflatten(2, GRID), GRID[0] // KEPT[0])
    ways = [{"mode": "nearest"}] + [
        {"mode": mode, "align_corners": False} for mode in ("bilinear", "bicubic")
    ]
    drawn = [F.interpolate(small, size=GRID, **way).flatten(2).mT for way in ways]
    return min(drawn, key=lambda again: lost(x, again))


def chosen(x: Tensor) -> Tensor:
    """64 tokens at random, every place reads the nearest of them."""
    kept = torch.randperm(x.shape[1])[: math.prod(KEPT)]
    places = torch.cartesian_prod(*(torch.arange(n).float() for n in GRID))
    return x[:, kept[torch.cdist(places, places[kept]).argmin(1)]]


@pytest.mark.evidence
def test_it_loses_less_than_pooling_or_choosing_on_smooth_tokens():
    """A ninth of the tokens. On fields whose amplitude falls with the frequency the low pass loses less than
    means and half of what random tokens lose or less; of white noise it keeps a ninth, as its count says, and
    no more."""
    torch.manual_seed(0)
    layer = FourierVLM(GRID, KEPT)
    for roughness in (1.5, 2.0, 3.0):
        x = features(roughness)
        made = layer(x)
        assert made.tokens.shape == (6, 64, 32) and made.ratio == 9
        by_dct, by_mean, by_choice = (
            lost(x, again) for again in (layer.expand(made.tokens), pooled(x), chosen(x))
        )
        assert by_dct < 0.95 * by_mean and by_dct < 0.5 * by_choice, (roughness, by_dct, by_mean, by_choice)
        # what energy says is what was kept, means included
        error = (x - layer.expand(made.tokens)).square().sum((1, 2)) / x.square().sum((1, 2))
        torch.testing.assert_close(1 - made.energy, error, rtol=1e-3, atol=1e-5)
    white = torch.randn(6, 576, 32)
    assert (layer(white).energy - 1 / 9).abs().max() < 0.01
    assert lost(white, layer.expand(layer(white).tokens)) > 0.87


@pytest.mark.evidence
def test_low_frequencies_are_the_best_as_many_on_such_tokens():
    """Energy grows with the tokens kept up to 1. Control: the corner of highest frequencies holds next to
    nothing."""
    torch.manual_seed(0)
    x = features(2.0)
    energy = [FourierVLM(GRID, (n, n))(x).energy.mean() for n in (2, 4, 8, 16, 24)]
    assert all(b > a for a, b in zip(energy, energy[1:]))
    torch.testing.assert_close(energy[-1], torch.tensor(1.0))
    assert energy[2] > 0.8, energy
    rows, columns = (torch.arange(n) for n in GRID)
    flips = ((-1.0) ** (rows.unsqueeze(1) + columns)).flatten().unsqueeze(1)
    highest = FourierVLM(GRID, KEPT)(x * flips).energy.mean()  # every frequency u as 24 - u, nearly
    assert highest < 0.05, highest


def test_it_is_the_cosine_transform_and_exact_where_nothing_is_cut():
    """Against a written-out transform in float64; a constant picture stays itself; other sides than
    square."""
    x = torch.randn(2, 30, 3, dtype=torch.float64)
    layer = FourierVLM((5, 6), (3, 2))
    want = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    for u in range(3):
        for v in range(2):
            for i in range(5):
                for j in range(6):
                    wave = math.cos(math.pi * u * (i + 0.5) / 5) * math.cos(math.pi * v * (j + 0.5) / 6)
                    scale = (2 if u else 1) * (2 if v else 1)
                    want[:, u, v] += math.sqrt(scale / 30) * wave * x[:, 6 * i + j]
    made = layer(x)
    torch.testing.assert_close(made.energy, want.square().sum((1, 2, 3)) / x.square().sum((1, 2)))
    drawn = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    for u in range(3):
        for v in range(2):
            for i in range(3):
                for j in range(2):
                    wave = math.cos(math.pi * u * (i + 0.5) / 3) * math.cos(math.pi * v * (j + 0.5) / 2)
                    scale = (2 if u else 1) * (2 if v else 1)
                    drawn[:, i, j] += math.sqrt(scale / 30) * wave * want[:, u, v]
    torch.testing.assert_close(made.tokens, drawn.flatten(1, 2))
    whole = FourierVLM((5, 6), (5, 6))
    torch.testing.assert_close(whole(x).tokens, x)
    torch.testing.assert_close(layer(layer.expand(made.tokens)).tokens, made.tokens)
    flat = torch.full((1, 30, 1), 0.7)
    torch.testing.assert_close(layer(flat).tokens, torch.full((1, 6, 1), 0.7))
    assert layer(torch.zeros(1, 30, 2)).energy == 1 and layer(x[:0]).tokens.shape == (0, 6, 3)
    assert layer(flat.bfloat16()).tokens.dtype == torch.bfloat16
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: layer(t).tokens, (leaf,))


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"kept must not exceed grid, got \(3, 7\) and \(5, 6\)"):
        FourierVLM((5, 6), (3, 7))
    with pytest.raises(ValueError, match="grid must be two integers >= 1, got 24"):
        FourierVLM(24, (3, 3))
    with pytest.raises(ValueError, match="kept must be an integer >= 1, got 0"):
        FourierVLM((5, 6), (0, 3))
    with pytest.raises(ValueError, match=r"x must be \[B, 5 \* 6, C\], got \[2, 31, 3\]"):
        FourierVLM((5, 6), (3, 3))(torch.ones(2, 31, 3))
