"""`tilewise.recurrence.scan`: normalisers, exponential gates, padding, packing, states, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.kernels import EngineRefused
from tilewise.recurrence import State, empty_state, explain, scan

B, H, N, D = 2, 3, 70, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    return draw(B, H, n, D), F.normalize(draw(B, H, n, D, seed=1), dim=-1), draw(B, H, n, D + 2, seed=2)


def weighted(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sums over earlier tokens with `exp(log_weight [B, H, N, N])`, of values and of ones: quadratic, and no
    scan."""
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    mixed = scale * (q @ k.mT) * log_weight.masked_fill(~later, -torch.inf).exp()
    return mixed @ v, mixed.sum(-1, keepdim=True)


def passed(decay: Tensor) -> Tensor:
    """Log decay from token s to token t, `[..., t, s]`."""
    total = decay.cumsum(-1)
    return total.unsqueeze(-1) - total.unsqueeze(-2)


@pytest.mark.parametrize("engine", ["auto", "torch", "definition"])
@pytest.mark.parametrize("decayed", [False, True])
def test_divided_by_the_sum_of_weights(engine, decayed):
    """Linear attention: with positive features, a mean of the values."""
    q, k, v = qkv()
    q, k = F.elu(q) + 1, F.elu(k) + 1
    decay = -draw(B, H, N, seed=3).abs() if decayed else None
    log_weight = passed(decay) if decay is not None else torch.zeros(N, N, dtype=torch.float64)
    sums, ones = weighted(q, k, v, log_weight, 1.0)
    got = scan(q, k, v, decay=decay, normalize="sum", engine=engine)
    torch.testing.assert_close(got, sums / ones)
    assert (got <= v.cummax(2).values + 1e-9).all(), "a mean lies between its values"


def mlstm_formula(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, log_beta: Tensor) -> Tensor:
    """xLSTM's matrix memory, quadratic and without any maximum: only for gates that exp can take."""
    sums, ones = weighted(q, k, v, passed(decay) + log_beta.unsqueeze(2), D**-0.5)
    return sums / ones.abs().clamp(min=1)


def gates(n: int = N, size: float = 1.0) -> tuple[Tensor, Tensor]:
    return F.logsigmoid(2 + draw(B, H, n, seed=4)), size * draw(B, H, n, seed=5)


@pytest.mark.parametrize("size", [0.1, 1.0, 8.0])
def test_exponential_gates_and_bounded_sums(size):
    """mLSTM, with gradients of both gates."""
    given = [x.requires_grad_() for x in (*qkv(), *gates(size=size))]
    want = mlstm_formula(*given)
    got = scan(*given[:3], decay=given[3], log_beta=given[4], normalize="bounded")
    torch.testing.assert_close(got, want)
    weight = draw(*want.shape, seed=6)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), given), torch.autograd.grad((want * weight).sum(), given)
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_gates_beyond_what_exp_can_hold():
    """The state is kept divided by the largest gate so far; the formula itself is no number there."""
    q, k, v = (x.float() for x in qkv())
    decay, log_beta = (x.float() for x in gates(size=60.0))
    got, state = scan(q, k, v, decay=decay, log_beta=log_beta, normalize="bounded", return_state=True)
    assert not mlstm_formula(q, k, v, decay, log_beta).isfinite().all(), "float32 cannot hold it"
    assert state.matrix.isfinite().all()
    want = mlstm_formula(*(x.double() for x in (q, k, v, decay, log_beta)))
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalize", [None, "sum", "bounded"])
def test_exponential_gates_split_anywhere(normalize):
    (q, k, v), (decay, log_beta) = qkv(), gates(size=5.0)
    q, k = q.abs(), k.abs()
    whole, last = scan(q, k, v, decay=decay, log_beta=log_beta, normalize=normalize, return_state=True)
    state, parts = None, []
    for start, end in itertools.pairwise([0, 1, 2, 40, 40, 69, N]):
        part = slice(start, end)
        out, state = scan(
            *(x[:, :, part] for x in (q, k, v)), decay=decay[:, :, part], log_beta=log_beta[:, :, part],
            normalize=normalize, state=state, return_state=True,
        )  # fmt: skip
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state.peak, last.peak)
    torch.testing.assert_close(state.matrix, last.matrix)


def test_without_a_normaliser_gates_keep_their_size():
    (q, k, v), (decay, log_beta) = qkv(), gates()
    got = scan(q, k, v, decay=decay, log_beta=log_beta)
    torch.testing.assert_close(got, scan(q, k, v, decay=decay, beta=log_beta.exp()))


@pytest.mark.parametrize("packed", [False, True])
def test_exponential_gates_with_padding_or_packed(packed):
    (q, k, v), (decay, log_beta) = qkv(), gates(size=5.0)
    options: dict[str, Any] = {"normalize": "bounded", "return_state": True}
    borders = [0, 0, 13, 13, 40, N, N]
    if packed:
        one = [x[:1] for x in (q, k, v, decay, log_beta)]
        got, state = scan(
            *one[:3], decay=one[3], log_beta=one[4], cu_seqlens=torch.tensor(borders), **options
        )
        again, _ = scan(
            *one[:3], decay=one[3], log_beta=one[4], cu_seqlens=torch.tensor(borders), state=state, **options
        )
        for i, (start, end) in enumerate(itertools.pairwise(borders)):
            own = [x[:, :, start:end] for x in one]
            want, last = scan(*own[:3], decay=own[3], log_beta=own[4], **options)
            torch.testing.assert_close(got[:, :, start:end], want)
            torch.testing.assert_close(state.peak[i : i + 1], last.peak)
            twice = [torch.cat((x, x), 2) for x in own]
            both, _ = scan(*twice[:3], decay=twice[3], log_beta=twice[4], **options)
            torch.testing.assert_close(again[:, :, start:end], both[:, :, end - start :])
        return
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, :9] = mask[1, 50:] = False
    got, state = scan(q, k, v, decay=decay, log_beta=log_beta, mask=mask, **options)
    for row in range(B):
        own = [x[row : row + 1, :, mask[row]] for x in (q, k, v, decay, log_beta)]
        want, last = scan(*own[:3], decay=own[3], log_beta=own[4], **options)
        torch.testing.assert_close(got[row : row + 1, :, mask[row]], want)
        torch.testing.assert_close(state.matrix[row : row + 1], last.matrix)


@pytest.mark.parametrize("rule", ["add", "delta"])
@pytest.mark.parametrize("kind", [None, "head", "step", "channel"])
def test_padding_holds_anything(rule, kind):
    q, k, v = qkv()
    shape = {"head": (H,), "step": (B, H, N), "channel": (B, 1, N, D)}.get(kind)
    decay = None if shape is None else -draw(*shape, seed=3).abs()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, :30] = mask[1, 61:] = False
    found = []
    for rubbish in (0.0, float("inf"), float("nan")):
        filled = [x.masked_fill(~mask.view(B, 1, N, 1), rubbish) for x in (q, k, v)]
        found.append(scan(*filled, decay=decay, rule=rule, mask=mask, return_state=True))
        assert (found[-1][0].transpose(1, 2)[~mask] == 0).all()
    assert all(torch.equal(a, found[0][0]) and torch.equal(s.matrix, found[0][1].matrix) for a, s in found)


def test_one_decay_for_a_head_is_one_for_every_step():
    q, k, v = qkv()
    decay = -draw(H, seed=3).abs()
    spread = decay.view(1, H, 1).expand(B, H, N)
    assert torch.equal(scan(q, k, v, decay=decay), scan(q, k, v, decay=spread))
    assert torch.equal(scan(q, k, v, decay=spread[:1]), scan(q, k, v, decay=spread))
    leaf = decay.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scan(q, k, v, decay=leaf).sum(), leaf)
    step = 1e-6
    for h in range(H):
        moved = [
            scan(q, k, v, decay=decay + sign * step * F.one_hot(torch.tensor(h), H)).sum() for sign in (1, -1)
        ]
        torch.testing.assert_close(gradient[h], (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_layouts():
    q, k, v = qkv()
    want = scan(q, k, v, rule="delta")
    got = scan(*(x.transpose(1, 2) for x in (q, k, v)), rule="delta", layout="bnhd")
    assert torch.equal(got.transpose(1, 2), want)


def test_grouped_queries_read_their_own_state():
    q, k, v = qkv()
    q = torch.cat((q, draw(B, H, N, D, seed=9)), 2).view(B, 2 * H, N, D)
    want = scan(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), normalize="bounded")
    torch.testing.assert_close(scan(q, k, v, normalize="bounded"), want)


def test_states_move_detach_and_say_their_size():
    q, k, v = (x.float().requires_grad_() for x in qkv())
    _, state = scan(q, k, v, log_beta=k.sum(3), normalize="sum", return_state=True)
    assert state.matrix.requires_grad and not state.detach().matrix.requires_grad
    assert state.bytes == 4 * B * H * (D * (D + 2) + D + 1)
    assert state.to(torch.float64).sums.dtype == torch.float64
    swapped = state.select(torch.tensor([1, 0, 1]))
    assert torch.equal(swapped.matrix[0], state.matrix[1]) and swapped.peak.shape == (3, H)


def test_an_empty_state_is_no_state():
    (q, k, v), (decay, log_beta) = (x.float() for x in qkv()), (x.float() for x in gates())
    for options in ({}, {"rule": "delta"}, {"normalize": "sum"}):
        empty = empty_state(
            B, H, D, D + 2, rule=options.get("rule", "add"), normalize=options.get("normalize")
        )
        assert torch.equal(scan(q, k, v, state=empty, **options), scan(q, k, v, **options))
    empty = empty_state(B, H, D, D + 2, normalize="bounded", gated=True)
    options = {"decay": decay, "log_beta": log_beta, "normalize": "bounded"}
    assert torch.equal(scan(q, k, v, state=empty, **options), scan(q, k, v, **options))


def test_explain_names_engines():
    q, k, v = (x.float() for x in qkv())
    choice = explain(q, k, v, rule="delta", beta=torch.rand(B, H, N))
    assert choice.engine in ("native", "torch") and "definition" in choice.refused
    with pytest.raises(TypeError, match="takes the arguments of scan, got causal"):
        explain(q, k, v, causal=True)


@pytest.mark.parametrize("rule", ["add", "delta"])
def test_compiles_whole_with_everything_on(rule):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    mask_of = {n: torch.arange(n).expand(B, n) > 3 for n in (60, 70, 90, 131)}

    def run(q, k, v, decay, gate, mask):
        extra = {"beta": gate} if rule == "delta" else {"log_beta": gate, "normalize": "bounded"}
        return scan(q, k, v, decay=decay, rule=rule, mask=mask, engine="torch", **extra)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for n, mask in mask_of.items():
        decay, gate = gates(n)
        given = (*qkv(n), decay, gate.sigmoid() if rule == "delta" else gate, mask)
        torch.testing.assert_close(compiled(*given), run(*given))
    # Doublings of the running maximum are unrolled: a graph for every power of two.
    assert counter.frame_count <= (2 if rule == "delta" else 4)


WRONG = {
    "rows": ({"k": draw(B, H, N - 1, D)}, ValueError, "do not fit"),
    "channels": ({"q": draw(B, H, N, D + 1)}, ValueError, "do not fit"),
    "heads": ({"q": draw(B, H + 1, N, D)}, ValueError, "multiple of those of k, got 4 and 3"),
    "shape of q": ({"q": draw(H, N, D)}, ValueError, r"q must be \[B, H, N, D\]"),
    "dtype": ({"v": draw(B, H, N, D).float()}, TypeError, "one floating dtype"),
    "integers": ({"q": torch.ones(B, H, N, D, dtype=torch.int64)}, TypeError, "one floating dtype"),
    "growing": (
        {"decay": torch.full((H,), 0.1, dtype=torch.float64)},
        ValueError,
        "none is above 0; got values up to 0.1",
    ),
    "no number": ({"decay": torch.full((H,), float("nan"))}, ValueError, "none is above 0"),
    "decay": ({"decay": -torch.ones(H, N)}, ValueError, r"decay must be \[3\], \[2\|1, 3\|1, 70\]"),
    "heads of decay": ({"decay": -torch.ones(1)}, ValueError, r"decay must be \[3\]"),
    "decay of tokens": ({"decay": -torch.ones(B, H, N + 1)}, ValueError, "decay must be"),
    "kind of decay": (
        {"decay": torch.zeros(H, dtype=torch.int64)},
        TypeError,
        "decay must be a floating tensor",
    ),
    "large beta": (
        {"rule": "delta", "beta": torch.full((B, H, N), 2.5)},
        ValueError,
        r"lies in \[0, 2\].*to 2.5",
    ),
    "small beta": ({"rule": "delta", "beta": torch.full((B, H, N), -0.1)}, ValueError, r"lies in \[0, 2\]"),
    "beta": ({"beta": torch.ones(B, N)}, ValueError, r"beta must be \[2\|1, 3\|1, 70\]"),
    "two betas": ({"beta": torch.ones(B, H, N), "log_beta": torch.ones(B, H, N)}, ValueError, "not both"),
    "gates by channel": (
        {"log_beta": torch.ones(B, H, N), "decay": -torch.ones(B, H, N, D)},
        ValueError,
        "not per channel",
    ),
    "rule": ({"rule": "hebb"}, ValueError, "rule must be one of 'add', 'delta', got 'hebb'"),
    "normalize": ({"normalize": "softmax"}, ValueError, "normalize must be one of"),
    "delta normalised": ({"rule": "delta", "normalize": "sum"}, ValueError, "no weighted sum"),
    "layout": ({"layout": "nbhd"}, ValueError, "layout must be"),
    "chunk": ({"chunk": 0}, ValueError, "chunk must be None or an integer >= 1, got 0"),
    "half a chunk": ({"chunk": 0.5}, ValueError, "chunk must be"),
    "mask": ({"mask": torch.ones(B, N)}, TypeError, "boolean tensor"),
    "shape of mask": ({"mask": torch.ones(N, dtype=torch.bool)}, ValueError, r"mask must be \[2, 70\]"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, N])}, ValueError, "batch of one, got 2"),
    "engine": ({"engine": "fast"}, ValueError, "engine must be"),
    "native in float64": ({"engine": "native"}, EngineRefused, "float64"),
    "no state": ({"state": torch.zeros(B, H, D, D)}, TypeError, "State of an earlier call, got Tensor"),
    "rule of state": (
        {"rule": "delta", "state": empty_state(B, H, D, D + 2)},
        ValueError,
        "made by rule 'add'",
    ),
    "shape of state": (
        {"state": empty_state(B, H, D, D)},
        ValueError,
        r"must be \[2, 3, 8, 10\], got \[2, 3, 8, 8\]",
    ),
    "sums of state": (
        {"normalize": "sum", "state": empty_state(B, H, D, D + 2)},
        ValueError,
        "without normalize",
    ),
    "peak of state": (
        {"log_beta": torch.ones(B, H, N), "state": empty_state(B, H, D, D + 2)},
        ValueError,
        "without log_beta",
    ),
}


@pytest.mark.parametrize(
    ("given", "error", "says"), WRONG.values(), ids=[name.replace(" ", "-") for name in WRONG]
)
def test_refuses(given, error, says):
    q, k, v = qkv()
    arguments = {"q": q, "k": k, "v": v} | given
    with pytest.raises(error, match=says):
        scan(**arguments)


@pytest.mark.parametrize("offsets", [[0, N - 1], [1, N], [0, 40, 30, N], [0, N + 1], []])
def test_offsets_that_do_not_sum(offsets):
    q, k, v = (x[:1] for x in qkv())
    with pytest.raises(ValueError, match="cu_seqlens must"):
        scan(q, k, v, cu_seqlens=torch.tensor(offsets, dtype=torch.int64))
    with pytest.raises(TypeError, match="integer tensor"):
        scan(q, k, v, cu_seqlens=torch.tensor([0.0, N]))
    with pytest.raises(ValueError, match="not both"):
        scan(q, k, v, cu_seqlens=torch.tensor([0, N]), mask=torch.ones(1, N, dtype=torch.bool))


def test_a_refused_call_changes_nothing():
    q, k, v = qkv()
    _, state = scan(q, k, v, return_state=True)
    kept = state.matrix.clone()
    with pytest.raises(ValueError):
        scan(q, k, v, state=state, decay=torch.ones(H, dtype=torch.float64))
    assert torch.equal(state.matrix, kept)
    scan(q, k, v, state=state)
    assert torch.equal(state.matrix, kept), "nor does a call that runs"
    assert isinstance(state, State)
