"""A batch of nothing passes every mixer of the room, and gradients of nothing come back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tilewise.convolution import (
    AFF,
    AFMM,
    AFNO,
    FNO,
    H3,
    HCFSS,
    T1,
    VONSS,
    DeepRFT,
    FourierKernelEstimator,
    WaLLoC,
    convolve,
    gaunt_product,
    long_conv,
)

RUNS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "convolve": ((0, 3, 8, 8), lambda x: convolve(x, x[:, :1]), (0, 3, 8, 8)),
    "FourierKernelEstimator": ((0, 4, 8, 8), lambda x: FourierKernelEstimator(4, 3)(x), (0, 3, 8, 8)),
    "DeepRFT": ((0, 3, 16, 16), lambda x: DeepRFT(8)(x).image, (0, 3, 16, 16)),
    "WaLLoC": ((0, 3, 32, 32), lambda x: WaLLoC()(x), (0, 3, 32, 32)),
    "HCFSS": ((0, 3, 32, 32), lambda x: HCFSS()(x).images, (0, 3, 32, 32)),
    "VONSS": ((0, 4, 4, 8), lambda x: VONSS(8)(x), (0, 4, 4, 8)),
    "AFMM": ((0, 4, 4, 8), lambda x: AFMM(8)(x), (0, 4, 4, 8)),
    "FNO": ((0, 1, 8, 8), lambda x: FNO(width=4, modes=3)(x), (0, 1, 8, 8)),
    "T1": ((0, 1, 8, 8), lambda x: T1(width=4, modes=3, size=(8, 8))(x), (0, 1, 8, 8)),
    "AFNO": ((0, 16, 8), lambda x: AFNO(8, 2)(x, (4, 4)), (0, 16, 8)),
    "AFF": ((0, 16, 8), lambda x: AFF(8)(x, (4, 4)), (0, 16, 8)),
    "H3": ((0, 16, 8), lambda x: H3(8)(x)[0], (0, 16, 8)),
    "long_conv": ((0, 4, 300), lambda x: long_conv(x, torch.ones(4, 300)), (0, 4, 300)),  # type: ignore[dict-item]
    "gaunt_product": ((0, 9), lambda x: gaunt_product(x, x), (0, 25)),
}

# torch.nn.PixelShuffle has no gradient of nothing; a codec's steps and T1's empty grid have none at all.
FORWARD_ONLY = {"DeepRFT", "HCFSS", "WaLLoC", "T1"}


@pytest.mark.parametrize("name", RUNS)
def test_an_empty_batch_is_no_error(name):
    shape, run, want = RUNS[name]
    x = torch.zeros(shape, requires_grad=True)
    out = run(x)
    assert out.shape == want
    if name not in FORWARD_ONLY:
        out.sum().backward()
        assert x.grad is not None and x.grad.shape == shape
