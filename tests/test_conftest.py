"""The poison of conftest.py is in force, also in what torch.compile traces; tests of time are marked."""

from __future__ import annotations

import ast
from pathlib import Path

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


def test_what_compares_times_runs_alone() -> None:
    found = 0
    for path in Path(__file__).parent.rglob("test_*.py"):
        for test in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(test, ast.FunctionDef)
                and "least_times(" in ast.unparse(test)
                and path != Path(__file__)
            ):
                assert "pytest.mark.timed" in map(ast.unparse, test.decorator_list), f"{path}: {test.name}"
                found += 1
    assert found > 10
