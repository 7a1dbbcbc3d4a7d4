"""Tiled Flash Linear Attention: chunks of any size bound what is kept, tiles within them bound the work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.test_scan import peak_mib, skip_unless_here
from tests.recurrence import decays
from tilewise.kernels.scan import Call
from tilewise.kernels.scan import torch as torch_engine
from tilewise.recurrence import MLSTMSig, scan

CHUNKS = (64, 128, 256, 512, 1024, 2048)


def drawn(n: int, dtype: torch.dtype, dim: int = 16) -> list[Tensor]:
    """q, k, v and the logs of forget gates and the input gates of an mLSTM."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, dim, generator=gen, dtype=torch.float64) for _ in range(3))
    forget, write = (torch.randn(1, 2, n, generator=gen, dtype=torch.float64) for _ in range(2))
    return [x.to(dtype) for x in (q, k, v, F.logsigmoid(forget + 4), (write - 2).sigmoid())]


def run(given: list[Tensor], engine: str, chunk: int | None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    q, k, v, forget, write = leaves
    out = scan(q, k, v, decay=forget, beta=write, chunk=chunk, engine=engine)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_chunks_of_any_size_give_the_same(engine):
    """Outputs and gradients of a sigmoid-gated mLSTM, within twice the recurrence's own error in float32."""
    skip_unless_here(engine)
    low = drawn(600, torch.float32)
    exact = run([x.double() for x in low], "definition", None)
    naive = run(low, "definition", None)
    half = torch.finfo(torch.float32).eps / 2 * (16 + 64) ** 0.5
    for chunk in CHUNKS:
        for got, loop, want in zip(run(low, engine, chunk), naive, exact):
            size = want.norm()
            error, own = ((x.double() - want).norm() / size for x in (got, loop))
            assert error <= 2 * max(float(own), half), chunk


@pytest.mark.evidence
@pytest.mark.slow
def test_states_kept_fall_with_the_chunk():
    """A training step over 65,536 tokens: what it holds beyond a step with chunks of 4,096 is the states, one of
    16 KiB for each chunk."""
    skip_unless_here("native")
    n, state = 65_536, 64 * 64 * 4 / 2**20
    least = peak_mib("native", n, 4096)
    for chunk in (64, 128, 256):
        kept = state * (n / chunk - n / 4096)
        assert 0.6 * kept - 2 < peak_mib("native", n, chunk) - least < 1.4 * kept + 2, chunk


def one_level(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor, chunk: int) -> Tensor:
    """The chunkwise form without tiles inside of chunks: scores of all pairs of a chunk at once."""
    state, outs = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for t in range(0, q.shape[2], chunk):
        own = slice(t, t + chunk)
        sums = forget[:, :, own].cumsum(2)
        apart = (sums.unsqueeze(3) - sums.unsqueeze(2)).tril().exp().tril()
        u = v[:, :, own] * write[:, :, own].unsqueeze(3)
        outs.append(
            ((q[:, :, own] @ k[:, :, own].mT) * apart) @ u + (q[:, :, own] * sums.exp().unsqueeze(3)) @ state
        )
        after = (sums[:, :, -1:] - sums).exp().unsqueeze(3)
        state = sums[:, :, -1].exp()[..., None, None] * state + (k[:, :, own] * after).mT @ u
    return torch.cat(outs, 2) * q.shape[3] ** -0.5


@pytest.mark.evidence
def test_work_per_token_does_not_grow_with_the_chunk():
    """Products counted, forward and backward. Control: with one level of chunks the same result costs ever more."""
    q, k, v, forget, write = drawn(2048, torch.float32, dim=32)
    tiled, single = [], []
    for chunk in (64, 256, 2048):
        call = Call(q, k, v, forget, write, scale=32**-0.5, chunk=chunk)
        with FlopCounterMode(display=False) as counter:
            out, after = torch_engine.forward(call)
            torch_engine.backward(call, out, after)
        tiled.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            same = one_level(q, k, v, forget, write, chunk)
        single.append(counter.get_total_flops())
        torch.testing.assert_close(out, same, rtol=1e-3, atol=1e-4)
    assert tiled[0] == tiled[1] == tiled[2] > 0
    assert single[2] > 4 * single[1] > 8 * single[0] * 0.9, single


@pytest.mark.evidence
def test_sigmoid_gates_need_neither_normaliser_nor_maximum():
    """The layer is its formula, and its state is smaller than that of the exponential gates by what they need."""
    torch.manual_seed(0)
    made, x = MLSTMSig(16, heads=2, input_bias=-1.0).double(), torch.randn(1, 40, 16, dtype=torch.float64)
    with torch.no_grad():
        for gate in (made.input, made.forget):
            gate.weight.normal_()
    q, k, v = (x @ part.weight.T for part in (made.query, made.key, made.value))
    write, forget = (gate(x).sigmoid()[0] for gate in (made.input, made.forget))
    state, rows = torch.zeros(2, 4, 8, dtype=torch.float64), []
    for t in range(40):
        pair = k[0, t].view(2, 4, 1) * v[0, t].view(2, 1, 8)
        state = forget[t].view(2, 1, 1) * state + write[t].view(2, 1, 1) * pair
        read = (q[0, t].view(2, 1, 4) @ state).view(2, 8) / 2
        rows.append((read * torch.rsqrt(read.square().mean(-1, keepdim=True) + 1e-5)).view(16))
    want = (torch.stack(rows) * (x[0] @ made.gate.weight.T).sigmoid()) @ made.out.weight.T
    out, after = made(x)
    torch.testing.assert_close(out[0], want, rtol=1e-9, atol=1e-10)
    assert after.scan.sums is None and after.scan.peak is None
    exponential = decays.MLSTMExp(16, heads=2).double()(x)[1]
    assert exponential.scan.sums is not None and exponential.bytes > after.bytes


@pytest.mark.evidence
def test_trained_it_models_text_as_well_as_with_exponential_gates():
    """Same size, data and steps. The control without gates is far worse, so the comparison can tell."""
    found = {name: decays.bits_per_byte(decays.load(f"mlstm-{name}")) for name in ("sig", "exp", "ungated")}
    assert found["sig"] < found["exp"] + 0.03, found
    assert found["ungated"] > found["sig"] + 0.3, found
