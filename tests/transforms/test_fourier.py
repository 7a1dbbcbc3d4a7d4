"""Fourier, cosine and Monarch transforms against their sums in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.conformance.common import over_budget
from tilewise.transforms import (
    bit_reversed,
    dct,
    fft,
    fwht,
    idct,
    ifft,
    irfft,
    monarch_dft,
    monarch_order,
    rfft,
)

SIZES = [1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 1000, 1025]
TYPES = [1, 2, 3, 4]


def dft_matrix(n: int) -> Tensor:
    """exp(-2 pi i j k / n), complex128."""
    at = torch.arange(n)
    angle = (at.unsqueeze(1) * at % n).double() * (-2 * math.pi / n)
    return torch.complex(angle.cos(), angle.sin())


def dct_matrix(n: int, kind: int, ortho: bool) -> Tensor:
    """`[n, n]` with `out = matrix @ x`, written from the sums in the docstring, float64."""
    k, j = torch.arange(n).double().unsqueeze(1), torch.arange(n).double()
    if kind == 1:
        made = 2 * (math.pi * j * k / (n - 1)).cos()
        made[:, [0, n - 1]] /= 2
    elif kind == 2:
        made = 2 * (math.pi * k * (2 * j + 1) / (2 * n)).cos()
    elif kind == 3:
        made = 2 * (math.pi * j * (2 * k + 1) / (2 * n)).cos()
        made[:, 0] /= 2
    else:
        made = 2 * (math.pi * (2 * j + 1) * (2 * k + 1) / (4 * n)).cos()
    if not ortho:
        return made
    # The orthonormal form has the same rows up to weights of ends: those that make it orthogonal.
    if kind == 1:
        made[:, [0, n - 1]] *= math.sqrt(2)
        made[[0, n - 1]] *= math.sqrt(0.5)
        return made / math.sqrt(2 * (n - 1))
    if kind == 2:
        made[0] *= math.sqrt(0.5)
    if kind == 3:
        made[:, 0] *= math.sqrt(2)
    return made / math.sqrt(2 * n)


def parts(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def held(got: Tensor, naive: Tensor, want: Tensor) -> None:
    reason = over_budget(parts(got), parts(naive), parts(want))
    assert reason is None, reason


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
def test_natural_order_is_the_sum(n, norm):
    matrix = dft_matrix(n) * {"backward": 1, "ortho": n**-0.5, "forward": 1 / n}[norm]
    x = torch.randn(3, n, dtype=torch.complex64)
    if n > 2:
        held(fft(x, norm=norm), x @ matrix.to(torch.complex64), x.to(torch.complex128) @ matrix)
        real = x.real.contiguous()
        half = matrix[:, : n // 2 + 1]
        held(rfft(real, norm=norm), real.to(x.dtype) @ half.to(x.dtype), real.to(torch.complex128) @ half)
    wide = x.to(torch.complex128)
    torch.testing.assert_close(fft(wide, norm=norm), wide @ matrix)
    torch.testing.assert_close(ifft(fft(wide, norm=norm), norm=norm), wide)
    torch.testing.assert_close(irfft(rfft(wide.real, norm=norm), n, norm=norm), wide.real)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 1024])
@pytest.mark.parametrize("dim", [0, -1])
def test_bit_reversed_samples(n, dim):
    """Samples laid out in reversed order give the spectrum of those in order; inverses lay them out again."""
    order = bit_reversed(n)
    words = [int(format(i, f"0{n.bit_length() - 1}b")[::-1], 2) if n > 1 else 0 for i in range(n)]
    assert order.tolist() == words and torch.equal(order[order], torch.arange(n))
    x = torch.randn(n, n, dtype=torch.float64)
    laid = x.index_select(dim, order)
    torch.testing.assert_close(fft(laid, dim, order="bit-reversed"), torch.fft.fft(x, dim=dim))
    torch.testing.assert_close(rfft(laid, dim, order="bit-reversed"), torch.fft.rfft(x, dim=dim))
    back = ifft(torch.fft.fft(x, dim=dim), dim=dim, order="bit-reversed")
    torch.testing.assert_close(back.real, laid)
    torch.testing.assert_close(irfft(torch.fft.rfft(x, dim=dim), n, dim=dim, order="bit-reversed"), laid)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("norm", ["ortho", None])
def test_cosines_are_their_sums(kind, n, norm):
    if kind == 1 and n == 1:
        with pytest.raises(ValueError, match="two numbers or more along dim -1 for type 1, got 1"):
            dct(torch.randn(3, 1), type=1)
        return
    matrix = dct_matrix(n, kind, norm == "ortho")
    x = torch.randn(3, n)
    wide = x.double()
    torch.testing.assert_close(dct(wide, type=kind, norm=norm), wide @ matrix.T)
    torch.testing.assert_close(idct(dct(wide, type=kind, norm=norm), type=kind, norm=norm), wide)
    if n > 2:
        held(dct(x, type=kind, norm=norm), x @ matrix.T.float(), wide @ matrix.T)
        low = x.bfloat16()
        held(dct(low, type=kind, norm=norm), low @ matrix.T.bfloat16(), low.double() @ matrix.T)
    if norm == "ortho":
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(
    "factors", [(16,), (4, 8), (8, 4), (3, 5), (2, 3, 4), (1, 7, 1), (5, 1, 6), (2, 2, 2, 2), (32, 32)]
)
@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
@pytest.mark.parametrize("inverse", [False, True])
def test_monarch_is_the_transform(factors, norm, inverse):
    n = math.prod(factors)
    x = torch.randn(3, n, dtype=torch.complex64)
    naive = dft_matrix(n).conj() if inverse else dft_matrix(n)
    naive = (
        naive
        * {"backward": 1 / n if inverse else 1, "ortho": n**-0.5, "forward": 1 if inverse else 1 / n}[norm]
    )
    want = x.to(torch.complex128) @ naive
    got = monarch_dft(x, factors=factors, norm=norm, inverse=inverse)
    held(got, x @ naive.to(x.dtype), want)
    order = monarch_order(factors)
    assert sorted(order.tolist()) == list(range(n))
    if not inverse:
        torch.testing.assert_close(monarch_dft(x, factors, order="monarch", norm=norm), got[:, order])
    else:
        torch.testing.assert_close(
            monarch_dft(x[:, order], factors, order="monarch", inverse=True, norm=norm), got
        )


def test_monarch_convolves_without_a_natural_spectrum():
    """As long convolutions use it: the pointwise product in the order the products leave."""
    x, kernel = torch.randn(2, 60, dtype=torch.float64), torch.randn(60, dtype=torch.float64)
    given = {"factors": (3, 4, 5), "order": "monarch"}
    got = monarch_dft(monarch_dft(x, **given) * monarch_dft(kernel, **given), inverse=True, **given)
    want = torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(kernel)).real
    torch.testing.assert_close(got.real, want)
    other = torch.randn(4, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(monarch_dft(other, (2, 3), dim=1), torch.fft.fft(other, dim=1))


def test_everything_is_differentiable():
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    runs = [lambda x: fft(x, order="bit-reversed"), rfft, lambda x: irfft(rfft(x, order="bit-reversed"), 8)]
    runs += [lambda x, t=t: dct(x, type=t) for t in TYPES] + [lambda x, t=t: idct(x, type=t) for t in TYPES]
    runs += [lambda x: monarch_dft(x, (2, 4), order="monarch"), lambda x: dct(x[:, :7]), fwht]
    for run in runs:
        assert torch.autograd.gradcheck(run, x)


def test_made_in_inference_mode_and_used_for_training():
    """Constants that are kept between calls work in both."""
    with torch.inference_mode():
        monarch_dft(torch.randn(21), (3, 7))
        fft(torch.randn(32), order="bit-reversed")
    x = torch.randn(21, requires_grad=True)
    monarch_dft(x, (3, 7)).real.sum().backward()
    y = torch.randn(32, requires_grad=True)
    fft(y, order="bit-reversed").real.sum().backward()
    assert x.grad is not None and y.grad is not None


def test_low_precision_is_widened():
    assert fft(torch.randn(8).half()).dtype == torch.complex64
    assert dct(torch.randn(8).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "run", [lambda x: fft(x, order="bit-reversed"), dct, lambda x: monarch_dft(x, (4, 4))]
)
def test_compiles_whole(run, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    x = torch.randn(3, 16)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: fft(torch.randn(12), order="bit-reversed"),
            ValueError,
            "a power of two, got 12; the nearest are 8 and 16",
        ),
        (
            lambda: fft(torch.randn(8), order="reversed"),
            ValueError,
            "order must be one of 'natural', 'bit-reversed'",
        ),
        (lambda: fft(torch.randn(8), norm="unit"), ValueError, "norm must be one of"),
        (
            lambda: fft(torch.arange(8)),
            TypeError,
            "x must be of a floating or complex dtype, got torch.int64",
        ),
        (lambda: rfft(torch.randn(8, dtype=torch.complex64)), TypeError, "x must be of a floating dtype"),
        (
            lambda: irfft(torch.randn(5), n=20),
            ValueError,
            "n must be one of 8 and 9 for 5 numbers along dim -1, got 20",
        ),
        (lambda: dct(torch.randn(8), type=5), ValueError, "type must be one of 1, 2, 3, 4, got 5"),
        (lambda: dct(torch.randn(8), norm="unit"), ValueError, "norm must be one of 'ortho', None"),
        (lambda: idct(torch.randn(8, 0)), ValueError, "x must have a number along dim -1"),
        (
            lambda: monarch_dft(torch.randn(8), (3, 3)),
            ValueError,
            r"factors must multiply to the size 8, got \(3, 3\)",
        ),
        (lambda: monarch_dft(torch.randn(8), (8, 0)), ValueError, "factors must be integers >= 1"),
        (lambda: monarch_dft(torch.randn(8), 8), ValueError, "factors must be integers >= 1, got 8"),
        (
            lambda: monarch_dft(torch.randn(8), (2, 4), order="bit-reversed"),
            ValueError,
            "order must be one of",
        ),
        (lambda: bit_reversed(12), ValueError, "n must be a power of two, got 12"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (2, 0, 8, 3)])
def test_no_rows_give_none(shape: tuple[int, ...], dtype: torch.dtype):
    """Shapes and dtypes are those of one row, and a gradient comes back."""
    dim = shape.index(8)
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    one = torch.zeros([max(1, n) for n in shape], dtype=dtype)
    calls = [
        lambda x, call=call, kind=kind: call(x, dim, type=kind) for call in (dct, idct) for kind in TYPES
    ]
    calls += [lambda x, call=call: call(x, dim=dim) for call in (fft, ifft, rfft, irfft)]
    calls += [lambda x: irfft(x, 15, dim), lambda x: fft(x, dim, order="bit-reversed")]
    for call in calls:
        made, like = call(x), call(one)
        assert made.dtype == like.dtype and made.numel() == 0
        assert [n for n in made.shape if n] == [n for n, was in zip(like.shape, shape) if was]
        made.abs().sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
