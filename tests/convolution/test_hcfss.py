"""HCFSSNet: scans in all directions, frequencies weighed, each shown alone, and a small codec of both."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.convolution import blocks
from tests.convolution import photographs as p
from tests.convolution.image_models import RATE, size, trained
from tilewise.convolution import (
    AFMM,
    FSTAM,
    HCFSS,
    VFSS,
    VONSS,
    WindowAttention,
    rate_distortion,
    scan_order,
)
from tilewise.convolution.images.hcfss import _bits, _normal
from tilewise.convolution.images.vonss import DIRECTIONS, _Read, _Write

GRIDS = [(1, 1), (1, 5), (4, 1), (2, 3), (5, 4), (7, 7)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_an_order_visits_every_place_and_steps_to_neighbours(height: int, width: int, direction: str):
    order = scan_order(direction, height, width)
    assert order.sort().values.equal(torch.arange(height * width))
    row, column = order // width, order % width
    steps = torch.maximum(row.diff().abs(), column.diff().abs())
    assert (steps <= 1).all()
    line = {"rows": row, "columns": column, "diagonals": row + column, "antidiagonals": row - column}[
        direction
    ]
    assert ((line.diff() == 0) | (line.diff() == 1)).all()  # a line is read whole before the next


def test_reading_line_by_line_leaves_the_neighbourhood():
    raster = torch.arange(20)
    assert (raster % 5).diff().abs().max() > 1


def test_reading_in_orders_and_writing_back_are_transposes():
    orders = torch.stack([scan_order(name, 3, 4) for name in DIRECTIONS])
    places = orders.argsort(1)
    x, y = draw(2, 12, 3).requires_grad_(), draw(2, 4, 12, 3, seed=1).requires_grad_()
    read = _Read.apply(x, orders, places)
    assert read.equal(torch.stack([x[:, order] for order in orders], 1))
    torch.testing.assert_close(_Write.apply(read, orders, places), 4 * x)
    torch.testing.assert_close((read * y).sum(), (x * _Write.apply(y, orders, places)).sum())
    assert torch.autograd.gradcheck(lambda a: _Read.apply(a, orders, places), x)
    assert torch.autograd.gradcheck(lambda a: _Write.apply(a, orders, places), y)


def test_the_scan_is_its_formula():
    """Token by token in float64: `h = exp(delta A) h + delta x B`, `y = C h + D x`, eight times."""
    torch.manual_seed(0)
    layer, x = VONSS(3, states=2, expand=2, rank=1).double(), draw(1, 3, 4, 3)
    inner = F.silu(layer.near(layer.inner(x).movedim(3, 1))).flatten(2).mT[0]  # [n, c]
    total, scan = torch.zeros_like(inner), 0
    for name in DIRECTIONS:
        for backwards in (False, True):
            order = scan_order(name, 3, 4)
            order = order.flip(0) if backwards else order
            own = slice(scan * 6, (scan + 1) * 6)
            rates, state = -layer.log_rate[own].exp(), torch.zeros(6, 2, dtype=torch.float64)
            for place in order.tolist():
                token = inner[place]
                rank, write, read = (token @ layer.select[scan]).split((1, 2, 2))
                delta = F.softplus(rank @ layer.step[scan] + layer.step_bias[scan, 0]).unsqueeze(1)
                state = (delta * rates).exp() * state + delta * token.unsqueeze(1) * write
                total[place] += state @ read + layer.skip[own] * token
            scan += 1
    want = layer.out(layer.norm(total).view(1, 3, 4, 6) * F.silu(layer.gate(x)))
    torch.testing.assert_close(layer(x), want)


def test_every_place_sees_every_other():
    """Through one layer."""
    torch.manual_seed(0)
    layer, x = VONSS(4, states=4).double(), draw(1, 9, 9, 4).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, 4, 4].sum(), x)
    assert (grad[0].abs().sum(2) > 0).all()


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9), (1, 1)])
def test_the_spectrum_is_the_cosine_transform_and_its_inverse_is_exact(height: int, width: int, window: int):
    layer, x = AFMM(3, window).double(), draw(2, height, width, 3)
    spectrum = layer.spectrum(x)
    torch.testing.assert_close(layer.image(spectrum, height, width), x)
    k = torch.arange(window, dtype=torch.float64)
    cosines = torch.cos(math.pi * k.unsqueeze(1) * (2 * k + 1) / (2 * window)) * (2 / window) ** 0.5
    cosines[0] /= 2**0.5
    rows = torch.arange(-(-height // window) * window).clamp(max=height - 1)
    columns = torch.arange(-(-width // window) * window).clamp(max=width - 1)
    first = x[:, rows][:, :, columns][:, :window, :window]
    want = torch.einsum("yi,xj,bijc->byxc", cosines, cosines, first)
    torch.testing.assert_close(spectrum[:, 0, 0].unflatten(1, (window, window)), want)


def test_modulation_is_of_frequencies_and_by_content():
    torch.manual_seed(0)
    layer, x = AFMM(3, 4).double(), draw(2, 8, 8, 3)
    torch.testing.assert_close(layer(x), layer.out(x))  # weights begin at one
    layer.out = torch.nn.Identity()
    with torch.no_grad():
        layer.weights[0] = -1e4
    windows = layer(x).unflatten(2, (2, 4)).unflatten(1, (2, 4))
    assert windows.mean((2, 4)).abs().max() < 1e-12  # the slowest frequency is their mean
    with torch.no_grad():
        layer.net[2].weight.normal_()
    one, two = (layer.modulation(layer.spectrum(y)) for y in (x, 3 * x))
    assert (one - two).abs().max() > 1e-3
    layer.adaptive = False
    assert layer.modulation(layer.spectrum(x)).equal(layer.modulation(layer.spectrum(3 * x)))


def test_attention_is_within_windows():
    torch.manual_seed(0)
    layer, x = WindowAttention(4, 2, 2).double(), draw(1, 4, 4, 4)
    with torch.no_grad():
        layer.bias.normal_()
    made = layer(x)
    tokens = x[:, 2:, :2].flatten(1, 2)[0]  # a window of four
    q, k, v = layer.qkv(tokens).unflatten(1, (3, 2, 2)).permute(1, 2, 0, 3)
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    bias = torch.stack(
        [layer.bias[:, (a - c + 1) * 3 + b - d + 1] for a, b in places for c, d in places], 1
    ).unflatten(1, (4, 4))
    weights = (q @ k.mT / 2**0.5 + bias).softmax(2)
    torch.testing.assert_close(
        made[0, 2:, :2].flatten(0, 1), layer.out((weights @ v).transpose(0, 1).flatten(1))
    )


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 9), (3, 2)])
def test_a_shift_moves_windows_and_joins_no_borders(height: int, width: int):
    torch.manual_seed(0)
    layer, x = WindowAttention(4, 2, 4, shifted=True).double(), draw(1, height, width, 4).requires_grad_()
    area = [(n + 2) // 4 for n in range(max(height, width))]
    for row, column in ((0, 0), (height - 1, width - 1), (min(2, height - 1), min(5, width - 1))):
        (grad,) = torch.autograd.grad(layer(x)[0, row, column].sum(), x)
        seen = grad[0].abs().sum(2) > 0
        for i in range(height):
            for j in range(width):
                same = area[i] == area[row] and area[j] == area[column]
                assert bool(seen[i, j]) == same, (row, column, i, j)


def test_a_latent_costs_what_the_distribution_says():
    x = torch.arange(-40.0, 41.0).double()
    for distribution, scale in ((_normal, 1.3), (torch.sigmoid, 0.7), (_normal, 0.11)):
        spread = torch.full_like(x, scale)
        bits = torch.stack([_bits(distribution, one[None, None], spread[:1])[0] for one in x])
        assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-6)
    found = _bits(_normal, torch.tensor([[2.0, -0.3]]), torch.tensor([[1.5, 0.5]]))
    normal = torch.distributions.Normal(0.0, 1.0)
    want = -torch.log2(normal.cdf(torch.tensor(2.5 / 1.5)) - normal.cdf(torch.tensor(1.0)))
    want = want - torch.log2(normal.cdf(torch.tensor(0.4)) - normal.cdf(torch.tensor(-1.6)))
    torch.testing.assert_close(found, want[None])


def test_the_codec_learns_everywhere_and_rounds_when_tested():
    torch.manual_seed(0)
    codec, x = HCFSS(8, 6, 4, states=2), 0.2 * draw(2, 3, 32, 48).float()
    coded = codec(x)
    assert coded.images.shape == x.shape and coded.bits.shape == (2,) and (coded.bits > 0).all()
    rate_distortion(coded, x).backward()
    idle = [
        name for name, part in codec.named_parameters() if part.grad is None or not part.grad.abs().sum() > 0
    ]
    # A net whose last layer starts at zero teaches the layers before it from its second step on.
    assert all(name.split(".net.")[-1].startswith("0.") for name in idle), idle
    codec.eval()
    assert codec(x).images.equal(codec(x).images)
    latent = codec.encoder(x)
    side = codec.to_side(latent).round()
    mean = codec.from_side(side).chunk(2, 1)[0]
    torch.testing.assert_close(codec(x).images, codec.decoder((latent - mean).round() + mean))
    loss = rate_distortion(codec(x), x, 0.5)
    error = (codec(x).images - x).square().mean() * 255**2
    torch.testing.assert_close(loss, codec(x).bits.sum() / (2 * 32 * 48) + 0.5 * error)


def test_blocks_take_any_grid():
    torch.manual_seed(0)
    for layer in (
        VFSS(4, window=4, states=2),
        FSTAM(4, window=4, shifted=True),
        VONSS(4, directions=["rows"]),
    ):
        for height, width in GRIDS:
            assert layer(torch.randn(2, height, width, 4)).shape == (2, height, width, 4)
    assert VONSS(4)(torch.randn(0, 2, 2, 4)).shape == (0, 2, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scan_order("spiral", 2, 2), "direction must be one of 'rows', .*, got 'spiral'"),
        (lambda: VONSS(4, directions=()), "directions must name at least one"),
        (lambda: VONSS(4, directions=("up",)), "direction must be one of"),
        (lambda: VONSS(0), "width must be an integer >= 1, got 0"),
        (lambda: VONSS(4, steps=(0, 1)), r"steps must rise from above 0, got \(0, 1\)"),
        (lambda: VONSS(4)(torch.ones(1, 2, 4)), r"x must be \[B, H, W, 4\], got \[1, 2, 4\]"),
        (lambda: AFMM(4, 0), "window must be an integer >= 1, got 0"),
        (lambda: AFMM(4)(torch.ones(1, 2, 2, 3)), r"x must be \[B, H, W, 4\], got \[1, 2, 2, 3\]"),
        (lambda: HCFSS(7), "width must be an even integer >= 2, got 7"),
        (
            lambda: HCFSS(far=lambda width: None, states=2),
            "settings are of VFSS and far is given; got states",
        ),
        (lambda: HCFSS()(torch.ones(1, 3, 16, 24)), r"sides multiples of 16, got \[1, 3, 16, 24\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ends_of_lines_are_where_a_line_begins_or_stops():
    seen, wanted = blocks.lines(2, 1)
    for number, name in enumerate(DIRECTIONS):
        order = scan_order(name, blocks.SIDE, blocks.SIDE)
        along, told = (x.flatten(1, 2)[:, order] for x in (wanted[..., number], seen[..., 4 + number]))
        moved = along.diff(dim=1) != 0  # from one line to the next
        assert told[:, :-1][moved].all() and told[:, 1:][moved].all()
        assert told.sum() < 2 * 2 * 2 * 2 * blocks.SIDE


@lru_cache
@torch.no_grad()
def along(name: str) -> list[float]:
    """Squared error inside a grid, along rows, columns and both diagonals; of no use at all is 1."""
    seen, wanted = blocks.lines(128, 1)
    return (trained(name)(seen) - wanted).square()[:, 1:-1, 1:-1].mean((0, 1, 2)).tolist()


@torch.no_grad()
def left(name: str) -> float:
    """Squared error after noise was taken from windows that hold one group of frequencies each."""
    seen, clean = blocks.bands(512, 1)
    return (trained(name)(seen) - clean).square().mean().item()


@pytest.mark.evidence
def test_one_layer_follows_lines_in_all_directions():
    """Ends of lines tell their values, which are to be known all along them. Controls: as many scans and
    parameters along rows, or along rows and columns; convolutions with more."""
    assert size("lines") == size("lines-rows") == size("lines-cross") < size("lines-near")
    every, rows, cross, near = (along(f"lines{end}") for end in ("", "-rows", "-cross", "-near"))
    assert max(every) < 0.05, every
    assert rows[0] < 0.1 and min(rows[1:]) > 0.5, rows
    assert max(cross[:2]) < 0.1 and min(cross[2:]) > 0.5, cross
    assert min(near) > 5 * max(every), (near, every)


@pytest.mark.evidence
def test_frequencies_are_weighed_by_what_a_window_holds():
    """Noise taken from windows, each with an octave of its own. The best that weights alike for all windows can do
    is known: `p n / (p + n)` of power p and noise n. Controls: the layer with those alone, with weights made of
    another picture, and of places instead of frequencies."""
    assert size("bands") == size("bands-fixed") == size("bands-others") == size("bands-place")
    power = blocks.LOUD**2 / blocks.WINDOW
    alike, told = power / (power + 1), blocks.LOUD**2 / (blocks.LOUD**2 + 1) / blocks.WINDOW
    assert left("bands") < 0.6 * alike and left("bands") > told, (left("bands"), told)
    for control in ("fixed", "others", "place"):
        assert left(f"bands-{control}") > 0.93 * alike, (control, left(f"bands-{control}"), alike)
    assert left("bands-fixed") < 1.03 * alike


def entropy_of_channels(x: Tensor) -> float:
    """Bits of whole numbers `[1, C, H, W]` by a code of its own for each channel, the best there is for them."""
    bits = 0.0
    for channel in x[0]:
        share = channel.flatten().unique(return_counts=True)[1] / channel.numel()
        bits -= (share * share.log2()).sum().item() * channel.numel()
    return bits


@pytest.mark.evidence
def test_side_information_saves_more_than_it_costs():
    """The trained codec on held-out photographs. Control: for every channel of the same latents the code that is
    best for that picture, which needs no side information and does not look at neighbours."""
    codec = trained("hcfss")
    for image in p.whole_held_out(16):
        with torch.no_grad():
            bits, latent = codec(image).bits.item(), codec.encoder(image)
        assert bits < 0.75 * entropy_of_channels(latent.round())


@lru_cache
@torch.no_grad()
def losses(name: str) -> dict[str, float]:
    """Of a trained codec, for each held-out photograph, with latents rounded."""
    codec, found = trained(name), {}
    for photograph, image in zip(p.HELD_OUT, p.whole_held_out(16)):
        found[photograph] = rate_distortion(codec(image), image, RATE).item()
    return found


def better(name: str, other: str) -> bool:
    return all(losses(name)[photograph] < losses(other)[photograph] for photograph in p.HELD_OUT)


@pytest.mark.evidence
def test_scans_in_all_directions_beat_scans_along_rows():
    """As many scans and parameters, all along rows: bits and error of held-out photographs together."""
    assert size("hcfss") == size("hcfss-rows")
    assert better("hcfss", "hcfss-rows"), (losses("hcfss"), losses("hcfss-rows"))
