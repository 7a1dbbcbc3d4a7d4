"""Decoding with one maximum for all partial softmaxes, and flat products by what was measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.api import bind
from tilewise.attention.plans import Pass, Plan
from tilewise.kernels.attend_tiles import attend, native
from tilewise.tiles import Mask, Partial
from tilewise.tiles.visibility import to_heads

REACH = 60.0  # how far scores may lie from the unified maximum; native_decode.h holds the same number


@dataclass(frozen=True)
class UnifiedMax:
    """A number near the largest scaled score of every query, and between what limits those were found.

    FlashDecoding++ (Hong et al., 2023, arXiv 2311.01282): a softmax may subtract any number from its scores, not
    only their maximum. With one number for all parts of a row, no part waits for another's maximum or is scaled
    afterwards. It must be near enough that nothing overflows; the authors choose it from statistics of a model.

    Differs from the paper: sums are float32, so the reach is 60 on either side (its own limits are narrower, and
    were set for each model), and a part of a row that strays is computed again alone, not the whole row.
    """

    value: float
    lowest: float
    highest: float

    @property
    def fits(self) -> bool:
        """Whether every query that was looked at lies within reach."""
        return self.highest - self.value <= REACH and self.value - self.lowest <= REACH

    @classmethod
    def calibrate(cls, q: Tensor, k: Tensor, *, scale: float | None = None) -> UnifiedMax:
        """Midway between the smallest and the largest row maximum; `q [B, H_q, N_q, D]`, `k [B, H_kv, N_k, D]`.

        Raises ValueError for empty inputs.
        """
        if not q.numel() or not k.numel():
            raise ValueError("q and k must not be empty: there is nothing to calibrate on")
        scale = q.shape[3] ** -0.5 if scale is None else scale
        keys = to_heads(k, q.shape[1]).float().mT
        tops = torch.cat([(scale * some.float() @ keys).amax(-1) for some in q.split(64, 2)], 2)
        lowest, highest = float(tops.min()), float(tops.max())
        return cls((lowest + highest) / 2, lowest, highest)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unified_max: UnifiedMax | float,
    *,
    mask: Mask | Tensor | str | None = "causal",
    scale: float | None = None,
    softcap: float | None = None,
    engine: str = "auto",
    return_lse: bool = False,
) -> Tensor | Partial:
    """Attention of a few queries by partial softmaxes that share a maximum; equals `attend` whatever it is.

    The native engine makes use of it when it decodes (at most 32 queries for each kv head) and computes again the
    parts that lie more than 60 away; other engines take no notice.

    Args, returns and raises as `attend`; `unified_max` in the units of scaled scores.
    """
    value = unified_max.value if isinstance(unified_max, UnifiedMax) else float(unified_max)
    if value != value or abs(value) == float("inf"):
        raise ValueError(f"unified_max must be a finite number, got {value}")
    view, bias, scale = bind(q, k, v, mask, None, scale, softcap)
    (call,) = Plan((Pass(view),), view).calls(q, k, v, bias, scale, softcap, return_lse)
    partial = attend(dataclasses.replace(call, unified_max=value), engine)
    return partial if return_lse else partial.out


@dataclass(frozen=True)
class FlatProducts:
    """Two ways of decoding's flat products, timed by number of queries; `streamed` is up to where loops win.

    FlashDecoding++ finds such inflection points for each shape once and looks them up afterwards.

    Attributes:
        rows: queries of a kv head; loops, products: seconds of each way.
    """

    rows: tuple[int, ...]
    loops: tuple[float, ...]
    products: tuple[float, ...]

    @property
    def streamed(self) -> int:
        """The most queries up to which loops are the faster way throughout; 0 where they never are."""
        last = 0
        for rows, loop, product in zip(self.rows, self.loops, self.products):
            if loop >= product:
                break
            last = rows
        return last


def measure_flat(
    dtype: torch.dtype = torch.float32,
    *,
    head_dim: int = 64,
    keys: int = 16_384,
    rows: Sequence[int] = (1, 2, 3, 4, 6, 8),
    repeats: int = 7,
) -> FlatProducts:
    """Time loops against products on this machine, and let the native engine use what was found from now on.

    Takes about a second. Raises ValueError for a dtype that the engine lacks, and where there is no engine.
    """
    if dtype not in native.STREAMED:
        raise ValueError(f"dtype must be one of {list(map(str, native.STREAMED))}, got {dtype}")
    if reason := native.unavailable():
        raise ValueError(f"there is no native engine to measure: {reason}")
    before = native.STREAMED[dtype]
    k = torch.randn(1, 4, keys, head_dim).to(dtype)
    times: dict[int, list[float]] = {0: [], 8: []}
    try:
        for count in rows:
            q = torch.randn(1, 4 * count, 1, head_dim).to(dtype)
            for streamed, found in times.items():
                native.STREAMED[dtype] = streamed
                found.append(min(_seconds(q, k) for _ in range(repeats)))
    finally:
        native.STREAMED[dtype] = before
    measured = FlatProducts(tuple(rows), tuple(times[8]), tuple(times[0]))
    native.STREAMED[dtype] = measured.streamed
    return measured


def _seconds(q: Tensor, k: Tensor) -> float:
    start = time.perf_counter()
    decode(q, k, k, 0.0, engine="native")
    return time.perf_counter() - start
