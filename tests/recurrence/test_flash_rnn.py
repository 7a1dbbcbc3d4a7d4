"""FlashRNN: cells that track states where linear recurrences cannot, one fused loop, heads as diagonal
blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.clock import least_times
from tests.recurrence.recalled import trained
from tilewise.data.state_tracking import parity, permutations
from tilewise.recurrence import FlashRNN, SequenceModel, gated_rnn
from tilewise.recurrence.gated import GATES

every_cell = pytest.mark.parametrize("cell", GATES)
TRAINED = 40  # symbols of the longest word that training/train_state_tracking.py shows


@torch.no_grad()
def right_beyond(
    model: SequenceModel, task: Callable[..., tuple[Tensor, Tensor]], length: int = 256
) -> float:
    """The share of states found right after more symbols than were trained."""
    words, states = task(64, length, seed=1)
    found = model(words)[0].argmax(-1) == states
    return found[:, TRAINED:].double().mean().item()


def without_recurrence(model: SequenceModel) -> SequenceModel:
    """Its cells no longer read their own output."""
    for block in model.blocks:
        nn.init.zeros_(block.mixer.weights)
    return model


@pytest.mark.evidence
def test_parity_is_tracked_far_beyond_what_was_trained():
    """Words of 256 bits, trained on 40. Linear attention and gated linear attention, with twice the layers,
    guess; so does sLSTM trained without its recurrent weights."""
    names = ("slstm", "lstm", "gru", "linear", "gla", "cut")
    found = {name: right_beyond(trained(f"parity-{name}"), parity) for name in names}
    assert min(found[name] for name in names[:3]) > 0.99, found
    assert max(found[name] for name in names[3:]) < 0.6, found


@pytest.mark.evidence
@pytest.mark.parametrize("cell", ["slstm", "lstm", "gru"])
def test_the_recurrent_weights_do_the_tracking(cell):
    """The same trained model with them set to zero guesses."""
    found = right_beyond(without_recurrence(trained(f"parity-{cell}")), parity)
    assert found < 0.6, found


@pytest.mark.evidence
def test_permutations_are_tracked_far_beyond_what_was_trained():
    """Six states of three things, where the order of the symbols counts; a guess is right in 17 of 100."""
    found = {name: right_beyond(trained(f"permutations-{name}"), permutations) for name in ("slstm", "gla")}
    assert found["slstm"] > 0.95, found
    assert found["gla"] < 0.4, found


def drawn(
    cell: str, n: int = 40, heads: int = 3, d: int = 8, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x `[2, H, n, G, D]`, weights and biases."""
    generator, gates = torch.Generator().manual_seed(0), GATES[cell]
    shapes = (2, heads, n, gates, d), (heads, gates, d, d), (heads, gates, d)
    x, weights, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [part.to(dtype) for part in (x, weights * d**-0.5, bias)]


def stepped(cell: str, x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """A loop over tokens and heads, of torch.nn's cells; sLSTM as it is defined, without a running
    maximum."""
    kinds = {"elman": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
    d, outs = x.shape[4], []
    for head in range(x.shape[1]):
        h, rows = x.new_zeros(x.shape[0], d), []
        c, n = torch.zeros_like(h), torch.zeros_like(h)
        made = dict.fromkeys(("weight_ih", "bias_ih", "weight_hh", "bias_hh"))
        if cell in kinds:
            module = kinds[cell](x.shape[3] * d, d, dtype=x.dtype)
            own = weights[head].flatten(0, 1), bias[head].flatten()
            eye = torch.eye(x.shape[3] * d, dtype=x.dtype)  # the inputs are those of the gates already
            made = {
                "weight_ih": eye,
                "bias_ih": torch.zeros_like(own[1]),
                "weight_hh": own[0],
                "bias_hh": own[1],
            }
        for t in range(x.shape[2]):
            given = x[:, head, t]
            if cell in kinds:
                before = (h, c) if cell == "lstm" else h
                after = torch.func.functional_call(module, made, (given.flatten(1), before))
                h, c = after if cell == "lstm" else (after, c)
            else:
                s = given + (h @ weights[head].flatten(0, 1).T).unflatten(1, (4, d)) + bias[head]
                i, f, z, o = s[:, 0].exp(), s[:, 1].sigmoid(), s[:, 2].tanh(), s[:, 3].sigmoid()
                c, n = f * c + i * z, f * n + i
                h = o * c / n
            rows.append(h)
        outs.append(torch.stack(rows, 1))
    return torch.stack(outs, 1)


def gradients(run: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a random sum of it."""
    leaves = [x.clone().requires_grad_() for x in given]
    out = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


@pytest.mark.evidence
@every_cell
def test_the_fused_loop_is_a_loop_of_steps(cell):
    """Forward and backward: all tokens in one call, in float64 to 1e-10 and on the native engine to what
    float32 allows a loop of steps. With gates in another order it is another network."""
    given = drawn(cell)
    want = gradients(lambda *x: stepped(cell, *x), given)
    got = gradients(lambda *x: gated_rnn(*x, cell=cell), given)
    for exact, found in zip(want, got):
        assert (found - exact).norm() <= 1e-10 * exact.norm()
    low = [x.float() for x in given]
    exact_low = gradients(lambda *x: stepped(cell, *x), [x.double() for x in low])
    naive = gradients(lambda *x: stepped(cell, *x), low)
    native = gradients(lambda *x: gated_rnn(*x, cell=cell, engine="native"), low)
    for exact, one, other in zip(exact_low, native, naive):
        assert (one - exact).norm() <= 2 * (other - exact).norm()
    if GATES[cell] > 1:
        swapped = gated_rnn(given[0].flip(3), *given[1:], cell=cell)
        assert (swapped - want[0]).norm() > 0.1 * want[0].norm()


@pytest.mark.evidence
@every_cell
def test_heads_are_diagonal_blocks(cell):
    """Three heads of 8 units are one of 24 whose recurrent matrices have three blocks; with numbers beside
    the blocks it is another network, and heads have a third of the weights."""
    x, weights, bias = drawn(cell)
    gates = GATES[cell]
    whole = torch.zeros(1, gates, 24, 24, dtype=torch.float64)
    for head in range(3):
        whole[0, :, 8 * head : 8 * head + 8, 8 * head : 8 * head + 8] = weights[head]
    merged = x.permute(0, 2, 3, 1, 4).flatten(3).unsqueeze(1)
    bias_of_all = bias.transpose(0, 1).flatten(1).unsqueeze(0)
    want = gated_rnn(x, weights, bias, cell=cell).transpose(1, 2).flatten(2)
    got = gated_rnn(merged, whole, bias_of_all, cell=cell)[:, 0]
    assert (got - want).norm() <= 1e-12 * want.norm()
    beside = whole + 0.1 * (whole == 0)
    assert (gated_rnn(merged, beside, bias_of_all, cell=cell)[:, 0] - want).norm() > 0.01 * want.norm()
    layers = [FlashRNN(48, heads, cell) for heads in (1, 3)]
    assert layers[0].weights.numel() == 3 * layers[1].weights.numel()


@pytest.mark.evidence
@pytest.mark.timed
@every_cell
def test_the_native_loop_is_faster_than_a_loop_of_steps(cell):
    """300 tokens in 4 heads of 32, forward and backward: at least 4 times; 6 (Elman) to 17 (sLSTM) were
    measured."""
    given = drawn(cell, 300, 4, 32, torch.float32)

    def step(engine: str) -> object:
        return gradients(lambda *x: gated_rnn(*x, cell=cell, engine=engine), given)

    times = least_times({engine: functools.partial(step, engine) for engine in ("native", "torch")}, rounds=4)
    assert 4 * times["native"] < times["torch"], times


def test_wrong_settings():
    with pytest.raises(ValueError, match="cell must be one of 'elman', 'lstm', 'gru', 'slstm', got 'rnn'"):
        FlashRNN(32, cell="rnn")
    with pytest.raises(ValueError, match="inputs must be 'dense' or 'heads', got 'none'"):
        FlashRNN(32, inputs="none")
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 32 and 5"):
        FlashRNN(32, heads=5)


@every_cell
def test_a_new_layer_remembers(cell):
    """The gate that keeps the state begins open, where there is one."""
    layer = FlashRNN(16, 2, cell, keep_bias=3.0)
    want = torch.zeros(2, GATES[cell], 8)
    if cell != "elman":
        want[:, 1] = 3
    assert torch.equal(layer.bias, want)
    assert layer.weights.abs().max() <= 8**-0.5
