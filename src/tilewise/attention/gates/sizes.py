"""Checks of sizes that gates share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def positive(**values: Any) -> None:
    """Raise ValueError, by name, for a value that is no integer >= 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_sizes(gate: Any, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless `q [B, H_q, N, D]`, `k [B, H_kv, N, D]` have the gate's heads and head_dim."""
    want = (gate.heads, gate.kv_heads, gate.head_dim)
    have = (q.shape[1], k.shape[1], q.shape[3])
    if have != want:
        raise ValueError(
            f"this {type(gate).__name__} is for {want[0]} query heads, {want[1]} kv heads and head_dim {want[2]};"
            f" the call has {have[0]}, {have[1]} and {have[2]}"
        )
