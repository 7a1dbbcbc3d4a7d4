"""fwht as a public function: any dimension and size, bad input, and who it is to be compared with."""

from __future__ import annotations

import pytest
import torch

from tests.conformance.common import over_budget
from tilewise.transforms import explain_fwht, fwht, hadamard, transform_factors


@pytest.mark.parametrize("n", [1, 2, 64, 96, 107, 1536])
def test_matrix_of_its_entries(n):
    x = torch.randn(3, n)
    matrix = hadamard(n, normalize=True, dtype=torch.float64)
    reason = over_budget(fwht(x, normalize=True), x @ matrix.float(), x.double() @ matrix)
    assert n == 1 or reason is None, reason
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(n, dtype=torch.float64))


def test_natural_order_and_scale():
    assert fwht(torch.tensor([1.0, 2.0, 3.0, 4.0]), normalize=False).tolist() == [10.0, -2.0, -4.0, 0.0]
    assert fwht(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5.0, -1.0, -2.0, 0.0]
    signs = hadamard(24, normalize=False, dtype=torch.float32, device="cpu")
    assert set(signs.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("n", [8, 12, 107, 13696])
def test_its_own_inverse(n):
    x = torch.randn(2, n, dtype=torch.float64)
    torch.testing.assert_close(fwht(fwht(x)), x)
    torch.testing.assert_close(fwht(x).norm(), x.norm())


@pytest.mark.parametrize("engine", ["auto", "native", "torch", "definition"])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_any_dimension(engine, dim):
    x = torch.randn(4, 12, 16)
    got = fwht(x, dim=dim, engine=engine)
    want = fwht(x.movedim(dim, -1).contiguous(), engine=engine).movedim(-1, dim)
    assert got.shape == x.shape
    torch.testing.assert_close(got, want)
    assert fwht(torch.randn(0, 8)).shape == (0, 8)


def test_factors_are_told():
    made = transform_factors(n=1536)
    assert made is not None and (made.order, made.power, made.kind) == (12, 128, "hadamard")
    assert transform_factors(2053) is None
    chosen = explain_fwht(torch.randn(2, 8), dim=-1, normalize=True, engine="torch")
    assert chosen.engine == "torch" and "was asked for" in chosen.refused["native"]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: fwht([1.0, 2.0]), TypeError, "x must be a tensor, got list"),
        (lambda: fwht(torch.arange(4)), TypeError, "x must be of a floating dtype, got torch.int64"),
        (lambda: fwht(torch.randn(4), dim=1), ValueError, r"dim must be in -1..0 for x of shape \[4\], got 1"),
        (lambda: fwht(torch.randn(4), dim=0.5), TypeError, "dim must be an integer, got 0.5"),
        (lambda: fwht(torch.tensor(1.0)), ValueError, "dim must be in"),
        (lambda: fwht(torch.randn(3, 0)), ValueError, r"x must have a number along dim -1, got shape \[3, 0\]"),
        (lambda: fwht(torch.randn(2053)), ValueError, "got 2053; the nearest sizes that work are 2052 and 2054"),
        (lambda: fwht(torch.randn(4), engine="numpy"), ValueError, "engine must be 'auto' or one of"),
        (lambda: hadamard(0), ValueError, "n must be an integer >= 1, got 0"),
        (lambda: hadamard(2053), ValueError, "the nearest are 2052 and 2054"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_gradients_through_the_public_function():
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fwht(x, dim=0), x)
    assert torch.func.grad(lambda x: fwht(x).square().sum() / 2)(torch.ones(8)).tolist() == [1.0] * 8
