"""RAT: both limits recovered, the formula between them, and what each chunk costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tilewise.recurrence import RAT, elementwise, rat

N, WIDTH, HEADS = 48, 16, 4
ROUNDING = N * torch.finfo(torch.float64).eps  # of sums of N terms


def built(chunk: int) -> RAT:
    """The same random weights for every chunk."""
    torch.manual_seed(0)
    made = RAT(WIDTH, heads=HEADS, chunk=chunk).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return made


def projected(mixer: RAT, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys, values and forget gates `[B, N, H, D]`, and output gates `[B, N, width]`, from its weights."""

    def heads(y: Tensor) -> Tensor:
        return y.reshape(*y.shape[:2], -1, WIDTH // HEADS)

    q, k, v = (heads(x @ w.T) for w in (mixer.query.weight, mixer.key.weight, mixer.value.weight))
    q, k = (torch.cat((y, y), 2) for y in (q, k))  # two groups for four heads
    forget = torch.sigmoid(heads(x @ mixer.forget.weight.T + mixer.bias))
    return q, k, v, forget, torch.sigmoid(x @ mixer.gate.weight.T)


def turned(x: Tensor, place: int) -> Tensor:
    """Rotary positions as multiplication by complex numbers, `[..., D]`."""
    half = x.shape[-1] // 2
    angles = torch.tensor([place * 10000 ** (-i / half) for i in range(half)], dtype=torch.float64)
    spun = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(half).double(), angles)
    return torch.cat((spun.real, spun.imag), -1)


def attention(mixer: RAT, x: Tensor) -> Tensor:
    """Causal softmax attention over keys and values times 1 - g, a position for each token."""
    q, k, v, forget, out = projected(mixer, x)
    k, v = (1 - forget) * k, (1 - forget) * v
    q, k = (torch.stack([turned(y[:, t], t) for t in range(N)], 1) for y in (q, k))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH // HEADS)
    scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    return (mixed * out) @ mixer.out.weight.T


def recurrence(mixer: RAT, x: Tensor) -> Tensor:
    """A gated recurrence over values; queries and keys have no say."""
    _, _, v, forget, out = projected(mixer, x)
    h, mixed = torch.zeros_like(v[:, 0]), []
    for t in range(N):
        h = forget[:, t] * h + (1 - forget[:, t]) * v[:, t]
        mixed.append(h)
    return (torch.stack(mixed, 1).flatten(2) * out) @ mixer.out.weight.T


def between(mixer: RAT, x: Tensor, chunk: int) -> Tensor:
    """Token by token: attention over the last states of full chunks and the running one."""
    q, k, v, forget, out = projected(mixer, x)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    mixed = []
    for t in range(N):
        if t % chunk == 0:
            running_k, running_v = torch.zeros_like(k[:, 0]), torch.zeros_like(v[:, 0])
            keys.append(running_k)
            values.append(running_v)
        running_k = forget[:, t] * running_k + (1 - forget[:, t]) * k[:, t]
        running_v = forget[:, t] * running_v + (1 - forget[:, t]) * v[:, t]
        keys[-1], values[-1] = turned(running_k, t // chunk), running_v
        scores = torch.einsum("bhd,pbhd->bhp", turned(q[:, t], t // chunk), torch.stack(keys))
        weights = (scores / math.sqrt(WIDTH // HEADS)).softmax(-1)
        mixed.append(torch.einsum("bhp,pbhd->bhd", weights, torch.stack(values)))
    return (torch.stack(mixed, 1).flatten(2) * out) @ mixer.out.weight.T


def inputs() -> Tensor:
    return torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.evidence
def test_a_chunk_of_one_is_attention_and_one_of_all_tokens_a_recurrence():
    """Both exactly; the controls: neither limit is the other, and no chunk between them is either."""
    x = inputs()
    assert apart(built(1)(x)[0], attention(built(1), x)) < ROUNDING
    for chunk in (N, N + 5):
        assert apart(built(chunk)(x)[0], recurrence(built(chunk), x)) < ROUNDING
    for chunk in (2, 4, 12, N):
        assert apart(built(chunk)(x)[0], attention(built(1), x)) > 0.05
    for chunk in (1, 4, 12, N // 2):
        assert apart(built(chunk)(x)[0], recurrence(built(N), x)) > 0.05


@pytest.mark.evidence
@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 47])
def test_between_the_limits_it_is_its_formula(chunk):
    x = inputs()
    assert apart(built(chunk)(x)[0], between(built(chunk), x, chunk)) < ROUNDING


@pytest.mark.evidence
def test_scores_and_state_shrink_with_the_chunk(monkeypatch):
    """Pairs scored and keys held, counted where attention is called: N (N + 1) / 2 and N at chunk 1, N and 1 for a
    recurrence, and in between a chunk-th of attention's."""
    pairs: list[int] = []

    def counted(q, k, v, *, mask, return_lse):
        pairs.append(int(mask.bind(q.shape[2], k.shape[2]).tokens().sum()))
        return attend(q, k, v, mask=mask, return_lse=return_lse)

    attend = rat.attend
    monkeypatch.setattr(rat, "attend", counted)
    n, scored, held = 1024, {}, {}
    for chunk in (1, 4, 16, 64, 1024):
        mixer = RAT(8, heads=2, chunk=chunk)
        pairs.clear()
        with torch.no_grad():
            _, state = mixer(torch.randn(1, n, 8))
        scored[chunk] = sum(pairs) + n  # and its own chunk's
        held[chunk] = int((state.keys != 0).any(-1).any(1).sum())
    assert scored[1] == n * (n + 1) // 2 and scored[1024] == n
    for chunk in (4, 16, 64):
        assert scored[chunk] == sum(t // chunk + 1 for t in range(n))
        assert scored[chunk] < scored[1] / chunk + n
    assert held == {chunk: n // chunk for chunk in held}


def test_the_recurrence_of_channels_is_finite_and_exact_under_strong_gates():
    """Gates of 0, of 1 and below float32's smallest product, forward and backward."""
    torch.manual_seed(0)
    keep = torch.rand(2, 300, 3, dtype=torch.float64)
    keep[:, 50:120] = 1e-30
    keep[:, 120:130] = 0
    keep[:, 130:200] = 1
    add, initial = torch.randn(2, 300, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    h, want = initial, []
    for t in range(300):
        h = keep[:, t] * h + add[:, t]
        want.append(h)
    parts = [part.float().requires_grad_() for part in (keep, add, initial)]
    got = elementwise(*parts)
    assert (got.double() - torch.stack(want, 1)).abs().max() < 1e-4
    got.sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in parts)
    small = [part[:, 100:140].clone().requires_grad_() for part in (keep, add)]
    assert torch.autograd.gradcheck(elementwise, (*small, initial.requires_grad_()))


def test_bad_arguments():
    with pytest.raises(ValueError, match="groups must divide heads, got 3 and 4"):
        RAT(16, heads=4, groups=3)
    with pytest.raises(ValueError, match="chunk must be an integer >= 1, got 0"):
        RAT(16, chunk=0)
    with pytest.raises(ValueError, match="state must hold 3 sequences, got 2"):
        mixer = RAT(16)
        mixer(torch.zeros(3, 4, 16), mixer(torch.zeros(2, 4, 16))[1])
    with pytest.raises(ValueError, match=r"must both be \[B, N, C\]"):
        elementwise(torch.zeros(1, 2), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=r"initial must be \[1, 3\]"):
        elementwise(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2))
