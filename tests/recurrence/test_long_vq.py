"""LongVQ: the softmax over quantised keys it says, in linear time; what its memory and its codewords are for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.recurrence.code_models import load, right
from tilewise.recurrence import Codebook, LongVQ, MovingAverage

WIDTH, HEADS, WINDOW = 8, 2, 5


def built(**options) -> LongVQ:
    torch.manual_seed(0)
    settings = {"heads": HEADS, "codes": 6, "window": WINDOW, "averages": 3}
    made = LongVQ(WIDTH, **(settings | options)).double().eval()
    with torch.no_grad():
        made.near.normal_()
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def inputs(n: int = 43, seed: int = 1) -> Tensor:
    return torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def averaged(mixer: LongVQ, x: Tensor) -> Tensor:
    """The memory, token by token and channel by channel."""
    own = mixer.memory
    if own is None:
        return x
    a, d = own.alpha.sigmoid(), own.delta.sigmoid()
    h, rows = x.new_zeros(len(x), *a.shape), []
    for t in range(x.shape[1]):
        h = a * own.into * x[:, t, :, None] + (1 - a * d) * h
        rows.append(F.silu((h * own.out).sum(2) / math.sqrt(a.shape[1]) + own.own * x[:, t]))
    return torch.stack(rows, 1)


def quadratic(mixer: LongVQ, x: Tensor, counted: bool = True, quantised: bool = True) -> Tensor:
    """Every query against every token's codeword, N x N; without `counted` against each codeword that is in use
    once, with the mean of its values."""
    seen, n = averaged(mixer, x), x.shape[1]
    shared = F.silu(seen @ mixer.shared.weight.T + mixer.shared.bias)
    q, k = (F.normalize((shared * a + b).unflatten(2, (HEADS, -1)), dim=-1)
            for a, b in zip(mixer.scale, mixer.shift))  # fmt: skip
    words = mixer.book.words
    codes = torch.cdist(k.transpose(1, 2), words.expand(len(x), -1, -1, -1)).argmin(3)  # [b, h, n]
    if quantised:
        k = words[torch.arange(HEADS).view(1, -1, 1), codes].transpose(1, 2)
    v = F.silu(x @ mixer.value.weight.T + mixer.value.bias).unflatten(2, (HEADS, -1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * mixer.sharpness.exp().view(1, -1, 1, 1)
    apart = torch.arange(n).unsqueeze(1) - torch.arange(n)
    near = (apart >= 0) & (apart < WINDOW)
    scores = scores + mixer.near[:, apart.clamp(0, WINDOW - 1)].masked_fill(~near, 0)
    if not counted:  # as if a codeword far away weighed as much as one token
        far = (apart >= WINDOW).double()
        chosen = F.one_hot(codes, len(words[0])).double()  # [b, h, n, codes]
        scores = scores - far * ((far @ chosen) @ chosen.mT).clamp(min=1).log()
    weights = scores.masked_fill(apart < 0, -torch.inf).softmax(-1)
    found = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    update, reset, own = (seen @ mixer.gates.weight.T + mixer.gates.bias).chunk(3, -1)
    made = F.silu(own + (found * F.silu(reset)) @ mixer.mix.weight.T)
    return (update.sigmoid() * made) @ mixer.out.weight.T


@pytest.mark.evidence
@pytest.mark.parametrize("options", [{}, {"structured": False}, {"codes": 1}, {"codes": 40}])
def test_it_is_softmax_attention_over_all_quantised_keys(options):
    """Exactly, with no token but the last few kept; the controls: keys as they are, and codewords that do not
    count their tokens, are other functions."""
    mixer, x = built(**options), inputs()
    got = mixer(x)[0]
    torch.testing.assert_close(got, quadratic(mixer, x), rtol=1e-9, atol=1e-11)
    for other in ({"quantised": False}, {"counted": False}):
        assert (got - quadratic(mixer, x, **other)).norm() > 1e-3 * got.norm(), other


@pytest.mark.evidence
def test_gradients_of_values_and_queries_are_those_of_the_quadratic_form():
    """Of everything but what makes keys alone; keys get theirs from queries that see them one by one."""
    mixer, x = built(), inputs()
    weight = torch.randn(2, 43, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names = ["value.weight", "near", "sharpness", "gates.weight", "mix.weight", "out.weight"]
    leaves = [mixer.get_parameter(name) for name in names]
    got = torch.autograd.grad((mixer(x)[0] * weight).sum(), leaves)
    want = torch.autograd.grad((quadratic(mixer, x) * weight).sum(), leaves)
    for name, a, b in zip(names, got, want):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_the_memory_is_its_recurrence():
    mixer, x = built(), inputs()
    memory = mixer.memory
    assert isinstance(memory, MovingAverage)
    got, after = memory(x, x.new_zeros(2, WIDTH * 3))
    torch.testing.assert_close(got, averaged(mixer, x), rtol=1e-10, atol=1e-12)
    again, _ = memory(x[:, 20:], memory(x[:, :20], x.new_zeros(2, WIDTH * 3))[1])
    torch.testing.assert_close(again, got[:, 20:], rtol=1e-10, atol=1e-12)


def flops(mixer: LongVQ, n: int) -> int:
    """Of products of matrices, forward and backward."""
    x = torch.randn(1, n, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        mixer(x)[0].sum().backward()
    return counter.get_total_flops()


@pytest.mark.evidence
def test_work_grows_with_the_tokens_and_the_state_does_not():
    """Eight times the tokens, eight times the products. The control: a window of the whole sequence, which is the
    quadratic form, takes far more."""
    torch.manual_seed(0)
    linear = LongVQ(32, codes=32, window=32)
    assert 7.9 < flops(linear, 8192) / flops(linear, 1024) < 8.1  # a chunk more than tokens fill
    whole = [flops(LongVQ(32, codes=32, window=n), n) for n in (256, 2048)]
    assert whole[1] > 24 * whole[0], whole
    with torch.no_grad():
        held = {linear(torch.randn(1, n, 32))[1].bytes for n in (1, 100, 3000)}
    assert len(held) == 1


@pytest.mark.evidence
def test_recall_from_afar_takes_the_memory_and_the_codewords():
    """Eight pairs, asked for 64 tokens later, four windows; one layer each, trained alike.

    Without the moving average a key tells of its own token alone, and a value's does not tell whose it is; without
    codewords nothing beyond the window is seen but by the average, which has forgotten which value was whose.
    """
    whole, flat, near = (right(load(name), gap=64) for name in ("whole", "flat", "near"))
    assert whole > 0.9 and max(flat, near) < 0.5, (whole, flat, near)


def test_codewords_move_to_the_means_of_their_keys():
    """From keys around four places in a circle: each gets a codeword, in training alone, without a gradient."""
    torch.manual_seed(0)
    book, gen = Codebook(1, 4, 2, pace=0.9), torch.Generator().manual_seed(1)
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])

    def keys(count: int) -> Tensor:
        which = torch.randint(4, (1, count), generator=gen)
        return (centres[which] + 0.05 * torch.randn(1, count, 2, generator=gen)).unsqueeze(2)

    with torch.no_grad():  # each near a place of its own: which they would find from anywhere is not held
        book.words.copy_(centres + 0.4 * torch.randn(4, 2, generator=gen))
        book.uses.fill_(1.0)
    before = book.words.clone()
    book.eval()(keys(50))
    assert torch.equal(book.words, before)
    book.train()
    for _ in range(200):
        book(keys(50))
    assert torch.cdist(centres, book.words[0]).amin(1).max() < 0.1
    assert not book.words.requires_grad


def test_keys_get_the_gradient_of_their_codewords_and_are_drawn_to_them():
    torch.manual_seed(0)
    book = Codebook(2, 3, 4, commit=0.5).train()
    k = torch.randn(1, 5, 2, 4, requires_grad=True)
    with torch.no_grad():
        book.uses.fill_(1.0)  # none is drawn anew
    codes, words = book(k)
    weight = torch.randn_like(words)
    (words * weight).sum().backward()
    torch.testing.assert_close(k.grad, weight + 0.5 / 10 * (k.detach() - words.detach()))
    book.eval()
    k.grad = None
    codes, words = book(k)
    assert torch.equal(words, book.named(codes))
    (words * weight).sum().backward()
    torch.testing.assert_close(k.grad, weight)


def test_padding_does_not_teach_the_codebook():
    torch.manual_seed(0)
    book, k = Codebook(1, 3, 4).train(), torch.randn(2, 6, 1, 4)
    with torch.no_grad():
        book.uses.fill_(1.0)
    other = Codebook(1, 3, 4).train()
    other.load_state_dict(book.state_dict())
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, False]])
    book(k.masked_fill(~mask.view(2, 6, 1, 1), 1e4), mask)
    other(k[mask].unsqueeze(0))
    torch.testing.assert_close(book.words, other.words)
    torch.testing.assert_close(book.uses, other.uses)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="codes must be an integer >= 1, got 0"):
        LongVQ(8, codes=0)
    with pytest.raises(ValueError, match="window must be an integer >= 1, got 0"):
        LongVQ(8, window=0)
    with pytest.raises(ValueError, match="averages must be an integer >= 1, got 0"):
        LongVQ(8, averages=0)
    with pytest.raises(ValueError, match=r"width \* key must be a multiple of heads, got 3 and 2"):
        LongVQ(8, heads=2, key=0.4)
