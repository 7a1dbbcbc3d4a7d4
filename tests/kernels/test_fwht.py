"""The Walsh-Hadamard transform: blocks, every engine against the definition, and the definition against its entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.conformance.common import over_budget
from tests.conformance.test_memory import allocations
from tilewise.kernels import EngineRefused
from tilewise.kernels.fwht import ENGINES, Call, explain, fwht, op, orders

FAST = ["torch", "native"]
POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
OTHERS = [3, 5, 12, 15, 20, 24, 28, 36, 40, 52, 96, 100, 107, 127, 129, 172, 344, 1000, 1025, 1536]
HADAMARD = [12, 20, 24, 28, 36, 44, 48, 52, 60, 68, 72, 76, 80, 84, 100, 104, 108, 148, 344]


def make(rows: int = 3, n: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows, exactly representable in `dtype`."""
    return torch.randn(rows, n).to(dtype)


def both(x: Tensor, engine: str, scale: float | None = None) -> dict[str, Tensor]:
    """The result, and the gradient of x for a random one."""
    scale = x.shape[1] ** -0.5 if scale is None else scale
    leaf = x.detach().requires_grad_()
    out = fwht(Call(leaf, scale), engine)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    (gradient,) = torch.autograd.grad(out, leaf, weights)
    return {"out": out.detach(), "d_x": gradient}


def check(x: Tensor, engine: str, scale: float | None = None) -> None:
    """Errors of at most twice those of the definition in x's own format, against float64."""
    want = both(x.double(), "definition", scale)
    plain, got = both(x, "definition", scale), both(x, engine, scale)
    for name, right in want.items():
        assert got[name].shape == right.shape and got[name].dtype == x.dtype, name
        reason = over_budget(got[name], plain[name], right) if right.numel() else None
        assert reason is None, f"{name}: {reason}"


@pytest.mark.parametrize("order", HADAMARD)
def test_blocks_are_symmetric_hadamard_matrices(order):
    block = orders.block(order, "hadamard")
    assert block.shape == (order, order) and bool((block.abs() == 1).all()) and torch.equal(block, block.T)
    assert torch.equal(block @ block, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 7, 107])
def test_hartley_blocks_are_orthogonal(order):
    block = orders.block(order, "hartley")
    assert torch.equal(block, block.T)
    torch.testing.assert_close(block @ block, order * torch.eye(order, dtype=torch.float64))


def test_no_hadamard_block_where_paley_has_none():
    """92 = 91 + 1 = 2 (45 + 1), and neither 91 nor 45 is a power of a prime."""
    assert [orders.paley(n) for n in (12, 20, 36, 92, 14, 13)] == [1, 1, 2, 0, 0, 0]
    with pytest.raises(ValueError, match="order must be one of a Paley matrix"):
        orders.block(92, "hadamard")


@pytest.mark.parametrize(
    ("n", "want"),
    [
        (1, (1, 1, "none")),
        (4096, (1, 4096, "none")),
        (96, (12, 8, "hadamard")),
        (1536, (12, 128, "hadamard")),
        (14336, (28, 512, "hadamard")),
        (11008, (344, 32, "hadamard")),
        (13696, (107, 128, "hartley")),
        (92, (23, 4, "hartley")),
        (15, (15, 1, "hartley")),
    ],
)
def test_factors(n, want):
    made = orders.factors(n)
    assert made is not None and (made.order, made.power, made.kind) == want


def test_sizes_without_factors_have_neighbours_that_do():
    assert orders.factors(1031) is None and orders.nearest(1031) == [1030, 1032]
    assert orders.nearest(96) == [96]


@pytest.mark.parametrize("n", [1, 2, 16, 64, 12, 15, 96])
def test_definition_is_its_entries(n):
    """The matrix made of popcounts and blocks; a matrix in another order would differ."""
    made = orders.factors(n)
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(made.power)] for i in range(made.power)]
    matrix = torch.kron(orders.block(made.order, made.kind), torch.tensor(signs, dtype=torch.float64))
    x = make(4, n, torch.float64)
    torch.testing.assert_close(fwht(Call(x, 0.5), "definition"), 0.5 * x @ matrix)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("n", POWERS + OTHERS)
def test_sizes(engine, n):
    check(make(3, n), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [2, 8, 64, 512, 4096, 12, 15, 96, 1536])
def test_other_formats(engine, dtype, n):
    """In few bits the definition rounds at every level; an engine rounds once."""
    check(make(5, n, dtype), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 31, 33, 127, 129])
@pytest.mark.parametrize("n", [4, 64, 12])
def test_numbers_of_rows(engine, rows, n):
    check(make(rows, n), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("n", [1 << 16, 1 << 17, 1 << 19])
def test_long_rows(engine, n):
    """So long that threads share a row."""
    check(make(1, n), engine, scale=1.0)


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("n", [256, 1 << 13, 1 << 17])
def test_any_number_of_threads(rows, n):
    x = make(rows if n < 1 << 17 else 1, n)
    had = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fwht(Call(x, 1.0), "native"))
    finally:
        torch.set_num_threads(had)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("n", [8, 96, 256])
def test_strides(engine, n):
    """Columns of a matrix, a slice of wider rows, every second number, an expanded row, storage with an offset."""
    for x in (
        make(n, 5).T,
        make(5, 3 * n)[:, n : 2 * n],
        make(5, 2 * n)[:, ::2],
        make(1, n).expand(5, n),
        make(7, n)[2:],
    ):
        check(x, engine)


@pytest.mark.parametrize("engine", FAST)
def test_inputs_are_left_alone(engine):
    for n in (1, 64, 96):
        x = make(4, n)
        before = x.clone()
        out = fwht(Call(x, 1.0), engine)
        out.zero_()
        assert torch.equal(x, before)


def test_a_small_mistake_is_over_budget(monkeypatch):
    right = ENGINES["torch"].run

    class Wrong:
        refuse = staticmethod(lambda call: None)
        run = staticmethod(lambda call: right(Call(call.x, call.scale * (1 + 1e-6))))

    monkeypatch.setattr("tilewise.kernels.fwht.ENGINES", {**ENGINES, "wrong": Wrong})
    with pytest.raises(AssertionError, match="out: error"):
        check(make(3, 512), "wrong")


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("n", [8, 12, 15])
def test_gradcheck(engine, n):
    x = make(2, n, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fwht(Call(x, 0.3), engine), x)
    assert torch.autograd.gradgradcheck(lambda x: fwht(Call(x, 0.3), engine), x)


@pytest.mark.parametrize("engine", FAST)
def test_operator_registrations(engine, monkeypatch):
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which the checks would trace
    for n in (16, 96):
        torch.library.opcheck(torch.ops.tilewise.fwht.default, (make(3, n).requires_grad_(), 0.5, engine))


@pytest.mark.parametrize("engine", ["auto", *FAST])
@pytest.mark.parametrize("n", [64, 96])
def test_compiled_whole_with_few_recompilations(engine, n, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: fwht(Call(x, 0.5), engine), fullgraph=True, backend=counter)
    for rows in (4, 5, 7, 8, 16, 33, 64, 65, 100, 128):
        x = make(rows, n)
        assert torch.equal(compiled(x), fwht(Call(x, 0.5), engine))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("n", [1 << 14, 1536])
def test_no_matrix_of_the_transform(engine, n):
    x = make(2, n)
    largest, _ = allocations(lambda: fwht(Call(x, 1.0), engine))
    assert largest <= 2 * x.nbytes


def test_engines_that_cannot_run_say_so():
    call = Call(make(2, 8, torch.float64).to(torch.complex128), 1.0)
    assert "computes in float32 and float64" in explain(call).refused["native"] and explain(call).engine == "torch"
    with pytest.raises(EngineRefused, match="engine 'native' cannot run this call"):
        fwht(call, "native")
    assert set(op.IMPLEMENTATIONS) == set(ENGINES) - {"definition"}
