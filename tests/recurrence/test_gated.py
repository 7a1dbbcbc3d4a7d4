"""gated_rnn as a function: layouts, states, engines by name, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tilewise.kernels import EngineRefused
from tilewise.recurrence import GatedState, explain_gated, gated_rnn
from tilewise.recurrence.gated import GATES

every_cell = pytest.mark.parametrize("cell", GATES)


def drawn(cell: str = "lstm", b: int = 2, n: int = 11, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    gates = GATES[cell]
    return [torch.randn(s).to(dtype) for s in ((b, 3, n, gates, 6), (3, gates, 6, 6), (3, gates, 6))]


@every_cell
def test_layouts_are_views_of_the_same(cell):
    x, weights, bias = drawn(cell)
    want, state = gated_rnn(x, weights, bias, cell=cell, return_state=True)
    got, after = gated_rnn(x.transpose(1, 2), weights, bias, cell=cell, layout="bnhd", return_state=True)
    assert torch.equal(got.transpose(1, 2), want) and torch.equal(after.parts, state.parts)
    assert state.parts.shape[2] == {"elman": 1, "gru": 1, "lstm": 2, "slstm": 4}[cell]


@every_cell
def test_states_are_handed_on(cell):
    """As a whole, detached, for some of the sequences, and through gradients."""
    x, weights, bias = drawn(cell)
    want, last = gated_rnn(x, weights, bias, cell=cell, return_state=True)
    _, state = gated_rnn(x[:, :, :5], weights, bias, cell=cell, return_state=True)
    got, after = gated_rnn(x[:, :, 5:], weights, bias, cell=cell, state=state, return_state=True)
    torch.testing.assert_close(got, want[:, :, 5:])
    torch.testing.assert_close(after.parts, last.parts)
    one = gated_rnn(x[1:, :, 5:], weights, bias, cell=cell, state=state.select(torch.tensor([1])).detach())
    torch.testing.assert_close(one, want[1:, :, 5:])
    assert state.bytes == state.parts.numel() * 8


@every_cell
def test_the_gradient_passes_the_state(cell):
    x, weights, bias = drawn(cell)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    gated_rnn(leaves[0], weights, bias, cell=cell)[:, :, -1].sum().backward()
    _, state = gated_rnn(leaves[1][:, :, :5], weights, bias, cell=cell, return_state=True)
    gated_rnn(leaves[1][:, :, 5:], weights, bias, cell=cell, state=state)[:, :, -1].sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    assert leaves[0].grad[:, :, 0].any()


def test_slstm_with_large_gates_is_finite_and_exact():
    """Input gates of up to 600, whose exponentials no format holds; a loop with a running maximum says the
    same."""
    x, weights, bias = drawn("slstm", n=60)
    x[:, :, :, 0] *= 200
    out = gated_rnn(x, weights, bias, cell="slstm")
    assert out.isfinite().all() and out.abs().max() <= 1
    low = [part.float() for part in (x, weights, bias)]
    want = gated_rnn(*(part.double() for part in low), cell="slstm")
    naive = gated_rnn(*low, cell="slstm", engine="definition")
    got = gated_rnn(*low, cell="slstm")
    assert (got - want).norm() <= 2 * (naive - want).norm()


def test_engines_by_name():
    x, weights, bias = drawn()
    assert explain_gated(x, weights, bias).engine == "torch"
    assert explain_gated(x, weights, bias, engine="definition").engine == "definition"
    assert "computes in float32" in explain_gated(x, weights, cell="lstm", layout="bhnd").refused["native"]
    with pytest.raises(EngineRefused, match="'native' cannot run this call: computes in float32"):
        gated_rnn(x, weights, bias, engine="native")
    with pytest.raises(ValueError, match="engine must be 'auto' or one of"):
        gated_rnn(x, weights, bias, engine="cuda")
    with pytest.raises(TypeError, match="takes the arguments of gated_rnn, got heads"):
        explain_gated(x, weights, heads=3)


def test_packed_sequences_begin_anew():
    x, weights, bias = drawn(b=1, n=9)
    out, state = gated_rnn(
        x, weights, bias, cu_seqlens=torch.tensor([0, 4, 4, 9], dtype=torch.int32), return_state=True
    )
    torch.testing.assert_close(out[:, :, 4:], gated_rnn(x[:, :, 4:], weights, bias))
    assert state.parts.shape[0] == 3 and not state.parts[1].any()


def test_what_is_refused():
    x, weights, bias = drawn()
    state = gated_rnn(x, weights, bias, return_state=True)[1]
    cases = [
        (ValueError, r"x must be \[B, H, N, 4, D\]", lambda: gated_rnn(x[:, 0], weights)),
        (ValueError, r"x must be \[B, H, N, 3, D\]", lambda: gated_rnn(x, weights, cell="gru")),
        (ValueError, r"x must be .* at least one head", lambda: gated_rnn(x[:, :0], weights[:0])),
        (ValueError, r"weights must be \[3, 4, 6, 6\]", lambda: gated_rnn(x, weights[:2])),
        (ValueError, r"bias must be \[3, 4, 6\]", lambda: gated_rnn(x, weights, bias[..., :5])),
        (TypeError, "weights must be a tensor, got list", lambda: gated_rnn(x, [1])),
        (TypeError, "share one floating dtype", lambda: gated_rnn(x, weights.float())),
        (TypeError, "share one floating dtype", lambda: gated_rnn(x.long(), weights.long())),
        (ValueError, "cell must be one of 'elman', 'lstm'", lambda: gated_rnn(x, weights, cell="LSTM")),
        (ValueError, "layout must be 'bhnd' or 'bnhd'", lambda: gated_rnn(x, weights, layout="nbhd")),
        (TypeError, "must be None or the GatedState", lambda: gated_rnn(x, weights, state=state.parts)),
        (ValueError, r"parts must be \[2, 3, 2, 6\]", lambda: gated_rnn(x, weights, state=_half(state))),
        (
            ValueError,
            "made by cell 'slstm', the call has",
            lambda: gated_rnn(x, weights, state=_other(state)),
        ),
        (TypeError, "mask must be a boolean tensor", lambda: gated_rnn(x, weights, mask=torch.ones(2, 11))),
        (ValueError, r"mask must be \[2, 11\]", lambda: gated_rnn(x, weights, mask=x[..., 0, 0] > 0)),
        (ValueError, "batch of one", lambda: gated_rnn(x, weights, cu_seqlens=torch.tensor([0, 11]))),
    ]
    for kind, message, run in cases:
        with pytest.raises(kind, match=message):
            run()


def _half(state: GatedState) -> GatedState:
    return GatedState(state.parts[:1], state.cell)


def _other(state: GatedState) -> GatedState:
    return GatedState(state.parts, "slstm")
