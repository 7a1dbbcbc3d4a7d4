"""Lightning attention and TransNormerLLM: the tiled form is the recurrence, in work that does not grow per
token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.test_scan import peak_mib, skip_unless_here
from tests.recurrence import decays
from tilewise.kernels.scan import torch as torch_engine
from tilewise.recurrence import TNL, Lightning, lightning_attention, slopes


def draws(n: int, heads: int = 4, dim: int = 16, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    gen = torch.Generator().manual_seed(n)
    return [torch.randn(2, heads, n, dim, generator=gen, dtype=torch.float64).to(dtype) for _ in range(3)]


def by_steps(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
    """The recurrent form, token by token."""
    state, outs = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[2]):
        state = (-rates).exp().view(-1, 1, 1) * state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(outs, 2)


def with_gradients(run, given: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def test_slopes_are_those_of_alibi_scaled_by_layer():
    torch.testing.assert_close(slopes(8), torch.tensor([2.0**-h for h in range(1, 9)]), rtol=1e-4, atol=0)
    torch.testing.assert_close(slopes(8, 1, 3), slopes(8) * 0.50001 / 1.00001)
    assert (slopes(8, 2, 3) < 1e-5).all()
    uneven = slopes(6)
    torch.testing.assert_close(uneven[:4], slopes(4))
    torch.testing.assert_close(uneven[4:], slopes(8)[[0, 2]])


def test_bad_arguments():
    with pytest.raises(ValueError, match="heads must be an integer >= 1, got 0"):
        slopes(0)
    with pytest.raises(ValueError, match="layer must be from 0 to 1, got 2"):
        slopes(4, 2, 2)
    with pytest.raises(ValueError, match="none is above 0"):
        lightning_attention(*draws(5), -slopes(4))


@pytest.mark.evidence
@pytest.mark.parametrize("n", [1, 64, 65, 150])
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_tiled_forward_and_backward_are_the_recurrence(engine, n):
    """Within twice what the recurrence itself loses in the engine's precision. The control leaves out what passes
    from tile to tile: it is right up to one tile and wrong beyond."""
    skip_unless_here(engine)
    dtype = torch.float32 if engine == "native" else torch.float64
    low = draws(n, dtype=dtype)
    weight = torch.randn(low[2].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    rates = slopes(4).to(dtype)
    exact = with_gradients(
        lambda *x: by_steps(*x, rates.double()), [x.double() for x in low], weight.double()
    )
    naive = with_gradients(lambda *x: by_steps(*x, rates), low, weight)
    tiled = with_gradients(lambda *x: lightning_attention(*x, rates, engine=engine), low, weight)
    half = torch.finfo(dtype).eps / 2 * (16 + 64) ** 0.5  # sums over channels and a tile round by their root
    for got, loop, want in zip(tiled, naive, exact):
        assert error(got, want) <= 2 * max(error(loop, want), half)
    apart = [
        with_gradients(
            lambda *x: lightning_attention(*x, rates, engine=engine),
            [x[:, :, t : t + 64] for x in low],
            weight[:, :, t : t + 64],
        )
        for t in range(0, n, 64)
    ]
    for parts, want in zip(zip(*apart), exact):
        assert (error(torch.cat(parts, 2), want) > 0.1) == (n > 64)


def work_per_token(n: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Multiply-adds of the tiled form, forward and backward, for each of n tokens; counted, not timed."""
    calls = []

    def run(call):
        calls.append(call)
        return torch_engine.forward(call)

    monkeypatch.setattr(torch_engine, "run", run)  # past the custom operator, inside which nothing is counted
    q, k, v = draws(n, dim=64, dtype=torch.float32)
    with FlopCounterMode(display=False) as forward:
        out, state = lightning_attention(q, k, v, slopes(4), engine="torch", return_state=True)
    with FlopCounterMode(display=False) as backward:
        torch_engine.backward(calls[0], out, state.matrix)
    return forward.get_total_flops() / n, backward.get_total_flops() / n


@pytest.mark.evidence
def test_work_per_token_does_not_grow_with_length(monkeypatch):
    """Control: softmax attention, counted the same way, does eight times the work per token at eight times the
    length."""
    lengths = (256, 512, 2048)
    counted = [work_per_token(n, monkeypatch) for n in lengths]
    for forward, backward in counted:
        assert 0 < forward < backward
        assert (forward, backward) == counted[0]
    soft = []
    for n in lengths:
        q, k, v = draws(n, dim=64, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            F.scaled_dot_product_attention(q[:1], k[:1], v[:1])
        soft.append(counter.get_total_flops() / n)
    assert soft[1] == 2 * soft[0] and soft[2] == 8 * soft[0]


@pytest.mark.evidence
@pytest.mark.slow
def test_memory_per_token_does_not_grow_with_length():
    """Peak of a training step beyond its inputs; the N x N scores of one head alone would need far more."""
    skip_unless_here("native")
    short, long = peak_mib("native", 16_384), peak_mib("native", 65_536)
    row = 64 * 4 / 2**20
    assert long < 4 * short + 32, f"{short:.0f} MiB and {long:.0f} MiB"
    assert long < 65_536 * 12 * row + 96 < 65_536**2 * 4 / 2**20 / 10


@pytest.mark.evidence
def test_decoding_keeps_a_state_of_one_size():
    """Token by token it is the whole, and what is carried does not grow."""
    torch.manual_seed(0)
    model = TNL(32, 32, 3, heads=2).double().eval()
    tokens = torch.randint(32, (1, 70))
    whole, _ = model(tokens)
    states, made, sizes = None, [], set()
    for t in range(70):
        logits, states = model(tokens[:, t : t + 1], states)
        made.append(logits)
        sizes.add(sum(state.bytes for state in states))
    torch.testing.assert_close(torch.cat(made, 1), whole, rtol=1e-9, atol=1e-10)
    assert len(sizes) == 1


@pytest.mark.evidence
def test_trained_with_decays_it_models_text_better_than_without():
    """Same size, data and steps; both far below the 7 bits of a guess. Further, decays are what does it: without
    them the trained model is worse at once."""
    found = {name: decays.bits_per_byte(decays.load(name)) for name in ("tnl", "tnl-no-decay")}
    assert found["tnl"] < found["tnl-no-decay"] - 0.3 and found["tnl"] < 3.7, found
    model = decays.load("tnl")
    for block in model.blocks:
        block.mixer.slopes.zero_()
    assert decays.bits_per_byte(model) > found["tnl"] + 0.5


@pytest.mark.evidence
def test_the_block_is_that_of_the_formula():
    """One layer written out with the N x N decay matrix, angles and all."""
    torch.manual_seed(0)
    made = Lightning(16, heads=2, layer=0, layers=3, lrpe=True).double()
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    q, k, v = (
        (x @ part.weight.T).view(1, 40, 2, 8).transpose(1, 2) for part in (made.query, made.key, made.value)
    )
    apart = torch.arange(40).view(-1, 1) - torch.arange(40)
    angles = (made.lrpe.theta.unsqueeze(-2) * apart.unsqueeze(-1)).cos()  # [h, t, s, d]
    scores = torch.einsum("bhtd,bhsd,htsd->bhts", F.silu(q), F.silu(k), angles) / math.sqrt(16)
    decay = (-slopes(2, 0, 3).double().view(2, 1, 1) * apart).exp().tril()
    out = ((scores * decay) @ v).transpose(1, 2).reshape(1, 40, 16)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5)
    want = (out * (x @ made.gate.weight.T)) @ made.out.weight.T
    torch.testing.assert_close(made(x)[0], want, rtol=1e-9, atol=1e-10)
    channel = TNL(8, 16, 2, heads=2).double().blocks[1].channel
    torch.testing.assert_close(
        channel(x), (x @ channel.gate.weight.T * (x @ channel.up.weight.T)) @ channel.down.weight.T
    )
