"""The poison of conftest.py is in force, also in what torch.compile traces."""

from __future__ import annotations

import torch


def test_fresh_memory_is_nan() -> None:
    x = torch.ones(3)
    fresh = [torch.empty(3), torch.empty_like(x), torch.empty_strided((3,), (1,)), x.new_empty(3)]
    assert all(memory.isnan().all() for memory in fresh)
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64


def test_poison_can_be_traced() -> None:
    def half_written(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[:2] = x[:2]
        return out

    out = torch.compile(half_written, backend="aot_eager", fullgraph=True)(torch.ones(3))
    assert out[:2].eq(1).all()
    assert out[2].isnan()
