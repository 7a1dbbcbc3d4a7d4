"""Products of spherical functions through the torus: to a grid, multiply there, and back, O(L^3)
altogether."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.gaunt.bases import (
    by_order,
    constants,
    expansion,
    listed,
    off_grid,
    onto_grid,
    orders,
    projection,
)
from tilewise.convolution.gaunt.harmonics import check_degree, degree_of

ENGINES = ("auto", "matrix", "fft")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gaunt_product(*factors: Tensor, degree: int | None = None, engine: str = "auto") -> Tensor:
    """The product of functions on the sphere, each given by its spherical harmonics.

    Args:
        factors: two or more of `[..., (L_i + 1)^2]` (see `tilewise.convolution.gaunt.harmonics` for the
            order), whose leading dimensions broadcast; one dtype: float16 and bfloat16 (computed in float32),
            float32, float64.
        degree: the highest degree of the result; None for the whole product, the sum of all L_i.
        engine: how the torus is walked. "fft": Fourier coefficients, two Fourier transforms, as the paper has
            it. "matrix": the same transforms as matrix products over half the torus, the rest being its
            mirror image. "auto": "matrix", which was the faster one at every degree up to 10 on the CPU
            measured (docs/spectral.md).

    Returns `[..., (degree + 1)^2]`: what `gaunt_table` contracted with two factors gives, in `O(L^3)`
    operations in place of the `O(L^6)` of the table. Differentiable.

    Raises ValueError or TypeError for counts of coefficients that are no (L + 1)^2, for dtypes that differ or
    are not listed, for leading dimensions that do not broadcast and for a degree or engine that does not
    exist.

    After Gaunt Tensor Products (Luo, Chen, Krishnapriyan, 2024, arXiv 2401.10216). Real harmonics in place of
    complex ones and half of the torus; "matrix" is ours. Unlike a tensor product with Clebsch and Gordan's
    coefficients it has one output for each degree, the sum over all pairs of input degrees, and no
    antisymmetric part (no cross product).
    """
    degrees = _check(factors, engine)
    band = sum(degrees)
    degree = band if degree is None else check_degree("degree", degree)
    kept = min(degree, band)
    dtype = factors[0].dtype
    walk = _by_fft if engine == "fft" and all(x.numel() for x in factors) else _by_matrix
    # In float32 the Fourier transforms of a product of low degree err 2.1 times as much as the table does.
    work = [x.double() if dtype == torch.float64 or walk is _by_fft else x.float() for x in factors]
    made = walk(work, degrees, band, kept).to(dtype)
    return F.pad(made, (0, (degree + 1) ** 2 - (kept + 1) ** 2)) if degree > kept else made


def _check(factors: tuple[Tensor, ...], engine: str) -> list[int]:
    """Degrees of the factors, once everything fits."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    if len(factors) < 2:
        raise ValueError(f"factors must be at least two tensors, got {len(factors)}")
    for i, x in enumerate(factors):
        if not isinstance(x, Tensor) or not x.ndim:
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"factors[{i}] must be a tensor [..., (L + 1)^2], got {given}")
        if x.dtype not in DTYPES or x.dtype != factors[0].dtype:
            raise TypeError(
                f"factors must share one of float16, bfloat16, float32 and float64; factors[{i}] is {x.dtype}"
            )
    try:
        torch.broadcast_shapes(*(x.shape[:-1] for x in factors))
    except RuntimeError:
        shapes = [list(x.shape[:-1]) for x in factors]
        raise ValueError(f"leading dimensions of the factors must broadcast, got {shapes}") from None
    return [degree_of(x.shape[-1], f"factors[{i}]") for i, x in enumerate(factors)]


def _by_matrix(factors: list[Tensor], degrees: list[int], band: int, degree: int) -> Tensor:
    count = band + degree + 1  # of phis: what folds back has orders above `degree`

    def walked(x: Tensor, own: int) -> Tensor:
        theta, phi = constants(onto_grid, (own, band, count), x)
        rows = by_order(x.reshape(-1, x.shape[-1]), own, theta)  # [m, B, theta]
        return (rows.flatten(1).mT @ phi).reshape(*x.shape[:-1], band + 1, count)

    grid = reduce(torch.mul, map(walked, factors, degrees))
    phi, theta = constants(off_grid, (band, degree, count), grid)
    rows = (phi @ grid.reshape(-1, count).mT).unflatten(1, (-1, band + 1))  # [m, B, theta]
    return listed(torch.bmm(rows, theta), degree).reshape(*grid.shape[:-2], (degree + 1) ** 2)


def _by_fft(factors: list[Tensor], degrees: list[int], band: int, degree: int) -> Tensor:
    sizes = smooth(2 * band + 1), smooth(max(band + degree, 2 * max(degrees)) + 1)

    def walked(x: Tensor, own: int) -> Tensor:
        rows = by_order(x.reshape(-1, x.shape[-1]), own, constants(expansion, (own,), x)[0])  # [m, B, u]
        values = torch.fft.irfft2(_spectrum(rows, own, sizes[0]), s=sizes, norm="forward")
        return values.reshape(*x.shape[:-1], *sizes)

    grid = reduce(torch.mul, map(walked, factors, degrees))
    found = torch.fft.rfft2(grid.reshape(-1, *sizes), norm="forward")[:, : band + 1, : degree + 1]
    whole = (found / constants(_scale, (degree, band), grid)[0]).permute(2, 0, 1)  # [m >= 0, B, u]
    rows = torch.cat((-whole[1:].imag.flip(0), whole.real))
    made = torch.bmm(rows, constants(projection, (band, degree), grid)[0])
    return listed(made, degree).reshape(*grid.shape[:-2], (degree + 1) ** 2)


def _scale(degree: int, band: int) -> Tensor:
    """`[u, m]`, m >= 0: the complex coefficient of exp(i u theta + i m phi) of one real Fourier
    coefficient."""
    u, m = torch.arange(band + 1).unsqueeze(1), torch.arange(degree + 1)
    halves = torch.where(u == 0, 1.0, 0.5) * torch.where(m == 0, 1.0, 0.5)
    # sin(u theta) = -i/2 (exp(i u theta) - exp(-i u theta)); of odd orders no sin(0 theta) ever counts
    return torch.where(m % 2 == 0, halves + 0j, -1j * halves).to(torch.complex128)


def _spectrum(rows: Tensor, degree: int, size: int) -> Tensor:
    """Real coefficients `[m, B, u]` as the half spectrum `[B, size, degree + 1]` that irfft2 takes."""
    sine = F.pad(rows[:degree].flip(0), (0, 0, 0, 0, 1, 0))
    half = torch.complex(rows[degree:], -sine).permute(1, 2, 0)  # [B, u, m >= 0]
    half = half * constants(_scale, (degree, degree), rows)[0]
    sign = torch.where(orders(degree)[degree:] % 2 == 0, 1.0, -1.0).to(rows)
    mirrored = half[:, 1:].flip(1) * sign
    between = half.new_zeros(half.shape[0], size - 2 * degree - 1, degree + 1)
    return torch.cat((half, between, mirrored), 1)


def smooth(size: int) -> int:
    """The least number of factors 2, 3 and 5 that is not below `size`: what Fourier transforms are fast
    at."""
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


class GauntTensorProduct(nn.Module):
    """An equivariant product of two features: `[..., C, (left + 1)^2]` and `[..., C, (right + 1)^2]` to
    `[..., C, (out + 1)^2]`.

    Rotating both inputs (each degree by its Wigner matrix) rotates the output. With `channels`, every degree
    of both inputs and of the output has a learned weight in each channel, 1 at first: the paper's
    parametrisation, `O(L)` weights where a full tensor product has one for each path, `O(L^3)`.

    Args:
        left, right: highest degrees of the inputs. out: that of the output, None for left + right.
        channels: C, or None for no weights; then inputs are `[..., (L + 1)^2]` of any leading dimensions.
        engine: as of `gaunt_product`.

    Raises ValueError or TypeError for settings and inputs that do not fit. After Luo, Chen and Krishnapriyan,
    2024 (arXiv 2401.10216); see `gaunt_product` for what differs.
    """

    def __init__(
        self,
        left: int,
        right: int,
        out: int | None = None,
        *,
        channels: int | None = None,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("left", left), ("right", right)):
            check_degree(name, value)
        self.left, self.right = left, right
        self.out = left + right if out is None else check_degree("out", out)
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
        if channels is not None and (not isinstance(channels, int) or channels < 1):
            raise ValueError(f"channels must be an integer >= 1 or None, got {channels!r}")
        self.engine, self.channels = engine, channels
        if channels is not None:
            sizes = (left, right, self.out)
            self.weights = nn.ParameterList(torch.ones(channels, degree + 1) for degree in sizes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for name, given, degree in (("x", x, self.left), ("y", y, self.right)):
            wanted = (degree + 1) ** 2
            if given.shape[-1:] != (wanted,):
                raise ValueError(f"{name} must have {wanted} coefficients, got {list(given.shape)}")
            if self.channels is not None and given.shape[-2:-1] != (self.channels,):
                raise ValueError(f"{name} must be [..., {self.channels}, {wanted}], got {list(given.shape)}")
        x, y = self._weighed(x, 0), self._weighed(y, 1)
        return self._weighed(gaunt_product(x, y, degree=self.out, engine=self.engine), 2)

    def _weighed(self, x: Tensor, which: int) -> Tensor:
        """Each degree's coefficients times its weight."""
        if self.channels is None:
            return x
        weight = self.weights[which]
        sizes = 2 * torch.arange(weight.shape[1], device=x.device) + 1
        return x * weight.repeat_interleave(sizes, 1, output_size=x.shape[-1])
