"""Which frequencies of a kernel count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FrequencySparsity:
    """Frequencies that are left out of a circular convolution (FlashFFTConv, Fu et al., 2023, arXiv
    2311.05908).

    The paper lays the N frequencies of a kernel out as a matrix and leaves blocks of it out of both
    transforms. Of frequency `f = r + rows * c`, r is the row and c the column here. The kernel's other
    frequencies count as 0, for real outputs f and N - f alike; the convolution is else what it was.

    Args:
        rows: of the matrix, a divisor of N. kept: those that count; with r also `(rows - r) % rows`.
        band: the share of the lowest frequencies that count: `min(f, N - f) <= band * N / 2`, in (0, 1].

    Rows save time on every engine but `torch`; a band leaves columns out, which saves time on engine
    `monarch` alone: a radix-4 transform costs nearly as much with a part of its last outputs.

    Differs from the paper in that rows and columns are those of the discrete Fourier transform itself, not of
    the order a GPU kernel holds it in, and that real outputs stay real by construction. Raises ValueError for
    rows and bands that do not fit.
    """

    rows: int = 1
    kept: tuple[int, ...] = (0,)
    band: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 1:
            raise ValueError(f"rows must be an integer >= 1, got {self.rows!r}")
        kept = tuple(self.kept)
        own = set(kept)
        if not own or len(own) != len(kept) or not own <= set(range(self.rows)):
            raise ValueError(f"kept must be different rows below {self.rows}, at least one, got {kept!r}")
        lone = sorted(r for r in own if -r % self.rows not in own)
        if lone:
            raise ValueError(
                f"kept must hold with each row r also {self.rows} - r, or outputs would not be real; row"
                f" {lone[0]} is alone in {kept!r}"
            )
        if not 0 < self.band <= 1:
            raise ValueError(f"band must lie in (0, 1], got {self.band!r}")
        object.__setattr__(self, "kept", tuple(sorted(kept)))

    def density(self, n: int) -> float:
        """The share of n frequencies that count."""
        f = range(n)
        own = set(self.kept)
        highest = int(self.band * n / 2)
        return sum(k % self.rows in own and min(k, n - k) <= highest for k in f) / max(1, n)
