"""Wavelet packets of signals and images: every band is split again, and the way back is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EXTENSIONS = {"symmetric": "reflect", "periodic": "circular"}  # and what `F.pad` calls them
# Rows up to this long are split by one matrix product if there are many. Sixteen crops of 96 x 96 took 36 ms and 33
# back for three levels on one core, and 68 and 176 as convolutions of single channels.
DENSE = 256


@dataclass(frozen=True)
class Filters:
    """A pair of symmetric low-pass filters of odd length that invert each other, as taps from end to end.

    The high-pass filters are these with the sign of every other tap turned: that of the analysis is made of
    `synthesis`, that of the synthesis of `analysis`. Whether they do invert each other is theirs to see to.

    Raises ValueError for filters of even length or without symmetry.
    """

    analysis: tuple[float, ...]
    synthesis: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, taps in (("analysis", self.analysis), ("synthesis", self.synthesis)):
            if len(taps) % 2 == 0 or tuple(taps) != tuple(reversed(taps)):
                raise ValueError(f"{name} must be an odd number of taps, symmetric, got {taps!r}")

    @property
    def reach(self) -> int:
        """How far the longest of the four reaches from its place."""
        return max(len(self.analysis) // 2, len(self.synthesis) // 2 + 1)


def _cdf97() -> Filters:
    """The filters of Cohen, Daubechies and Feauveau (1992) with four vanishing moments each, scaled to sqrt(2).

    With y = sin^2(w / 2), the half-band filter is cos^8(w / 2) (1 + 4 y + 10 y^2 + 20 y^3). Each gets half of
    the cosines; the analysis gets the two complex roots of the polynomial and the synthesis the real one.
    """
    root = -0.34  # Newton's steps from near the root; six reach the last digit
    for _ in range(8):
        root -= (1 + root * (4 + root * (10 + 20 * root))) / (4 + root * (20 + 60 * root))
    # 20 y^3 + 10 y^2 + 4 y + 1 = 20 (y - root) (y^2 + a y + b), and b = -1 / (20 root)
    a, b = 0.5 + root, -1 / (20 * root)
    cosines = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]  # cos^4(w / 2)
    y = [-1 / 4, 1 / 2, -1 / 4]
    y2 = _product(y, y)
    pair = [at2 / b + at1 * a / b + at0 for at2, at1, at0 in zip(y2, [0, *y, 0], [0, 0, 1, 0, 0])]
    single = [-at1 / root + at0 for at1, at0 in zip(y, [0, 1, 0])]
    return Filters(*(_even(_product(cosines, part)) for part in (pair, single)))


def _product(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Of two polynomials."""
    made = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            made[i + j] += x * y
    return made


def _even(taps: list[float]) -> tuple[float, ...]:
    """With the two halves equal to the last bit, and the scale sqrt(2)."""
    return tuple((x + y) / math.sqrt(2) for x, y in zip(taps, reversed(taps)))


CDF97 = _cdf97()


def wavelet_packet(
    x: Tensor, levels: int, *, dims: int = 2, extension: str = "symmetric", filters: Filters = CDF97
) -> Tensor:
    """The full wavelet packet transform: at each level every band is split in two along every axis.

    Args:
        x: `[B, C, N]` for `dims=1`, `[B, C, H, W]` for `dims=2`, float32 or float64; N, H and W multiples of
            2 ** levels.
        levels: at least 0.
        extension: what lies beyond the ends, "symmetric" (mirrored at the last sample) or "periodic".
        filters: of the two-band split, by default CDF 9/7, those of lossy JPEG 2000.

    Returns `[B, C * 2 ** (dims * levels), N / 2 ** levels, ...]`, as many numbers as x has, in x's dtype. Of an
    image a channel's bands stand together; a split makes of a band the low one, that high along the width, that
    high along the height and that high along both. Low bands of natural signals grow by sqrt(2) per axis and
    level: the filters are nearly orthonormal.

    Raises ValueError or TypeError for arguments that do not fit, and names the nearest sizes that do.
    """
    x = _checked("x", x, dims, levels, extension, 2**levels if isinstance(levels, int) and levels > 0 else 1)
    for _ in range(levels):
        for axis in range(2, 2 + dims):
            x = _along(x, axis, lambda rows: _split(rows, filters, extension))
    return x


def inverse_wavelet_packet(
    bands: Tensor, levels: int, *, dims: int = 2, extension: str = "symmetric", filters: Filters = CDF97
) -> Tensor:
    """What `wavelet_packet` with the same settings made `bands` of.

    Exact but for rounding if the filters invert each other, as CDF 9/7 do. Raises as `wavelet_packet` does, and
    for channels that are no multiple of 2 ** (dims * levels).
    """
    bands = _checked("bands", bands, dims, levels, extension, 1)
    if bands.shape[1] % 2 ** (dims * levels):
        raise ValueError(
            f"bands must have a multiple of 2 ** (dims * levels) = {2 ** (dims * levels)} channels, got"
            f" {bands.shape[1]}"
        )
    for _ in range(levels):
        for axis in reversed(range(2, 2 + dims)):
            bands = _along(bands, axis, lambda rows: _join(rows, filters, extension), joins=True)
    return bands


def _checked(name: str, x: Tensor, dims: int, levels: int, extension: str, multiple: int) -> Tensor:
    if dims not in (1, 2):
        raise ValueError(f"dims must be 1 or 2, got {dims!r}")
    if not isinstance(levels, int) or isinstance(levels, bool) or levels < 0:
        raise ValueError(f"levels must be an integer >= 0, got {levels!r}")
    if extension not in EXTENSIONS:
        raise ValueError(f"extension must be one of {', '.join(map(repr, EXTENSIONS))}, got {extension!r}")
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 2 + dims:
        raise ValueError(f"{name} must be [B, C, {'N' if dims == 1 else 'H, W'}], got shape {list(x.shape)}")
    for size in x.shape[2:]:
        if size % multiple:
            below = size // multiple * multiple
            raise ValueError(
                f"sizes of {name} must be multiples of 2 ** levels = {multiple}, got {list(x.shape[2:])}; the"
                f" nearest to {size} are {below} and {below + multiple}"
            )
    return x


def _along(x: Tensor, axis: int, step: Callable[[Tensor], Tensor], joins: bool = False) -> Tensor:
    """`step` along one axis: rows `[R, n]` to bands `[R, 2, n / 2]`, or with `joins` back.

    The two bands stand side by side as channels, so that a channel's bands stay together.
    """
    moved = x.movedim(axis, -1)
    if joins:
        moved = moved.unflatten(1, (moved.shape[1] // 2, 2)).movedim(2, -2)  # [b, c, ..., 2, n]
        lead = moved.shape[:-2]
        made = step(moved.flatten(0, -3)).unflatten(0, lead)
    else:
        made = step(moved.flatten(0, -2)).unflatten(0, moved.shape[:-1])
        made = made.movedim(-2, 2).flatten(1, 2)
    return made.movedim(-1, axis)


def _extended(rows: Tensor, reach: int, extension: str) -> Tensor:
    """`[R, C, n]` with `reach` samples more at either end; n is even, so at least 2."""
    n = rows.shape[2]
    if n > reach:
        return F.pad(rows, (reach, reach), EXTENSIONS[extension])
    at = torch.arange(-reach, n + reach, device=rows.device)
    if extension == "periodic":
        return rows[:, :, at % n]
    at = at % (2 * n - 2)
    return rows[:, :, torch.minimum(at, 2 * n - 2 - at)]


def _split(rows: Tensor, filters: Filters, extension: str) -> Tensor:
    """`[R, n]` to the low and the high band, `[R, 2, n / 2]`; low samples stand at even places, high at odd."""
    count, n = rows.shape
    if count > n and n <= DENSE:
        matrix = _split(torch.eye(n, dtype=rows.dtype, device=rows.device), filters, extension).flatten(1)
        return (rows @ matrix).unflatten(1, (2, n // 2))
    reach = filters.reach
    low = _placed(filters.analysis, reach, 0, rows)
    high = _placed(_turned(filters.synthesis), reach, 1, rows)
    if not rows.numel():
        return rows.new_zeros(rows.shape[0], 2, rows.shape[1] // 2)
    return F.conv1d(
        _extended(rows.unsqueeze(1), reach, extension), torch.stack((low, high)).unsqueeze(1), stride=2
    )


def _join(bands: Tensor, filters: Filters, extension: str) -> Tensor:
    """`[R, 2, n / 2]` to `[R, n]`."""
    count, _, half = bands.shape
    if count > 2 * half and 2 * half <= DENSE:
        every = torch.eye(2 * half, dtype=bands.dtype, device=bands.device).unflatten(1, (2, half))
        return bands.flatten(1) @ _join(every, filters, extension)
    reach = filters.reach
    if not bands.numel():
        return bands.new_zeros(count, 2 * half)
    spread = bands.new_zeros(count, 2, half, 2)  # low at even places, high at odd, zeros between
    spread[:, 0, :, 0], spread[:, 1, :, 1] = bands[:, 0], bands[:, 1]
    taps = (_placed(part, reach, 0, bands) for part in (filters.synthesis, _turned(filters.analysis)))
    return F.conv1d(_extended(spread.flatten(2), reach, extension), torch.stack(tuple(taps)).unsqueeze(0))[
        :, 0
    ]


def _turned(taps: tuple[float, ...]) -> tuple[float, ...]:
    """With the sign of every other tap turned, the middle one's kept."""
    middle = len(taps) // 2
    return tuple(x if (k - middle) % 2 == 0 else -x for k, x in enumerate(taps))


def _placed(taps: tuple[float, ...], reach: int, at: int, like: Tensor) -> Tensor:
    """The taps around place `at` of a window from -reach to reach."""
    before = reach + at - len(taps) // 2
    after = 2 * reach + 1 - before - len(taps)
    return F.pad(torch.tensor(taps, dtype=like.dtype, device=like.device), (before, after))
