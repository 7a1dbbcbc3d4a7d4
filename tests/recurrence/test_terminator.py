"""Terminator: its operators are their formulas, see whole rows and columns, and are needed for what is
far."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.recurrence import mirrored
from tests.recurrence.dots import right, trained
from tilewise.recurrence import ContextKernel, HyperKernel, HyperZZW, LocalHyperZZW, SFNEBlock, Terminator


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.double()


@pytest.mark.evidence
def test_the_operator_is_a_hyper_kernel_times_activations_acting_on_activations():
    """Float64, place by place; the kernel is its network, evaluated at each place alone. Controls are other
    functions."""
    net = randomised(HyperZZW(3, 5, hidden=6))
    x, z = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    kernel = torch.zeros(3, 5, 5, dtype=torch.float64)
    slow = net.kernel
    for i in range(5):
        for j in range(5):
            place = torch.tensor([i / 2 - 1, j / 2 - 1], dtype=torch.float64)
            made = torch.sin(slow.filters[0].linear(place))
            for wave, linear in zip(slow.filters[1:], slow.linears):
                made = torch.sin(wave.linear(place)) * linear(made) + slow.places[5 * i + j]
            kernel[:, i, j] = slow.out(made)
    torch.testing.assert_close(slow(), kernel, rtol=1e-10, atol=1e-12)
    want = torch.zeros_like(x)
    for i in range(5):
        for j in range(5):
            for k in range(5):
                want[..., i, j] += x[..., i, k] * kernel[:, i, k] * z[..., k, j]
    torch.testing.assert_close(net(x, z), want, rtol=1e-10, atol=1e-12)
    for reach, other in (("own", x * kernel * z), ("fixed", kernel @ z)):
        net.reach = reach
        torch.testing.assert_close(net(x, z), other, rtol=1e-10, atol=1e-12)
        assert (other - want).norm() > 0.1 * want.norm()
    plain = randomised(HyperZZW(3, 5, reach="plain"))
    torch.testing.assert_close(plain(x, z), x @ z, rtol=1e-10, atol=1e-12)


def seen_from(run, size: int = 9) -> Tensor:
    """Which places of the input move the one in the middle of the output, `[size, size]`."""
    x = torch.randn(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    (moved,) = torch.autograd.grad(run(x)[0, :, size // 2, size // 2].sum(), x)
    return moved[0].abs().amax(0) > 0


@pytest.mark.evidence
def test_every_place_sees_its_row_and_column_and_after_two_all():
    """Without standardisation, which would mix all places by itself; by its own places alone it sees none."""
    net = randomised(HyperZZW(3, 9, hidden=6))
    cross = torch.zeros(9, 9, dtype=torch.bool)
    cross[4] = cross[:, 4] = True
    assert torch.equal(seen_from(lambda x: net(x, x)), cross)
    assert seen_from(lambda x: net(net(x, x), net(x, x))).all()
    net.reach = "own"
    assert int(seen_from(lambda x: net(net(x, x), net(x, x))).sum()) == 1


@pytest.mark.evidence
def test_local_kernels_are_of_what_each_image_shows():
    """Depthwise convolution by a kernel of the image itself; another image has another kernel."""
    slow = randomised(ContextKernel(3, 5, hidden=6))
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    kernels = slow(x)
    assert kernels.shape == (2, 3, 5, 5)
    torch.testing.assert_close(slow(x[1:])[0], kernels[1], rtol=1e-10, atol=1e-12)
    assert (kernels[0] - kernels[1]).abs().max() > 0.01
    local = randomised(LocalHyperZZW(3, 5, hidden=6)).eval()
    z = torch.randn_like(x)
    got = local(x, z)
    for i, kernel in enumerate(local.slow(x)):
        made = F.conv2d(z[i : i + 1], kernel.unsqueeze(1), padding=2, groups=3)
        want = F.gelu(local.standard(local.mix(made))) + local.bias
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-10, atol=1e-12)


@pytest.mark.evidence
def test_kernels_of_any_size_take_the_same_network():
    """But for one number a place: a kernel of 144 x 32 x 32 takes a fifteenth of its size, and less when
    larger."""
    small, large = (
        sum(p.numel() for p in HyperKernel(144, size, hidden=32).parameters()) for size in (32, 64)
    )
    assert small < 144 * 32 * 32 / 15 and large < 144 * 64 * 64 / 40
    assert large - small == 64 * 64 - 32 * 32


@pytest.mark.evidence
def test_slow_networks_get_an_error_of_their_own():
    """The deeper kernel against the shallower repeated; its gradient reaches slow networks only."""
    torch.manual_seed(0)
    net = Terminator(2, 8, 3, factors=(4, 2, 1), groups=2)
    a, b, c = (block.hyper.kernel() for block in net.blocks)
    pairs = ((a, b, 4), (a, c, 8), (b, c, 2))
    want = sum(((x.repeat(times, 1, 1) - y) ** 2).mean() for x, y, times in pairs)
    torch.testing.assert_close(net.slow_loss(), want)
    net.slow_loss().backward()
    got = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert got and all(".hyper.kernel." in name for name in got)


def test_images_do_not_see_each_other_and_everything_learns():
    torch.manual_seed(0)
    net = Terminator(2, 8, 3, factors=(4, 2), groups=2)
    images = torch.randn(5, 8, 8, 2)
    (net(images).square().sum() + net.slow_loss()).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    net = net.eval().double()
    torch.testing.assert_close(net(images.double())[2:3], net(images[2:3].double()), rtol=1e-9, atol=1e-10)


@pytest.mark.evidence
def test_the_product_is_needed_for_what_is_far_and_the_kernel_is_not():
    """Whether a red and a blue dot stand in one row, six columns apart or more; blocks have no residual
    connections.

    Trained alike, a network that multiplies place by place, so that only its 3 x 3 kernels see other places,
    does little better than guess. Not the paper's hope: with the hyper-kernel kept at 1 it is told just as
    well.
    """
    found = {reach: right(trained(reach)) for reach in ("all", "plain", "own")}
    assert found["all"] > 0.95 and found["own"] < 0.65, found
    assert found["plain"] >= found["all"] - 0.01, found


def test_the_opposite_pattern_is_the_pattern_in_another_order():
    """So a net that treats all places alike, as one without a kernel does, cannot but guess which it sees."""
    other = torch.tensor(mirrored.OTHER)
    assert torch.equal(mirrored.BLOCKS[other][:, other], -mirrored.BLOCKS)
    order = (4 * other.unsqueeze(1) + torch.arange(4)).flatten()
    images = mirrored.pictures(3, seed=0)[0]
    moved = images[..., order, :][..., order]
    net = mirrored.Net("plain").double().eval()
    torch.testing.assert_close(net(moved.double()), net(images.double()), rtol=1e-9, atol=1e-10)
    assert (mirrored.best(moved) == 1 - mirrored.best(images)).all()


@pytest.mark.evidence
def test_kernels_that_know_the_place_times_what_the_picture_shows_compare_what_is_far():
    """Noisy pictures: each cell says what its mirror cell says, or the opposite, by a pattern over places that
    is to be told from its negative. Two layers of the operator, nothing else that sees more than a place; three
    seeds.

    Controls with three times the channels and 1.7 times the parameters or more: W kept at 1 (`x @ z`), W alone
    (`W @ z`), and their product place by place (`x * W * z`). The operator errs at most one time in 100 more
    than the likelier label does, and controls guess.
    """
    nets = {reach: [mirrored.trained(f"{reach}-{seed}") for seed in range(3)] for reach in mirrored.CHANNELS}
    sizes = {reach: sum(p.numel() for p in found[0].parameters()) for reach, found in nets.items()}
    assert min(size for reach, size in sizes.items() if reach != "all") > 1.7 * sizes["all"], sizes
    found = {reach: [mirrored.right(net) for net in seeds] for reach, seeds in nets.items()}
    images, label = mirrored.pictures(2000, 10**6)
    known = (mirrored.best(images) == label).double().mean().item()
    assert min(found.pop("all")) > known - 0.01 and max(x for seeds in found.values() for x in seeds) < 0.6, (
        found
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="reach must be one of 'all', 'plain', 'fixed', 'own', got 'far'"):
        HyperZZW(3, 5, reach="far")
    with pytest.raises(ValueError, match="channels must be an integer >= 1, got 0"):
        HyperKernel(0, 5)
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        LocalHyperZZW(3, 4)
    with pytest.raises(ValueError, match="multiple of groups, got 6 and 4"):
        SFNEBlock(3, 8)
