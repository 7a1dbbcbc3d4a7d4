"""Adaptive frequency filters: the convolution that they are, their block and network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tilewise.convolution import AFF, AFFBlock, AFFNet


def mixer(width: int = 6, groups: int = 3, seed: int = 0, **options) -> AFF:
    torch.manual_seed(seed)
    layer = AFF(width, groups, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.5)
    return layer


def convolved(x: Tensor, kernel: Tensor, around: bool = True) -> Tensor:
    """Every place's sum over all others, by hand: circular over `[B, H, W, C]`, or with zeros outside."""
    out = torch.zeros_like(x)
    h, w = x.shape[1:3]
    for i in range(h):
        for j in range(w):
            moved = x.roll((i, j), (1, 2)).clone()
            if not around:
                moved[:, :i], moved[:, :, :j] = 0, 0
            out += kernel[:, i : i + 1, j : j + 1] * moved
    return out


@pytest.mark.evidence
@pytest.mark.parametrize("grid", [(4, 6), (5, 5), (7, 1), (1, 8)])
def test_it_is_a_convolution_with_a_kernel_of_its_own_as_large_as_the_picture(grid):
    """Float64, odd and even sides, summed place by place. Controls: the kernel of another picture and a
    border of zeros give something else, and the kernel reaches every place."""
    layer = mixer()
    h, w = grid
    x = torch.randn(3, h * w, 6, dtype=torch.float64)
    kernel, got = layer.kernel(x, grid), layer(x, grid).unflatten(1, grid)
    assert kernel.shape == (3, h, w, 6) and kernel.abs().min() > 0
    picture = x.unflatten(1, grid)
    torch.testing.assert_close(got, convolved(picture, kernel), rtol=0, atol=1e-12)
    assert (got - convolved(picture, kernel.roll(1, 0))).norm() > 0.1 * got.norm()
    if min(grid) > 1:
        assert (got - convolved(picture, kernel, around=False)).norm() > 0.1 * got.norm()


def test_the_mask_is_its_formula():
    """One group at a time, in complex numbers; small parts are exactly 0; a line is a picture of one row."""
    layer = mixer(threshold=0.8)
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    z = torch.fft.rfft2(x.unflatten(1, (3, 4)), dim=(1, 2), norm="ortho")
    net, masks = layer.network, []
    for g in range(3):
        part = z[..., 2 * g : 2 * g + 2]
        inner = part @ torch.complex(*net.up[:, g]) + torch.complex(*net.up_bias[:, g])
        inner = torch.complex(inner.real.relu(), inner.imag.relu())
        outer = inner @ torch.complex(*net.down[:, g]) + torch.complex(*net.down_bias[:, g])
        masks.append(
            torch.complex(*(p.sign() * (p.abs() - 0.8).clamp(min=0) for p in (outer.real, outer.imag)))
        )
    mask = torch.cat(masks, -1)
    assert (mask == 0).any() and (mask != 0).any()
    want = torch.fft.irfft2(mask * z, s=(3, 4), dim=(1, 2), norm="ortho").flatten(1, 2)
    torch.testing.assert_close(layer(x, (3, 4)), want)
    torch.testing.assert_close(layer(x), layer(x, (1, 12)))
    assert (
        layer(x[:, :0]).shape == (2, 0, 6)
        and layer(x.bfloat16().float().bfloat16(), (3, 4)).dtype == torch.bfloat16
    )


def test_block_and_network():
    """Residuals: with both last layers silent a block is the identity; all parameters of a network learn; a
    picture's answer does not depend on its batch."""
    torch.manual_seed(0)
    block = AFFBlock(8, 2)
    x = torch.randn(2, 12, 8)
    assert block(x, (3, 4)).shape == x.shape and block(x[:0], (3, 4)).shape == (0, 12, 8)
    with torch.no_grad():
        for p in (
            block.down.weight,
            block.down.bias,
            block.mixer.network.down,
            block.mixer.network.down_bias,
        ):
            p.zero_()
    torch.testing.assert_close(block(x, (3, 4)), x)
    net = AFFNet(5, 1, width=16, groups=4)
    pixels = torch.randn(4, 1, 12, 8)
    logits = net(pixels)
    assert logits.shape == (4, 5)
    torch.testing.assert_close(net(pixels[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    net(pixels).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="groups must divide width, got 4 and 6"):
        AFF(6, 4)
    with pytest.raises(ValueError, match="threshold must be >= 0, got -1"):
        AFF(6, 3, threshold=-1)
    with pytest.raises(ValueError, match=r"grid \(3, 5\) has 15 places, got 12 tokens"):
        AFF(6, 3)(torch.ones(2, 12, 6), (3, 5))
    with pytest.raises(ValueError, match=r"x must be \[B, N, 6\], got \[2, 12, 5\]"):
        AFF(6, 3)(torch.ones(2, 12, 5))
    with pytest.raises(ValueError, match=r"grid must be \(H, W\), got None"):
        AFFBlock(8)(torch.ones(2, 12, 8), None)
    with pytest.raises(ValueError, match=r"sides multiples of 4, got \[1, 3, 6, 8\]"):
        AFFNet(2)(torch.ones(1, 3, 6, 8))
