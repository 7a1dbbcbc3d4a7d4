"""The exact Fourier transform of points, lines, triangles and tetrahedra, and fields sampled from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tilewise.convolution.spectral.divided import TERMS, divided_exp

HELD = 1 << 20  # phases that are held at once


def simplex_nuft(
    vertices: Tensor,
    simplices: Tensor,
    frequencies: Tensor,
    weights: Tensor | None = None,
    *,
    signed: bool = False,
) -> Tensor:
    """The Fourier transform of a density that is constant on each simplex of a mesh, with no sampling in
    space.

    `F(k) = sum_n weights[n] integral over simplex n of exp(-i k x)`: by Hermite and Genocchi's formula an
    integral is `J! content i^J` times the divided difference of `exp(-i s)` at the phases k x of its corners
    (`divided_exp`), exact to rounding also where phases coincide.

    Args:
        vertices: `[V, D]`, D from 1 to 3; float32 or float64. Differentiable.
        simplices: int64 `[N, J + 1]` of corners, J from 0 (points) to D: lines, triangles, tetrahedra.
        frequencies: `[..., D]` in radians for a unit of length, of the vertices' dtype.
        weights: density of each simplex, `[N]`, or `[N, C]` of C channels; 1 where None. Differentiable.
        signed: count a simplex whose corners run the other way negatively (J must be D). A closed surface,
            each triangle joined to the origin, then is the volume inside it.

    Returns complex `[...]`, or `[..., C]`. Phases are held a million at a time, in training as well (they are
    computed anew for the gradient).

    Raises ValueError or TypeError for shapes, dtypes and corners that do not fit.

    After Jiang, Wang, Huang, Marcus and Niessner, 2019 (arXiv 1901.02070), who sum quotients of phases and
    move coinciding ones by a small amount; here these are the limit. A frequency is an angular one; no period
    is assumed.
    """
    _check(vertices, simplices, frequencies, weights, signed)
    flat = frequencies.reshape(-1, vertices.shape[1])
    columns = torch.ones(len(simplices), 1).to(vertices) if weights is None else weights.to(vertices)
    columns = columns.unsqueeze(1) if columns.ndim == 1 else columns
    corners = vertices[simplices]  # [n, j + 1, d]
    order = simplices.shape[1] - 1
    columns = columns * (_content(corners, signed) * math.factorial(order)).unsqueeze(1)
    size = max(1, HELD // max(1, len(flat) * (order + 1)))
    total = torch.zeros(
        len(flat), columns.shape[1], dtype=vertices.dtype.to_complex(), device=vertices.device
    )
    training = torch.is_grad_enabled() and (vertices.requires_grad or frequencies.requires_grad)
    for start in range(0, len(simplices), size):
        part = corners[start : start + size], columns[start : start + size]
        if training:
            total = total + checkpoint(_transform, flat, *part, use_reentrant=False)
        else:
            total = total + _transform(flat, *part)
    total = total * (1j) ** order
    shape = frequencies.shape[:-1]
    return total.reshape(shape) if weights is None or weights.ndim == 1 else total.reshape(*shape, -1)


def _transform(frequencies: Tensor, corners: Tensor, columns: Tensor) -> Tensor:
    """`[K, C]`: some simplices' share, `corners [N, J + 1, D]` and `columns [N, C]`."""
    phases = torch.einsum("kd,njd->knj", frequencies, corners)
    return divided_exp(phases) @ columns.to(frequencies.dtype.to_complex())


def _content(corners: Tensor, signed: bool) -> Tensor:
    """Length, area or volume of each simplex, 1 of a point: `[N]`."""
    edges = corners[:, 1:] - corners[:, :1]  # [n, j, d]
    order, dim = edges.shape[1:]
    if order == 0:
        return torch.ones_like(corners[:, 0, 0])
    if order == dim:
        volume = edges[:, 0, 0] if dim == 1 else torch.linalg.det(edges)
        return (volume if signed else volume.abs()) / math.factorial(order)
    if order == 1:
        return torch.linalg.vector_norm(edges[:, 0], dim=1)
    return torch.linalg.vector_norm(torch.linalg.cross(edges[:, 0], edges[:, 1]), dim=1) / 2


def _check(
    vertices: Tensor, simplices: Tensor, frequencies: Tensor, weights: Tensor | None, signed: bool
) -> None:
    if not isinstance(vertices, Tensor) or vertices.ndim != 2 or vertices.shape[1] not in (1, 2, 3):
        given = list(vertices.shape) if isinstance(vertices, Tensor) else type(vertices).__name__
        raise ValueError(f"vertices must be [V, D] with D from 1 to 3, got {given}")
    if vertices.dtype not in TERMS:
        raise TypeError(f"vertices must be float32 or float64, got {vertices.dtype}")
    dim = vertices.shape[1]
    if not isinstance(simplices, Tensor) or simplices.ndim != 2 or not 1 <= simplices.shape[1] <= dim + 1:
        given = list(simplices.shape) if isinstance(simplices, Tensor) else type(simplices).__name__
        raise ValueError(f"simplices must be [N, J + 1] with J from 0 to {dim}, got {given}")
    if simplices.dtype != torch.int64:
        raise TypeError(f"simplices must be int64, got {simplices.dtype}")
    if simplices.numel() and not (0 <= int(simplices.min()) and int(simplices.max()) < len(vertices)):
        low, high = int(simplices.min()), int(simplices.max())
        raise ValueError(f"simplices must name vertices 0 to {len(vertices) - 1}, got {low} to {high}")
    if frequencies.shape[-1:] != (dim,) or frequencies.dtype != vertices.dtype:
        raise ValueError(
            f"frequencies must be [..., {dim}] {vertices.dtype}, got {list(frequencies.shape)} {frequencies.dtype}"
        )
    if weights is not None and (weights.ndim not in (1, 2) or len(weights) != len(simplices)):
        raise ValueError(
            f"weights must be [{len(simplices)}] or [{len(simplices)}, C], got {list(weights.shape)}"
        )
    if signed and simplices.shape[1] != dim + 1:
        raise ValueError(
            f"signed needs simplices of {dim + 1} corners in {dim} dimensions, got {simplices.shape[1]}"
        )


class SimplexNUFT(nn.Module):
    """A mesh as a field on a grid, through its exact Fourier coefficients: nothing is rasterised, nothing
    aliases.

    The space repeats with a period; the coefficients of all frequencies that the grid can hold are computed,
    and the field is what they sum to at the grid's points: the mesh's density with all higher frequencies
    left out.

    Args:
        shape: points of the grid in each of D = 1 to 3 dimensions. period: side of the space, from 0 to
            `period`.
        smooth: standard deviation, in grid steps, of a Gaussian that the field is blurred by, against Gibbs'
            ringing.
        signed: as of `simplex_nuft`.

    `forward(vertices [V, D], simplices [N, J + 1], weights=None)` gives the field, `[*shape]` or `[C,
    *shape]`, whose mean over the grid is the mesh's mass over the volume of the space; `spectrum(...)` the
    half of its complex Fourier coefficients that `torch.fft.irfftn(..., norm="forward")` takes, `[*half]` or
    `[C, *half]`.

    Raises ValueError for settings and inputs that do not fit. After Jiang et al., 2019 (arXiv 1901.02070).
    """

    def __init__(
        self, shape: Sequence[int], *, period: float = 1.0, smooth: float = 0.0, signed: bool = False
    ) -> None:
        super().__init__()
        sizes = tuple(shape) if isinstance(shape, (tuple, list, torch.Size)) else ()
        if not 1 <= len(sizes) <= 3 or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(f"shape must be 1 to 3 integers >= 1, got {shape!r}")
        if not period > 0 or not smooth >= 0:
            raise ValueError(f"period must be > 0 and smooth >= 0, got {period} and {smooth}")
        self.shape, self.period, self.smooth, self.signed = sizes, float(period), float(smooth), signed

    def waves(self, like: Tensor) -> Tensor:
        """Whole waves in a period of every coefficient: `[*half, D]`, in the dtype and place of `like`."""
        *outer, last = self.shape
        lines = [torch.fft.fftfreq(n, 1 / n, dtype=like.dtype, device=like.device) for n in outer]
        lines.append(torch.fft.rfftfreq(last, 1 / last, dtype=like.dtype, device=like.device))
        return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)

    def spectrum(self, vertices: Tensor, simplices: Tensor, weights: Tensor | None = None) -> Tensor:
        dim = len(self.shape)
        if not isinstance(vertices, Tensor) or vertices.shape[1:] != (dim,):
            given = list(vertices.shape) if isinstance(vertices, Tensor) else type(vertices).__name__
            raise ValueError(f"vertices must be [V, {dim}] as the grid has {dim} dimensions, got {given}")
        waves = self.waves(vertices)
        turns = waves * (2 * math.pi / self.period)
        found = simplex_nuft(vertices, simplices, turns, weights, signed=self.signed) / self.period**dim
        found = found.movedim(-1, 0) if weights is not None and weights.ndim == 2 else found
        if self.smooth:
            sizes = torch.tensor(self.shape, dtype=waves.dtype, device=waves.device)
            cycles = 2 * math.pi * self.smooth * waves / sizes
            found = found * torch.exp(-0.5 * cycles.square().sum(-1))
        return found

    def forward(self, vertices: Tensor, simplices: Tensor, weights: Tensor | None = None) -> Tensor:
        dims = tuple(range(-len(self.shape), 0))
        found = self.spectrum(vertices, simplices, weights)
        return torch.fft.irfftn(found, s=self.shape, dim=dims, norm="forward")
