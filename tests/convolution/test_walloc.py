"""WaLLoC: the wavelet packet transform is exact, and the codec keeps more of real photographs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.convolution import photographs as p
from tests.convolution.image_models import trained
from tilewise.convolution import CDF97, Filters, WaLLoC, entropy, inverse_wavelet_packet, wavelet_packet

EXTENSIONS = ("symmetric", "periodic")
# The steps of JPEG 2000's lifting scheme (ISO/IEC 15444-1, table F.4).
LIFT = (-1.586134342059924, -0.052980118572961, 0.882911075530934, 0.443506852043971)
SCALE = 1.230174104914001


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lifted(x: Tensor, extension: str) -> Tensor:
    """One level along the last axis by lifting, another algorithm: `[..., N]` to `[..., 2, N / 2]`."""
    n = x.shape[-1]
    at = torch.arange(-1, n + 1)
    at = at % n if extension == "periodic" else torch.minimum(at % (2 * n - 2), 2 * n - 2 - at % (2 * n - 2))
    for number, step in enumerate(LIFT):
        around = x[..., at]
        near = around[..., :-2] + around[..., 2:]
        moves = torch.arange(n) % 2 == (number + 1) % 2
        x = torch.where(moves, x + step * near, x)
    # JPEG 2000 has a gain of 1 at rest in the low band and of 2 in the high one at the fastest.
    low, high = x[..., ::2] / SCALE, x[..., 1::2] * SCALE / 2
    return torch.stack((low, high), -2) * 2**0.5


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("n", [2, 4, 6, 10, 16, 46])
def test_a_level_is_that_of_lifting(n: int, extension: str):
    x = draw(3, 2, n)
    made = wavelet_packet(x, 1, dims=1, extension=extension)
    torch.testing.assert_close(made, lifted(x, extension).flatten(1, 2))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_bands_stand_in_the_stated_order(extension: str):
    x = draw(2, 3, 8, 12)
    wide = lifted(x, extension)  # [b, c, h, 2, w / 2]
    both = lifted(wide.movedim(2, -1), extension)  # [b, c, 2, w / 2, 2, h / 2]
    made = wavelet_packet(x, 1, extension=extension).unflatten(1, (3, 2, 2))  # channel, height, width
    torch.testing.assert_close(made, both.permute(0, 1, 4, 2, 5, 3))


def test_a_second_level_splits_every_band():
    x = draw(2, 3, 16, 8)
    once = wavelet_packet(x, 1)
    torch.testing.assert_close(wavelet_packet(x, 2), wavelet_packet(once, 1))
    assert wavelet_packet(x, 0).equal(x)


def rebuilt(x: Tensor, levels: int, dims: int, extension: str, filters: Filters = CDF97) -> float:
    """Largest error of the way back, over the largest value."""
    made = wavelet_packet(x, levels, dims=dims, extension=extension, filters=filters)
    assert made.shape[1] == x.shape[1] * 2 ** (dims * levels) and made.numel() == x.numel()
    back = inverse_wavelet_packet(made, levels, dims=dims, extension=extension, filters=filters)
    return ((back - x).abs().amax() / x.abs().amax()).item()


@pytest.mark.evidence
@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("dims", [1, 2])
def test_the_transform_is_inverted_exactly(dims: int, extension: str):
    """Noise and photographs, one to four levels. Control: one wrong digit in any tap of either filter."""
    for levels in range(1, 5):
        sizes = (3, 2, *(2**levels * k for k in (3, 5)[:dims]))
        assert rebuilt(draw(*sizes), levels, dims, extension) < 1e-12
        assert rebuilt(draw(*sizes, dtype=torch.float32), levels, dims, extension) < 1e-5
    image = p.held_out(64).double()
    real = image if dims == 2 else image[:, :, 7]
    assert rebuilt(real, 3, dims, extension) < 1e-12
    for name, taps in (("analysis", CDF97.analysis), ("synthesis", CDF97.synthesis)):
        for k in range(len(taps) // 2 + 1):
            wrong = list(taps)
            wrong[k] = wrong[-1 - k] = taps[k] + 0.01
            broken = replace(CDF97, **{name: tuple(wrong)})
            assert rebuilt(real, 3, dims, extension, broken) > 1e-4, (name, k)


def test_it_is_differentiable():
    x = draw(1, 2, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: wavelet_packet(y, 2), x)
    assert torch.autograd.gradcheck(lambda y: inverse_wavelet_packet(y, 1), draw(1, 4, 4, 4).requires_grad_())


def test_empty_and_expanded_inputs():
    assert wavelet_packet(draw(0, 2, 8, 8), 2).shape == (0, 32, 2, 2)
    assert inverse_wavelet_packet(draw(0, 32, 2, 2), 2).shape == (0, 2, 8, 8)
    assert wavelet_packet(draw(2, 1, 0), 1, dims=1).shape == (2, 2, 0)
    x = draw(8, 8)
    wide = x.expand(2, 3, 8, 8)
    torch.testing.assert_close(wavelet_packet(wide, 2), wavelet_packet(wide.contiguous(), 2))
    torch.testing.assert_close(
        wavelet_packet(x[None, None].mT, 1), wavelet_packet(x.T.contiguous()[None, None], 1)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: wavelet_packet(draw(1, 1, 10, 8), 2),
            ValueError,
            r"multiples of 2 \*\* levels = 4, got \[10, 8\]; the nearest to 10 are 8 and 12",
        ),
        (
            lambda: wavelet_packet(draw(1, 1, 8), 1),
            ValueError,
            r"x must be \[B, C, H, W\], got shape \[1, 1, 8\]",
        ),
        (lambda: wavelet_packet(draw(1, 1, 8), 1, dims=3), ValueError, "dims must be 1 or 2, got 3"),
        (
            lambda: wavelet_packet(draw(1, 1, 8), -1, dims=1),
            ValueError,
            "levels must be an integer >= 0, got -1",
        ),
        (
            lambda: wavelet_packet(torch.ones(1, 1, 8, dtype=torch.int64), 1, dims=1),
            TypeError,
            "x must be float32 or float64, got torch.int64",
        ),
        (
            lambda: wavelet_packet(draw(1, 1, 8), 1, dims=1, extension="zero"),
            ValueError,
            "extension must be one of 'symmetric', 'periodic', got 'zero'",
        ),
        (
            lambda: inverse_wavelet_packet(draw(1, 6, 8, 8), 1),
            ValueError,
            r"bands must have a multiple of 2 \*\* \(dims \* levels\) = 4 channels, got 6",
        ),
        (lambda: Filters((1.0, 2.0), (1.0,)), ValueError, "analysis must be an odd number of taps"),
        (lambda: WaLLoC(latent=0), ValueError, "latent must be an integer >= 1, got 0"),
        (lambda: WaLLoC(bits=1), ValueError, "bits must be an integer from 2 to 16, got 1"),
        (
            lambda: WaLLoC(transform="dct"),
            ValueError,
            "transform must be one of 'wavelet', 'patches', got 'dct'",
        ),
        (
            lambda: WaLLoC()(torch.ones(1, 1, 8, 8)),
            ValueError,
            r"x must be \[B, 3, H, W\], got \[1, 1, 8, 8\]",
        ),
        (lambda: WaLLoC().decode(torch.ones(1, 3, 8, 8)), ValueError, r"latents must be \[B, 12, ...\]"),
        (
            lambda: WaLLoC(transform="patches")(torch.ones(1, 3, 9, 8)),
            ValueError,
            r"multiples of 2 \*\* levels = 8, got \[9, 8\]",
        ),
        (lambda: entropy(torch.ones(3)), ValueError, r"codes must be \[B, C, ...\]"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("transform", ["wavelet", "patches"])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_codec(dims: int, transform: str):
    torch.manual_seed(0)
    codec = WaLLoC(2, 3, 2, dims=dims, width=8, blocks=1, bits=4, transform=transform)
    x = draw(2, 2, *(16, 8)[:dims], dtype=torch.float32)
    noisy = codec.encode(x)
    assert noisy.shape == (2, 3, *(4, 2)[:dims])
    codec(x).square().sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in codec.parameters())
    codec.eval()
    codes = codec.encode(1000 * x)
    assert codes.equal(codes.round()) and codes.abs().max() == 7  # 2 ** bits - 1 values
    assert codec(x).shape == x.shape
    assert (noisy - codec.encode(x)).abs().max() <= 1.0  # rounding and noise are half a step each


def test_patches_are_samples_and_back():
    for dims in (1, 2):
        codec = WaLLoC(2, 3, 2, dims=dims, width=8, blocks=0, transform="patches")
        x = draw(2, 2, *(16, 8)[:dims], dtype=torch.float32)
        codec.decoder = torch.nn.Identity()
        bands = codec._analysed(x)
        codec.latent = bands.shape[1]
        torch.testing.assert_close(codec.decode(bands * codec.limit), x)


def test_entropy_is_its_formula():
    codes = torch.tensor([[[0, 0, 0, 1]], [[1, 1, 0, 1]]])
    assert entropy(codes).item() == pytest.approx(8)  # halves: a bit each
    two = torch.cat((codes, torch.full_like(codes, 5)), 1)
    assert entropy(two).item() == pytest.approx(8)  # what never changes costs nothing


@lru_cache
def measured(name: str) -> tuple[float, float, float]:
    """Of a trained codec on the held-out photographs: PSNR, bits per pixel, and PSNR without rounding."""
    codec = trained(name)
    images = p.whole_held_out(8)
    codes = [codec.encode(x) for x in images]
    pixels = sum(x.shape[2] * x.shape[3] for x in images)
    every = torch.cat([x.flatten(2) for x in codes], 2)
    found = [codec.decode(x) for x in codes]
    codec.train()
    noise, codec.noise = codec.noise, False
    smooth = [codec(x) for x in images]
    codec.noise = noise
    codec.eval()
    return mean_psnr(found, images), entropy(every).item() / pixels, mean_psnr(smooth, images)


def mean_psnr(found: list[Tensor], images: list[Tensor]) -> float:
    return sum(p.psnr(a.clamp(-0.5, 0.5), b) for a, b in zip(found, images)) / len(images)


def reduced(bits: float) -> tuple[float, float]:
    """Pictures of a quarter of the resolution instead, as many numbers as latents, with the coarsest steps
    whose entropy is still above `bits` per pixel: PSNR after bicubic enlarging, and bits per pixel."""
    images = p.whole_held_out(8)
    pixels = sum(x.shape[2] * x.shape[3] for x in images)
    small = [F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True) for x in images]
    for levels in range(8, 256):
        codes = [(x * levels).round() for x in small]
        cost = entropy(torch.cat([x.flatten(2) for x in codes], 2)).item() / pixels
        if cost > bits:
            break
    large = [F.interpolate(x / levels, size=y.shape[2:], mode="bicubic") for x, y in zip(codes, images)]
    return mean_psnr(large, images), cost


@pytest.mark.evidence
@torch.no_grad()
def test_it_keeps_more_of_photographs_than_fewer_pixels_do():
    """A sixteenth of the numbers either way, at least as many bits for the small pictures."""
    quality, bits, _ = measured("walloc")
    small, cost = reduced(bits)
    assert cost > bits
    assert quality > small + 1.0, (quality, small, bits, cost)


@pytest.mark.evidence
@torch.no_grad()
def test_it_keeps_more_than_without_wavelets():
    """The same linear encoder and decoder over patches, trained alike, at as many bits."""
    quality, bits, _ = measured("walloc")
    patches, cost, _ = measured("walloc-patches")
    assert bits < cost, (bits, cost)
    assert quality > patches + 0.1, (quality, patches)


@pytest.mark.evidence
@torch.no_grad()
def test_noise_in_training_makes_rounding_cheap():
    """What rounding costs in PSNR, after training with noise and without."""
    quality, bits, smooth = measured("walloc")
    naive, cost, naive_smooth = measured("walloc-no-noise")
    assert smooth - quality < 0.75 * (naive_smooth - naive), (smooth, quality, naive_smooth, naive)
    assert quality > naive + 0.3, (quality, naive, bits, cost)
