"""H3 and the diagonal state space: kernels and states are one recurrence, and what H3 recalls that S4D does
not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.recurrence.recalled import marks, said, trained
from tilewise.convolution import H3, S4D, DiagonalSSM
from tilewise.data.recall_tasks import accuracy, mqar


def stepped(ssm: DiagonalSSM, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, one step after the other: outputs `[B, C, N]` and the last state."""
    step, rate = ssm.log_step.exp().unsqueeze(1), torch.complex(-ssm.log_rate.exp(), ssm.frequency)
    keep = (step * rate).exp()
    write, read = (keep - 1) / rate, torch.view_as_complex(ssm.read)
    s = torch.zeros(u.shape[0], *rate.shape, dtype=rate.dtype) if state is None else state
    outs = []
    for t in range(u.shape[2]):
        s = keep * s + write * u[:, :, t : t + 1]
        outs.append(2 * (read * s).sum(2).real)
    return torch.stack(outs, 2), s


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 200])
def test_kernel_and_state_are_the_recurrence(n):
    ssm = DiagonalSSM(3, 8).double()
    u = torch.randn(2, 3, n, dtype=torch.float64)
    before = torch.randn(2, 3, 4, dtype=torch.complex128)
    want, last = stepped(ssm, u, before)
    kernel = ssm.kernel(n)
    got = ssm.from_state(before, n)
    for k in range(n):
        got = got + kernel[:, k : k + 1] * torch.nn.functional.pad(u, (k, 0))[..., :n]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ssm.to_state(u, before, torch.full((2,), n)), last)


def slow_h3(mixer: H3, x: Tensor) -> Tensor:
    """The layer written out: one token after the other, keys held by a shift, every key of a head with every
    value."""
    b, n, width = x.shape
    q, k, v = mixer.query(x), mixer.key(x), mixer.value(x)
    held = torch.zeros(b, width, mixer.shift.shape[1], dtype=x.dtype)
    state, outs = None, []
    for t in range(n):
        held = torch.cat((k[:, t].unsqueeze(2), held[:, :, :-1]), 2)
        key = ((held * mixer.shift).sum(2) + mixer.shift_skip * k[:, t]).unflatten(
            1, (mixer.heads, mixer.head)
        )
        value, query = (z[:, t].unflatten(1, (mixer.heads, mixer.head)) for z in (v, q))
        made = torch.zeros_like(value)
        if state is None:
            state = {}
        for i, j in itertools.product(range(mixer.head), repeat=2):
            u = (key[:, :, i] * value[:, :, j]).unsqueeze(2)
            y, state[i, j] = stepped(mixer.diagonal, u, state.get((i, j)))
            made[:, :, j] += query[:, :, i] * (y + mixer.skip.unsqueeze(1) * u).squeeze(2)
        outs.append(mixer.out(made.flatten(1)))
    return torch.stack(outs, 1)


@pytest.mark.evidence
@pytest.mark.parametrize("head", [1, 4])
def test_convolution_is_recurrent_decoding(head):
    """The whole at once, in parts, and token by token with states handed on: all are the layer's recurrence.
    Without the state they are not."""
    torch.manual_seed(0)
    mixer, x = H3(8, states=6, shift=5, head=head).double(), torch.randn(2, 150, 8, dtype=torch.float64)
    with torch.no_grad():
        want, (whole, last) = slow_h3(mixer, x), mixer(x)
        torch.testing.assert_close(whole, want)
        for borders in ([0, 70, 150], [0, 1, 2, 131, 150], list(range(151))):
            state, parts = None, []
            for start, end in itertools.pairwise(borders):
                part, state = mixer(x[:, start:end], state)
                parts.append(part)
            torch.testing.assert_close(torch.cat(parts, 1), want)
            torch.testing.assert_close(state.diagonal, last.diagonal)
        forgot = torch.cat((mixer(x[:, :70])[0], mixer(x[:, 70:])[0]), 1)
    assert (forgot - want)[:, 70:].norm() > 0.1 * want[:, 70:].norm()
    # What decoding holds does not grow.
    assert mixer(x[:, :20])[1].bytes == last.bytes


def recalling(seed: int) -> tuple[Tensor, Tensor]:
    return mqar(200, 16, 4, vocabulary=32, seed=seed)


@pytest.mark.evidence
def test_h3_recalls_what_a_diagonal_state_space_does_not():
    """Values of four keys, a layer of each and one recipe of training; fresh sequences. Without its keys, a
    model can only name one of the four values that it saw."""
    with_products, alone = (marks(trained(name), recalling) for name in ("h3-recall", "s4d-recall"))
    found = said(h3=with_products, s4d=alone)
    assert with_products.min() > 0.95 and alone.max() < 0.35, found


@pytest.mark.evidence
def test_the_shift_is_what_recalls():
    """Without what the shift holds of earlier keys, the same weights know no key's value."""
    model = trained("h3-recall")
    before = marks(model, recalling, draws=2)
    for block in model.blocks:
        block.mixer.shift.data.zero_()
    after = marks(model, recalling, draws=2)
    assert before.min() > 0.95 and after.max() < 0.4, said(with_shift=before, without=after)


@pytest.mark.evidence
def test_recall_from_states_is_that_of_the_whole():
    """Pairs read first, questions later one by one: the two small states hold all of it; without them nothing
    is known."""
    model = trained("h3-recall")
    tokens, targets = recalling(7)
    with torch.no_grad():
        _, states = model(tokens[:, :8])
        asked, forgotten = [], []
        for t in range(8, 16):
            logits, states = model(tokens[:, t : t + 1], states)
            asked.append(logits)
            forgotten.append(model(tokens[:, t : t + 1])[0])
    assert accuracy(torch.cat(asked, 1), targets[:, 8:]) > 0.95
    assert accuracy(torch.cat(forgotten, 1), targets[:, 8:]) < 0.2


def test_sizes():
    with pytest.raises(ValueError, match="states must be a multiple of heads, got 5 and 2"):
        H3(8, states=5)
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 8 and 3"):
        H3(8, head=3)
    with pytest.raises(ValueError, match=r"steps must rise from above 0, got \(0.1, 0.01\)"):
        S4D(8, steps=(0.1, 0.01))
    with pytest.raises(ValueError, match="shift must be an integer >= 1, got 0"):
        H3(8, shift=0)
