"""RoutedFFN: its formula, gradients to router and blocks, balance, work, and what routing is worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tilewise.linear import RoutedFFN


def _by_hand(layer: RoutedFFN, x: Tensor) -> Tensor:
    """Token by token, block by block; the router's probabilities divide themselves out."""
    p, out = layer.router(x).softmax(-1), []
    ups, downs = layer.up.weight.chunk(layer.blocks), layer.down.weight.chunk(layer.blocks, 1)
    biases = layer.up.bias.chunk(layer.blocks)
    for token, share in zip(x, p):
        total = layer.down.bias
        for block in share.topk(layer.active).indices.tolist():
            hidden = layer.activation(ups[block] @ token + biases[block])
            total = total + downs[block] @ hidden * share[block] / share[block].detach()
        out.append(total)
    return torch.stack(out)


def test_is_its_formula_with_gradients():
    layer = RoutedFFN(6, 24, blocks=4, active=2).double()
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    want, d_out, leaves = _by_hand(layer, x), torch.randn(9, 6, dtype=torch.float64), (x, *layer.parameters())
    gradients = torch.autograd.grad(want, leaves, d_out)
    got = layer(x)
    torch.testing.assert_close(got, want)
    for one, two in zip(torch.autograd.grad(got, leaves, d_out), gradients, strict=True):
        torch.testing.assert_close(one, two)
    assert (gradients[-2] != 0).any()  # the router's weight
    torch.testing.assert_close(layer(x.view(3, 3, 6)), want.view(3, 3, 6))


@pytest.mark.evidence
def test_with_all_blocks_it_is_the_dense_layer():
    """Output and gradients. Control: with one block fewer it is not."""
    up, down = nn.Linear(6, 24).double(), nn.Linear(24, 6).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    want = down(F.relu(up(x)))
    whole = RoutedFFN.from_dense(up=up, down=down, blocks=4, active=4, activation=F.relu)
    torch.testing.assert_close(whole(x), want)
    d_out = torch.randn_like(want)
    gradients = torch.autograd.grad(want, (up.weight, down.weight, down.bias), d_out)
    mine = (whole.up.weight, whole.down.weight, whole.down.bias)
    for one, two in zip(torch.autograd.grad(whole(x), mine, d_out), gradients):
        torch.testing.assert_close(one, two)
    less = RoutedFFN.from_dense(up, down, 4, 3, activation=F.relu)
    assert float((less(x) - want).detach().abs().max()) > 0.01
    assert less.work == pytest.approx(3 / 4 + 4 / 48) and whole.up.weight is not up.weight


@pytest.mark.evidence
def test_work_is_what_is_multiplied():
    """Counted by PyTorch as it runs: the share of active blocks of the plain layer's products, and the router's."""
    x = torch.randn(200, 32)
    for active in (1, 2, 8):
        layer = RoutedFFN(32, 128, 8, active, bias=False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        assert counter.get_total_flops() == 2 * 200 * (2 * 32 * 128 * active / 8 + 32 * 8)
        assert layer.work == pytest.approx(counter.get_total_flops() / (2 * 200 * 2 * 32 * 128))


def _clustered(seed: int = 0) -> tuple[RoutedFFN, Tensor, Tensor]:
    """A trained layer whose blocks serve four kinds of token, inputs of these kinds, and what the layer gives."""
    g = torch.Generator().manual_seed(seed)
    kinds = 3 * torch.randn(4, 16, generator=g)
    x = kinds[torch.randint(4, (2000,), generator=g)] + 0.7 * torch.randn(2000, 16, generator=g)
    up, down = nn.Linear(16, 64), nn.Linear(64, 16)
    with torch.no_grad():
        own = torch.arange(64) // 8 % 4  # each kind's neurons, in two blocks of eight
        up.weight.copy_(kinds[own] / 16 + 0.1 * torch.randn(64, 16, generator=g))
        up.bias.fill_(-1)
        y = down(F.relu(up(x)))
    return RoutedFFN.from_dense(up, down, 8, 4, activation=F.relu), x, y


def _loss(layer: RoutedFFN, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.mse_loss(layer(x), y) / y.var())


@pytest.mark.evidence
def test_routing_finds_the_blocks_that_matter():
    """Half of the blocks of a layer whose neurons are active by kind of token: calibrated, it loses a hundredth.

    Controls: blocks chosen at random, and a router that knows nothing, lose at least half of the answer's variance.
    """
    layer, x, y = _clustered()
    torch.manual_seed(0)
    layer.router.reset_parameters()
    blind = _loss(layer, x[1000:], y[1000:])
    layer.calibrate(x=x[:1000], ridge=1e-4)
    calibrated = _loss(layer, x[1000:], y[1000:])
    layer.router.forward = lambda x: torch.randn(*x.shape[:-1], 8)
    random = _loss(layer, x[1000:], y[1000:])
    assert calibrated < 0.02 and min(blind, random) > 0.4, (blind, calibrated, random)


@pytest.mark.evidence
def test_balance_spreads_tokens():
    """The loss is 1 when all blocks get as many, and training with it evens out a router that prefers two blocks.

    Control: without it the router stays as it was.
    """
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    spread = {}
    for weight in (0.0, 1.0):
        layer = RoutedFFN(16, 64, 8, 2)
        with torch.no_grad():
            layer.router.bias[:2] += 3
        optimiser = torch.optim.Adam(layer.router.parameters(), 0.02)
        for _ in range(150):
            optimiser.zero_grad()
            layer(x)
            (weight * layer.balance).backward()
            optimiser.step()
        chosen = layer.router(x).topk(2, -1).indices.flatten()
        spread[weight] = float(torch.bincount(chosen, minlength=8).max()) / 512
    assert spread[1.0] < 0.45 < 0.9 < spread[0.0], spread
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.bias.zero_()
        layer(x)
    assert float(layer.balance) == pytest.approx(1.0)


def test_sizes_and_formats():
    layer = RoutedFFN(width=8, neurons=16, blocks=4, active=2, activation=F.silu, bias=False)
    for shape in ((0, 8), (8,), (1, 8), (2, 3, 8)):
        x = torch.randn(shape, requires_grad=True)
        out = layer(x)
        assert out.shape == shape and layer.balance.isfinite()
        (out.sum() + layer.balance).backward()
        assert x.grad.isfinite().all()
    for dtype in (torch.float16, torch.bfloat16):
        low = layer.to(dtype)
        assert low(torch.randn(4, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0, "neurons": 8}, "width must be an integer >= 1, got 0"),
        ({"width": 8, "neurons": 20}, "neurons must be a multiple of 8 blocks, got 20"),
        ({"width": 8, "neurons": 16, "blocks": 0}, "blocks must be an integer >= 1, got 0"),
        ({"width": 8, "neurons": 16, "active": 9}, "active must be an integer in 1..8, got 9"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        RoutedFFN(**options)
