"""DeepRFTv2: blur kernels found in Fourier space by a reversible net that deblurs, and better for them."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from tests.convolution import blurs
from tests.convolution import photographs as p
from tests.convolution.image_models import SpatialHead, size, trained
from tilewise.convolution import (
    Coupling,
    Deblurred,
    DeepRFT,
    FourierKernelEstimator,
    ReversibleSequence,
    SubUNet,
    convolve,
    deblur_loss,
)
from tilewise.convolution.images.fourier_kernel import _even, _SpectralNet


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pyramid(seed: int, levels: int = 3, width: int = 4, side: int = 16) -> tuple[Tensor, ...]:
    return tuple(draw(2, width, side >> level, side >> level, seed=seed + level) for level in range(levels))


def sequence(units: int = 3, keeps: bool = False) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence((Coupling(SubUNet(4, 3), SubUNet(4, 3)) for _ in range(units)), keeps).double()


@pytest.mark.evidence
def test_reversible_nets_are_inverted_exactly():
    """Control: the way back through another block leads elsewhere."""
    net, a, b = sequence(), pyramid(0), pyramid(9)
    made = net(a, b)
    for back, was in zip(net.inverse(*made), (a, b)):
        for one, other in zip(back, was):
            torch.testing.assert_close(one, other)
    assert all((x - y).abs().max() > 0.1 for x, y in zip(made[0], a))
    wrong = Coupling.inverse(net.blocks[0], *(net.blocks[1](a, b)))
    assert (wrong[0][0] - a[0]).abs().max() > 1e-3


def kept_bytes(net: ReversibleSequence, a, b) -> int:
    """Of activations that autograd holds after a forward pass, each memory once; weights apart."""
    held: dict[int, int] = {}
    weights = {part.untyped_storage().data_ptr() for part in net.parameters()}

    def pack(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in weights:
            held[memory.data_ptr()] = memory.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        made = net(a, b)
        assert made[0][0].requires_grad
    return sum(held.values())


@pytest.mark.evidence
def test_reversible_nets_keep_no_more_activations_when_deeper():
    """The same gradients; activations held do not grow with depth. Control: a net that keeps them."""
    a, b = pyramid(0), pyramid(9)
    counts = {}
    for units in (2, 8):
        for keeps in (False, True):
            counts[units, keeps] = kept_bytes(sequence(units, keeps), a, b)
    assert counts[8, False] == counts[2, False]
    assert counts[8, True] > 3.5 * counts[2, True]
    assert counts[2, False] < 0.25 * counts[2, True], counts
    grads = []
    for keeps in (False, True):
        net = sequence(3, keeps)
        given = [x.clone().requires_grad_() for x in (*a, *b)]
        one, two = net(tuple(given[:3]), tuple(given[3:]))
        loss = sum((k + 1) * x.square().sum() for k, x in enumerate((*one, *two)))
        grads.append(torch.autograd.grad(loss, [*given, *net.parameters()]))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_single_tensors_shared_blocks_and_frozen_weights():
    torch.manual_seed(0)
    shared = Coupling(nn.Linear(3, 3), nn.Linear(3, 3))
    nets = [ReversibleSequence([shared, shared], keeps).double() for keeps in (False, True)]
    a, b = draw(2, 3).requires_grad_(), draw(2, 3, seed=1)
    shared.first.bias.requires_grad_(False)
    found = []
    for net in nets:
        (one,), (two,) = net(a, b)
        part = [a, *(weight for weight in net.parameters() if weight.requires_grad)]
        found.append(torch.autograd.grad(one.square().sum() + two.sum(), part))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert nets[0](a, b)[0][0].equal(nets[1](a, b)[0][0])


def test_convolution_is_the_sum():
    x, k = draw(1, 2, 5, 6), draw(1, 2, 5, 6, seed=1)
    want = torch.zeros_like(x)
    for i in range(5):
        for j in range(6):
            want += k[:, :, i : i + 1, j : j + 1] * x.roll((i, j), (2, 3))
    torch.testing.assert_close(convolve(x, k), want)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12), (2, 3)])
def test_the_estimator_starts_at_the_kernel_that_changes_nothing(height: int, width: int):
    torch.manual_seed(0)
    layer, x = FourierKernelEstimator(4, 3, 6, support=5, channels=2).double(), draw(2, 4, height, width)
    kernel = torch.zeros(height, width, dtype=torch.float64)
    kernel[0, 0] = 1
    torch.testing.assert_close(layer.kernels(x), kernel.expand(2, 2, height, width))
    torch.testing.assert_close(layer(x), layer.out(torch.cat((layer.narrow(x), x), 1)))


def test_kernels_have_a_support_and_are_convolved_with():
    torch.manual_seed(0)
    layer, x = FourierKernelEstimator(4, 3, 6, support=5, channels=2).double(), draw(2, 4, 12, 10)
    with torch.no_grad():
        layer.last.weight.normal_()
    found = layer.kernels(x)
    inner = found.roll((2, 2), (2, 3))[:, :, :5, :5]
    assert (inner.abs() > 0).all() and found.abs().sum().item() == pytest.approx(inner.abs().sum().item())
    torch.testing.assert_close(layer(x), layer.out(torch.cat((convolve(layer.narrow(x), found), x), 1)))
    layer(x).square().sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in layer.parameters())


@pytest.mark.parametrize(("height", "width"), [(8, 10), (7, 12), (1, 2)])
def test_lags_are_the_transform_of_even_planes(height: int, width: int):
    half, whole = draw(1, 1, height, width // 2 + 1), torch.empty(1, 1, height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            whole[..., i, j] = half[..., i, j] if j <= width // 2 else half[..., -i % height, width - j]
    whole = (
        whole + whole.flip(2, 3).roll((1, 1), (2, 3))
    ) / 2  # even also along the first and middle columns
    half = whole[..., : width // 2 + 1]
    want = torch.fft.fft2(whole, norm="ortho")
    assert want.imag.abs().max() < 1e-12
    torch.testing.assert_close(_even(half), want.real[..., : width // 2 + 1])
    torch.testing.assert_close(_even(_even(half)), half)


def test_every_frequency_sees_all_others():
    torch.manual_seed(0)
    layer, x = _SpectralNet(2).double(), draw(1, 2, 16, 9).requires_grad_()
    layer(x)[0, 0, 8, 4].backward()
    assert (x.grad != 0).all()


def test_blur_is_that_of_the_kernel():
    images, (used, angles) = blurs.crops(4, 40, 2, blurs.HELD_OUT), blurs.lines(4, 3)
    assert images.shape == (4, 1, 40, 40) and used.sum((1, 2)).sub(1).abs().max() < 1e-5
    seen = blurs.blurred(images, used, 3)
    valid = torch.cat([nn.functional.conv2d(x[None], k[None, None]) for x, k in zip(images, used)])
    assert (valid - seen[..., 7:-7, 7:-7]).abs().mean() < 1.2 * blurs.NOISE  # lines: convolved or correlated
    assert blurs.centred(blurs.at_corner(used, 40, 40)).equal(used)
    assert blurs.turned(blurs.direction(used), angles).max() < 1
    assert blurs.turned(torch.tensor([0.1, 0.0]), torch.tensor([3.1, 1.5])).round().tolist() == [8, 86]


def test_the_net_and_its_loss():
    torch.manual_seed(0)
    net, x = DeepRFT(4, 3, 2, hidden=6, support=5), 0.3 * draw(2, 3, 16, 24).float()
    out = net(x)
    assert out.image.shape == x.shape and out.kernel.shape == (2, 16, 24)
    sharp = 0.3 * draw(2, 3, 16, 24, seed=1).float()
    again = convolve(sharp, out.kernel.unsqueeze(1))[:, :, 2:-2, 2:-2]
    missed, there = (
        torch.fft.rfft2(z).abs() / (12 * 20) ** 0.5
        for z in (
            again - x[:, :, 2:-2, 2:-2],
            sharp[:, :, 2:-2, 2:-2],
        )
    )
    want = (out.image - sharp).abs().mean() + 0.5 * (missed / (there + 0.05)).mean()
    torch.testing.assert_close(deblur_loss(out, sharp, x, 0.5, 2), want)
    torch.testing.assert_close(deblur_loss(out, sharp, x, 0.0), (out.image - sharp).abs().mean())
    exact = Deblurred(sharp, blurs.at_corner(blurs.lines(2, 1)[0], 16, 24))
    assert deblur_loss(exact, sharp, convolve(sharp, exact.kernel.unsqueeze(1)), margin=0) < 1e-6
    plain = DeepRFT(4, head=lambda width, channels: SpatialHead(width, channels, 4))(x)
    assert plain.kernel is None
    torch.testing.assert_close(deblur_loss(plain, sharp, x), (plain.image - sharp).abs().mean())
    net, x, sharp = net.double(), x.double(), sharp.double()
    keeping = DeepRFT(4, 3, 2, hidden=6, support=5, keeps=True).double()
    keeping.load_state_dict(net.state_dict())
    grads = []
    for made in (net, keeping):
        with torch.no_grad():
            made.head.last.weight.fill_(0.01)
        loss = deblur_loss(made(x), sharp, x, margin=2)
        grads.append(torch.autograd.grad(loss, list(made.parameters()), allow_unused=True))
    for one, other in zip(*grads):
        assert one is not None and one.abs().sum() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FourierKernelEstimator(4, 3, 5), "hidden must be even, got 5"),
        (
            lambda: FourierKernelEstimator(4, 3, support=4),
            "support must be an odd integer >= 1 or None, got 4",
        ),
        (
            lambda: FourierKernelEstimator(4, 3)(torch.ones(1, 3, 4, 4)),
            r"features must be \[B, 4, H, W\], got",
        ),
        (
            lambda: FourierKernelEstimator(4, 3)(torch.ones(1, 4, 0, 4)),
            r"features must be \[B, 4, H, W\], got",
        ),
        (lambda: DeepRFT()(torch.ones(1, 3, 6, 8)), r"sides multiples of 4, got \[1, 3, 6, 8\]"),
        (lambda: DeepRFT(0), "width must be an integer >= 1, got 0"),
        (lambda: ReversibleSequence([]), "blocks must be one Coupling or more"),
        (lambda: ReversibleSequence([nn.Linear(1, 1)]), "blocks must be one Coupling or more"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


COUNT = 96  # held-out crops


@lru_cache
def scenes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Held-out crops, sharp and blurred, their kernels and the directions of these."""
    sharp = blurs.crops(COUNT, 64, 11, blurs.HELD_OUT)
    used, angles = blurs.lines(COUNT, 12)
    return sharp, blurs.blurred(sharp, used, 13), used, angles


@lru_cache
@torch.no_grad()
def answer(name: str) -> Deblurred:
    return trained(name)(scenes()[1])


def quality(images: Tensor) -> float:
    """Mean of PSNR over crops."""
    return sum(p.psnr(a, b) for a, b in zip(images, scenes()[0])) / COUNT


@pytest.mark.evidence
def test_the_kernel_it_sees_is_the_one_that_blurred():
    """Correlation with the true kernels, which nothing was shown, against the kernels seen in other pictures
    (shuffled), and against the mean of all kernels, the best answer that does not look. Directions of lines."""
    used, angles = scenes()[2:]
    found = blurs.centred(answer("deblur").kernel)
    mean = blurs.lines(512, 5)[0].mean(0).expand_as(used)
    own, other, blind = (blurs.correlation(x, used).mean() for x in (found, found.roll(1, 0), mean))
    assert own > 0.9, (own, other, blind)
    assert other < 0.5 and blind < 0.7, (own, other, blind)
    right, chance = (
        (blurs.turned(blurs.direction(x), angles) < 15).float().mean() for x in (found, found.roll(1, 0))
    )
    assert right > 0.95 and chance < 0.3, (right, chance)
    missed = [(x - used).abs().sum((1, 2)).mean() for x in (found, found.roll(1, 0), mean)]
    assert missed[0] < 0.5 * min(missed[1:]), missed  # size and place too, which correlation does not see


@pytest.mark.evidence
def test_the_kernel_it_sees_undoes_the_blur():
    """A filter of Wiener's with the kernel seen, against those with the mean kernel, with that seen in another
    picture, and with the true one."""
    seen, used = scenes()[1:3]
    found = blurs.centred(answer("deblur").kernel)
    mean = blurs.lines(512, 5)[0].mean(0).expand_as(used)
    own, other, blind, true = (
        max(quality(blurs.wiener(seen, x, noise)) for noise in (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3))
        for x in (found, found.roll(1, 0), mean, used)
    )
    assert true > quality(seen) + 4  # there is something to gain
    assert own > max(other, blind, quality(seen)) + 2.5, (own, other, blind, true)


@pytest.mark.evidence
@torch.no_grad()
def test_it_deblurs_better_for_its_kernels():
    """Against convolutions in the estimator's place with as many parameters, trained alike, and against itself with
    the kernels of other pictures."""
    assert size("deblur") <= size("deblur-spatial")
    whole, plain = (quality(answer(name).image) for name in ("deblur", "deblur-spatial"))
    assert plain > quality(scenes()[1]) + 0.2, plain
    assert whole > plain + 1.5, (whole, plain)
    seen, net = scenes()[1], trained("deblur")
    features = net.features(seen)
    kernels = net.head.kernels(features)
    torch.testing.assert_close(seen - net.head.finish(features, kernels), answer("deblur").image)
    shuffled = quality(seen - net.head.finish(features, kernels.roll(1, 0)))
    assert whole > shuffled + 3, (whole, shuffled)
