"""TensorAttention: attention of third and higher order, exact or by a polynomial, with the error it is held to."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.tensor import polynomial, streamed
from tilewise.attention.tensor.call import Call
from tilewise.attention.tensor.monomials import count
from tilewise.attention.tensor.series import HIGHEST, SERIES, Series, lowest_degree
from tilewise.tiles import Mask, Partial

FEATURES = 1 << 20  # more monomials than this are not tried


@dataclass(frozen=True)
class Expansion:
    """What a call by polynomial does, and what it is proven to keep to.

    Attributes:
        series: the polynomial. features: its monomials, binomial(D + degree, degree).
        dtype: what it is computed in.
        error: the output, before it is rounded to the inputs' dtype, is off by at most this times the largest
            |v1| times the largest |v2|. The polynomial's part is proven, rounding's is an allowance.
        multiply_adds, exact_multiply_adds: of the matrix products, this way and the exact way, all heads, no mask.
    """

    series: Series
    features: int
    dtype: torch.dtype
    error: float
    multiply_adds: int
    exact_multiply_adds: int


@dataclass(frozen=True)
class TensorAttention:
    """Softmax attention over pairs, or longer tuples, of keys (Alman and Song, 2023, arXiv 2310.04064).

    Every query i weighs every pair of keys (j, l) by exp(scale * sum over d of q[i, d] k1[j, d] k2[l, d]) and
    reads the elementwise products v1[j] * v2[l]: what depends on three tokens at once, which no sum over single
    keys sees.

    Exact (degree and error None): N^3 work, streamed, in memory like ordinary attention. By a polynomial of the
    scores: work N * binomial(D + degree, degree), near-linear in N while scores, and so the degree, are small. For
    entries up to B scores reach B^3 (B^m for order m) with the scale 1 / D, hence the paper's bound on entries,
    o(log(N)^(1/3)); beyond it no method is much faster than N^3 (under SETH).

    Args:
        degree: of the polynomial, whatever its error, which must be proven below 1.
        error: how far outputs may be off, as a share of max |v1| max |v2|. Takes the lowest degree proven to
            suffice, and the exact way when no degree is or it costs more. Not together with `degree`.
        bound: a promise that no entry of queries and keys is larger than this, which is checked; scores are then
            within |scale| D bound^m. None measures what scores are possible from the entries, over the whole batch.
            Needed under a causal mask: a degree measured from all keys would tell early queries about later ones.
        series: "chebyshev", or "taylor" for comparison (about 2^degree times less accurate).
        scale: factor of the scores; None is 1 / D, the paper's (not 1 / sqrt(D), as in `attend`).
        tile: tokens per tile of the exact way: queries, then each sequence of keys. None chooses.

    Differs from the paper: degrees come from a computed bound for a given polynomial, not from an asymptotic one;
    monomials are counted once each (binomial(D + g, g), below the paper's); the measured bound on scores may be far
    below B^3; causal and padding masks, lengths that differ between sequences, and grouped heads are ours.
    """

    degree: int | None = None
    error: float | None = None
    bound: float | None = None
    series: str = "chebyshev"
    scale: float | None = None
    tile: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.degree is not None and self.error is not None:
            raise ValueError("give degree or error, not both: an error chooses its degree")
        if self.degree is not None and (not isinstance(self.degree, int) or not 0 <= self.degree <= HIGHEST):
            raise ValueError(f"degree must be None or an integer in 0..{HIGHEST}, got {self.degree!r}")
        if self.error is not None and not 0 < self.error < math.inf:
            raise ValueError(f"error must be None or > 0, got {self.error!r}")
        if self.bound is not None and not 0 <= self.bound < math.inf:
            raise ValueError(f"bound must be None or a number >= 0, got {self.bound!r}")
        if self.series not in SERIES:
            raise ValueError(f"series must be one of {SERIES}, got {self.series!r}")
        if self.tile is not None and not all(isinstance(size, int) and size >= 1 for size in self.tile):
            raise ValueError(f"tile must be None or integers >= 1, got {self.tile!r}")

    def __call__(
        self,
        q: Tensor,
        k1: Tensor,
        k2: Tensor,
        v1: Tensor,
        v2: Tensor,
        *,
        mask: Mask | Tensor | str | None = None,
        return_lse: bool = False,
    ) -> Tensor | Partial:
        """Third-order attention; see `attend` for shapes, masks and errors."""
        return self.attend(q, (k1, k2), (v1, v2), mask=mask, return_lse=return_lse)

    def attend(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        mask: Mask | Tensor | str | None = None,
        return_lse: bool = False,
    ) -> Tensor | Partial:
        """Attention of order m = len(keys) + 1 over all tuples of one key from each sequence.

        Args:
            q: `[B, H_q, N_q, D]`, float16, bfloat16, float32 or float64, any strides.
            keys: m - 1 tensors `[B, H_kv, N_t, D]`, lengths N_t of their own; values: as many,
                `[B, H_kv, N_t, D_v]`. H_q is a multiple of H_kv.
            mask: as in `tilewise.attend` without additive ones, bound to each sequence of keys: a tuple is
                visible where each of its keys is. By polynomial: None, "causal", and others under which queries
                see growing prefixes; padding.
            return_lse: also return the log of each row's sum of exponentials (of polynomials).

        Returns:
            `[B, H_q, N_q, D_v]` in q's dtype, or `Partial(out, lse)`, lse float32 (float64 for float64). Partials
            over disjoint sets of tuples can be merged. A query that sees no tuple gets 0, -inf and gradient 0.

        Raises:
            ValueError, TypeError: arguments that do not fit each other; an entry above `bound`; a degree that
                proves nothing; a mask the polynomial cannot take.
        """
        call = Call.bind(q, keys, values, mask, self.scale)
        self._check_tile(call)
        made = self._expansion(call)
        if made is None:
            result = streamed.attend(call, self.tile)
        else:
            result = polynomial.attend(call, made.series.coefficients(), made.dtype)
            result = result._replace(lse=result.lse.to(call.wide))
        return result if return_lse else result.out

    def expansion(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        mask: Mask | Tensor | str | None = None,
    ) -> Expansion | None:
        """What `attend` would do with these arguments: its polynomial and proof, or None for the exact way."""
        return self._expansion(Call.bind(q, keys, values, mask, self.scale))

    def _expansion(self, call: Call) -> Expansion | None:
        if self.degree is None and self.error is None:
            return None
        radius = self._radius(call)
        dim, d_v = call.q.shape[3], call.values[0].shape[3]
        found = self._by_error(call, radius) if self.degree is None else self._by_degree(call, radius)
        if found is None:
            return None
        made, dtype = found
        features = count(dim, made.degree)
        if features > FEATURES:
            if self.degree is None:
                return None
            raise ValueError(
                f"degree {made.degree} needs {features} monomials of {dim} dimensions, at most {FEATURES} are done"
            )
        lengths = call.q.shape[2], tuple(k.shape[2] for k in call.keys)
        heads = call.q.shape[0] * call.q.shape[1]
        work = heads * polynomial.multiply_adds(*lengths, dim, d_v, made.degree)
        exact = heads * streamed.multiply_adds(*lengths, dim, d_v)
        if self.degree is None and work > exact:
            return None
        return Expansion(made, features, dtype, made.error(dtype), work, exact)

    def _by_error(self, call: Call, radius: float) -> tuple[Series, torch.dtype] | None:
        """The lowest degree that keeps to `error`; in float64 where rounding in float32 would raise it."""
        error = self.error or math.inf
        degree = lowest_degree(radius, error, self.series, torch.float64)
        if degree is None:
            return None
        narrow = lowest_degree(radius, error, self.series, call.wide) == degree
        return Series(self.series, radius, degree), call.wide if narrow else torch.float64

    def _by_degree(self, call: Call, radius: float) -> tuple[Series, torch.dtype]:
        """The given degree; in float64 where rounding in float32 would be off by more than the polynomial is."""
        made = Series(self.series, radius, self.degree or 0)
        if made.error(torch.float64) == math.inf:
            raise ValueError(_too_low(made.degree, radius, self.series))
        narrow = made.rounding(call.wide) <= made.relative_error
        return made, call.wide if narrow else torch.float64

    def _radius(self, call: Call) -> float:
        spans = polynomial.prefixes(call)
        if self.bound is None:
            if spans is not None:
                raise ValueError(
                    "bound is needed under a mask that hides keys from some queries: measured from all keys, the"
                    " polynomial would tell early queries about later ones"
                )
            return polynomial.radius(call)
        top = polynomial.largest_entry(call)
        # An entry equal to the bound may have been rounded up to its dtype.
        bound = max(self.bound, float(torch.tensor(self.bound, dtype=call.q.dtype)))
        if top > bound:
            raise ValueError(f"bound is {self.bound}, but there is an entry of size {top:.4g} in q or keys")
        return abs(call.scale) * call.q.shape[3] * bound**call.order

    def _check_tile(self, call: Call) -> None:
        if self.tile is not None and len(self.tile) != call.order:
            raise ValueError(
                f"tile must have {call.order} sizes, queries and each sequence of keys, got {self.tile}"
            )


def _too_low(degree: int, radius: float, kind: str) -> str:
    enough = lowest_degree(radius, sys.float_info.max, kind)
    hint = (
        "no degree does: use the exact form" if enough is None else f"the lowest degree that does is {enough}"
    )
    return f"degree {degree} proves nothing for scores up to {radius:.4g}, weights could be negative; {hint}"


def tensor_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    degree: int | None = None,
    error: float | None = None,
    bound: float | None = None,
    series: str = "chebyshev",
    scale: float | None = None,
    mask: Mask | Tensor | str | None = None,
    return_lse: bool = False,
) -> Tensor | Partial:
    """Third-order attention, `TensorAttention(degree, error, bound, series, scale)(q, k1, k2, v1, v2)`.

    Exact unless a `degree` or an `error` is given. See `TensorAttention` for the settings and its `attend` for
    shapes, masks, what is returned and what is raised.
    """
    method = TensorAttention(degree=degree, error=error, bound=bound, series=series, scale=scale)
    return method(q, k1, k2, v1, v2, mask=mask, return_lse=return_lse)
