"""Butterfly: products of butterfly factors and permutations, learned or exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tilewise.transforms.butterfly.factors import levels_of, multiply, random_twiddle
from tilewise.transforms.butterfly.permutation import Permutation, RelaxedPermutation

NUMBERS = ("real", "complex", "real part")


class Butterfly(nn.Module):
    """A fast linear map `(B P)^depth` of n numbers: butterfly factors after permutations.

    The parameterisation of divide and conquer of Dao, Gu, Eichhorn, Rudra, Ré (2019, arXiv 1903.05895). `B`
    is a product of log2(n) block factors (`factors.multiply`) that are shared by the blocks of a level where
    `tied`; `P` is a permutation of three choices a level, relaxed while it is learned. It applies in O(n log
    n), and is wide enough for the discrete Fourier, cosine and Hadamard transforms at depth 1 and for
    convolutions at depth 2 (`exact`).

    Args:
        n: a power of two, at least 2.
        depth: how many products B P, each with numbers of its own.
        numbers: "real"; "complex"; "real part": complex inside, of which the real part comes out.
        tied: whether the blocks of a level share their numbers.
        permutation: "learned", or a fixed "identity", "bit-reversed" or "cosine" (see `Permutation`).

    `forward`: `[..., n]`, floating or complex (complex only where numbers are complex), to the same shape;
    complex where `numbers` is "complex". Raises ValueError for settings or shapes that do not fit.
    """

    def __init__(
        self,
        n: int,
        *,
        depth: int = 1,
        numbers: str = "real",
        tied: bool = True,
        permutation: str = "learned",
    ) -> None:
        super().__init__()
        levels_of(n)
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be an integer >= 1, got {depth!r}")
        if numbers not in NUMBERS:
            raise ValueError(f"numbers must be one of {', '.join(map(repr, NUMBERS))}, got {numbers!r}")
        self.n, self.depth, self.numbers, self.tied = n, depth, numbers, tied
        dtype = torch.float32 if numbers == "real" else torch.complex64
        self.twiddle = nn.Parameter(random_twiddle(n, tied, dtype, depth))
        make = RelaxedPermutation if permutation == "learned" else lambda n: Permutation.named(permutation, n)
        self.permutations = nn.ModuleList(make(n) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.n,):
            raise ValueError(f"x must be [..., {self.n}], got {list(x.shape)}")
        if x.is_complex() and self.numbers == "real":
            raise ValueError(f"x must be real for numbers='real', got {x.dtype}")
        if self.numbers != "real" and not x.is_complex():
            x = torch.complex(x, torch.zeros_like(x))
        for twiddle, permutation in zip(self.twiddle, self.permutations):
            x = multiply(twiddle, permutation(x), tied=self.tied)
        return x.real if self.numbers == "real part" else x

    def matrix(self) -> Tensor:
        """What the map is as a matrix `[n, n]`: `forward(x) = x @ matrix().T`."""
        real = torch.float64 if self.twiddle.dtype in (torch.float64, torch.complex128) else torch.float32
        return self(torch.eye(self.n, dtype=real, device=self.twiddle.device)).mT

    def harden(self) -> Butterfly:
        """Replace relaxed permutations by the likelier ones, in place; the factors stay as they are."""
        for i, permutation in enumerate(self.permutations):
            if isinstance(permutation, RelaxedPermutation):
                self.permutations[i] = permutation.hard()
        return self

    @property
    def products(self) -> int:
        """Multiplications of a forward pass for one row, complex ones counted once."""
        return self.depth * 2 * self.n * levels_of(self.n)


def exact(name: str, n: int, kernel: Tensor | None = None) -> Butterfly:
    """A Butterfly whose float64 factors are a known transform, all of them orthonormal but "circulant".

    "dft" is `torch.fft.fft(x, norm="ortho")`, "idft" its inverse, "dct" `transforms.dct`, "hadamard"
    `transforms.fwht`; "circulant" is the circular convolution with `kernel [n]`, of depth 2 as Proposition 1
    of the paper has it: the inverse transform after the transform with its last factor scaled.

    Raises ValueError for another name, or a kernel that is missing, of another shape or not asked for.
    """
    if name not in ("dft", "idft", "dct", "hadamard", "circulant"):
        raise ValueError(f"name must be 'dft', 'idft', 'dct', 'hadamard' or 'circulant', got {name!r}")
    shape = None if kernel is None else tuple(kernel.shape)
    if shape != ((n,) if name == "circulant" else None):
        raise ValueError(
            f"kernel must be [{n}] for 'circulant' and is for nothing else, got {shape} for {name!r}"
        )
    if name == "hadamard":
        made = Butterfly(n, permutation="identity").double()
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) * math.sqrt(0.5)
        return _with(made, signs.unsqueeze(2).expand(2, 2, n - 1).unsqueeze(0))
    if name == "dct":
        made = Butterfly(n, numbers="real part", permutation="cosine")
        at = torch.arange(n, dtype=torch.float64)
        weights = torch.full((n,), math.sqrt(2), dtype=torch.float64)
        weights[0] = 1
        return _with(made, _scaled(_fourier(n), torch.polar(weights, -math.pi / (2 * n) * at)).unsqueeze(0))
    if name == "circulant":
        made = Butterfly(n, depth=2, numbers="real part", permutation="bit-reversed")
        spectrum = torch.fft.fft(kernel.to(torch.complex128))  # type: ignore[union-attr]
        return _with(made, torch.stack((_scaled(_fourier(n), spectrum), _fourier(n).conj())))
    made = Butterfly(n, numbers="complex", permutation="bit-reversed")
    return _with(made, (_fourier(n) if name == "dft" else _fourier(n).conj()).unsqueeze(0))


def _with(made: Butterfly, twiddle: Tensor) -> Butterfly:
    made.twiddle = nn.Parameter(twiddle.contiguous().resolve_conj())
    return made


def _fourier(n: int) -> Tensor:
    """Tied factors of the orthonormal transform, complex128 `[2, 2, n - 1]`."""
    levels = []
    for level in range(levels_of(n)):
        h = 1 << level
        angle = -math.pi / h * torch.arange(h, dtype=torch.float64)
        ones, turns = (
            torch.polar(torch.ones_like(angle), 0 * angle),
            torch.polar(torch.ones_like(angle), angle),
        )
        levels.append(torch.stack((torch.stack((ones, turns)), torch.stack((ones, -turns)))))
    return torch.cat(levels, 2) * math.sqrt(0.5)


def _scaled(twiddle: Tensor, weights: Tensor) -> Tensor:
    """The factors of `diag(weights)` times a product: the last one's rows are scaled."""
    n = len(weights)
    top = twiddle[..., n // 2 - 1 :] * weights.view(2, 1, n // 2)
    return torch.cat((twiddle[..., : n // 2 - 1], top), 2)
