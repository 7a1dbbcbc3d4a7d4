"""Sums of digits: every engine gives the definition's points, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tilewise.kernels import EngineRefused
from tilewise.kernels.digit_sums import ENGINES, Call, digit_sums, explain, op
from tilewise.kernels.digit_sums import torch as torch_engine

FAST = ["torch", "native"]
DTYPES = [torch.int64, torch.float64, torch.float32]
SIZES = [0, 1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 1000, 1025]


def make(n=33, d=3, copies=1, shared=False, start=0, add=False, dtype=torch.float64, m=14) -> Call:
    columns = torch.randint(1 << 52, (1 if shared else copies, d, m))
    return Call(columns, torch.randint(1 << 52, (copies, d)), start, n, add, dtype)


def check(call: Call, engine: str) -> None:
    want, got = digit_sums(call, "definition"), digit_sums(call, engine)
    assert got.dtype == call.dtype and got.shape == call.shape and torch.equal(got, want)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_sizes(engine, add, dtype, n):
    check(make(n, add=add, dtype=dtype), engine)
    check(make(n, add=add, dtype=dtype, start=777), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("d", [1, 2, 7, 32, 129, 20_000])
@pytest.mark.parametrize(("copies", "shared"), [(1, False), (3, False), (3, True)])
def test_dimensions_and_copies(engine, add, d, copies, shared):
    check(make(40, d, copies, shared, start=11, add=add), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("add", [False, True])
def test_many_blocks(engine, add, monkeypatch):
    """More points than a table or a thread's share holds, and none of the ends on a block's."""
    monkeypatch.setattr(torch_engine, "BLOCK", 64)
    check(make(2001, 3, 2, start=5, add=add), engine)
    monkeypatch.undo()
    check(make((1 << 17) - 77, 16, start=33, add=add, m=18), engine)


@pytest.mark.parametrize("engine", FAST)
def test_all_of_the_columns_are_used_and_no_more(engine):
    check(make(1 << 5, m=5), engine)
    check(make(1, start=(1 << 5) - 1, m=5), engine)
    check(make(1, m=0), engine)


@pytest.mark.parametrize("engine", FAST)
def test_strides(engine):
    call = make(50, 4, 2)
    columns = torch.randint(1 << 52, (14, 8, 4)).permute(2, 1, 0)[::2, ::2]
    shift = torch.randint(1 << 52, (4, 4)).T[:2]
    check(Call(columns, shift, 3, 50, False, call.dtype), engine)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(make(60_000, 9, add=True, m=16), "native")
    finally:
        torch.set_num_threads(before)


def test_points_stay_below_one():
    columns = torch.full((1, 1, 3), (1 << 52) - 1)
    for dtype in (torch.float64, torch.float32):
        for engine in ENGINES:
            got = digit_sums(Call(columns, torch.zeros(1, 1).long(), 0, 8, False, dtype), engine)
            assert got.max() == 1 - 2.0 ** (-52 if dtype == torch.float64 else -24)


def test_the_definition_is_not_taken_by_itself():
    assert explain(make()).engine == "native" or "native" in explain(make()).refused
    with pytest.raises(ValueError, match="engine must be 'auto' or one of"):
        digit_sums(make(), "cuda")
    meta = make()
    meta = Call(meta.columns.to("meta"), meta.shift.to("meta"), 0, 4, False, torch.float64)
    with pytest.raises(EngineRefused, match="runs on CPUs"):
        digit_sums(meta, "native")


@pytest.mark.parametrize("engine", FAST)
def test_the_operator_is_whole_for_the_compiler(engine):
    call = make(20, 3, 2)
    given = (call.columns, call.shift, 3, 20, True, torch.float64, engine)
    torch.library.opcheck(torch.ops.tilewise.digit_sums, given)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda columns, shift: op.run(Call(columns, shift, 3, 20, True, torch.float64), engine),
        fullgraph=True,
        backend=counter,
    )
    assert torch.equal(compiled(call.columns, call.shift), torch.ops.tilewise.digit_sums(*given))
    assert counter.frame_count == 1
