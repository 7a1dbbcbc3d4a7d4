"""Packed sequences equal a loop over them; a padded batch equals its sequences alone."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tests.conformance.common import ENGINES, FULL, METHODS, exact, grid, qkv, run_or_refuse, with_grads
from tilewise.attention import plan
from tilewise.tiles import Causal, Documents, Padding

# Methods whose choice is made token by token; the others cut tiles across documents and padding, so that they
# choose the same only where borders fall on tiles, and are compared at full density.
TOKENWISE = {name: METHODS[name] for name in ("dense", "sink-window")}
EXACT = {**{f"{name}, full": method for name, method in FULL.items()}, **TOKENWISE}
LENGTHS = (13, 0, 27, 1, 64)


def _visible(method, q, k):
    n = q.shape[2]
    return grid(plan(method, q, k, mask="causal"), 1, q.shape[1], n, n)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
def test_packed_equals_a_loop(method, engine, index):
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=index)
    q, k, v = qkv(heads=4, kv_heads=2, n_q=int(cu[-1]))
    d_out = torch.randn_like(q)
    mask = Causal() & Documents(cu)
    run = run_or_refuse(engine, q, k, v, method, mask=mask)
    if run is None:
        return
    packed = with_grads(run, q, k, v, d_out)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        one = [x[:, :, start:end] for x in (q, k, v)]
        alone = exact(*one, _visible(method, *one[:2]), d_out[:, :, start:end])
        fields = {name: getattr(packed, name)[:, :, start:end] for name in ("out", "dq", "dk", "dv")}
        alone.check(fields)


def _padded(left: bool, extra: tuple[int, ...], lengths=(64, 23, 1), seed=0, **sizes):
    """A batch of sequences padded to one length with rubbish, its mask, and the sequences alone."""
    sequences = [qkv(heads=4, kv_heads=2, n_q=n, seed=seed + n, **sizes) for n in lengths]
    total = max(n + e for n, e in zip(lengths, extra))
    rows, keep = [], torch.zeros(len(lengths), total, dtype=torch.int64)
    for i, (n, sequence) in enumerate(zip(lengths, sequences)):
        real = slice(total - n, total) if left else slice(0, n)
        keep[i, real] = 1
        row = []
        for x in sequence:
            wide = 30 * torch.randn(1, x.shape[1], total, x.shape[3], dtype=x.dtype)
            wide[:, :, real] = x
            row.append(wide)
        rows.append(row)
    q, k, v = (torch.cat(x) for x in zip(*rows))
    return (q, k, v), keep, sequences


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
def test_padded_batch_equals_sequences_alone(method, engine, left):
    (q, k, v), keep, sequences = _padded(left, extra=(9, 5, 5))
    d_out = torch.randn_like(q) * keep.view(3, 1, -1, 1)  # nobody asks for the padding's outputs
    for mask in (Causal() & Padding(keep), Padding(keep.bool()) & Causal()):
        run = run_or_refuse(engine, q, k, v, method, mask=mask)
        if run is None:
            return
        got = with_grads(run, q, k, v, d_out)
        for i, sequence in enumerate(sequences):
            real = keep[i].bool()
            alone = exact(*sequence, _visible(method, *sequence[:2]), d_out[i : i + 1, :, real])
            alone.check({name: getattr(got, name)[i : i + 1, :, real] for name in ("out", "dq", "dk", "dv")})
            assert (got.dk[i, :, ~real] == 0).all() and (got.dv[i, :, ~real] == 0).all()


# Left padding by whole tiles (for sorted keys: segments) moves every border with the tokens, so that even the
# sparse choice is the one made without padding. Right padding leaves the borders, but a tile of queries that
# reaches into the padding is chosen for it too: then only methods that route every query alone choose the same.
SHIFT = {
    "dense": 5,
    "sink-window": 5,
    "moba": 32,
    "xattention": 32,
    "pbs": 32,
    "quest": 32,
    "hisa": 32,
    "spark": 5,
    "vertical-slash": 32,
    "flexprefill": 32,
    "proxy-attn": 32,
    "s2o": 32,
    "pr-flash": 32,
}


@pytest.mark.parametrize("name", METHODS)
def test_sparse_choice_does_not_depend_on_left_padding_by_whole_tiles(name):
    shift = SHIFT[name]
    (q, k, v), keep, (sequence,) = _padded(True, (shift,), lengths=(128,))
    alone = plan(METHODS[name], *sequence[:2], mask="causal")
    padded = plan(METHODS[name], q, k, mask=Causal() & Padding(keep))
    assert torch.equal(
        grid(padded, 1, 4, 128 + shift, 128 + shift)[..., shift:, shift:], grid(alone, 1, 4, 128, 128)
    )
    out = tilewise.attend(q, k, v, METHODS[name], mask=Causal() & Padding(keep))
    exact(*sequence, grid(alone, 1, 4, 128, 128)).check({"out": out[:, :, shift:]})


@pytest.mark.parametrize("name", ["dense", "sink-window", "moba", "xattention", "quest", "hisa", "spark"])
def test_sparse_choice_does_not_depend_on_right_padding(name):
    length = 128 if name == "xattention" else 119
    (q, k, v), keep, (sequence,) = _padded(False, (41,), lengths=(length,))
    n = length + 41
    alone = plan(METHODS[name], *sequence[:2], mask="causal")
    padded = plan(METHODS[name], q, k, mask=Causal() & Padding(keep))
    seen = grid(alone, 1, 4, length, length)
    assert torch.equal(grid(padded, 1, 4, n, n)[..., :length, :length], seen)
    out = tilewise.attend(q, k, v, METHODS[name], mask=Causal() & Padding(keep))
    exact(*sequence, seen).check({"out": out[:, :, :length]})


def test_padding_values_never_matter():
    """What stands in the padding changes no real output, bit for bit, for any method that looks no farther."""
    for name in ("dense", "sink-window", "moba", "xattention", "quest", "hisa", "spark"):
        for left in (True, False):
            (q, k, v), keep, _ = _padded(left, (32,), lengths=(64,))
            real = keep[0].bool()
            mask = Causal() & Padding(keep)
            first = tilewise.attend(q, k, v, METHODS[name], mask=mask)
            other = [torch.where(real.view(1, 1, -1, 1), x, -7 * x) for x in (q, k, v)]
            second = tilewise.attend(*other, METHODS[name], mask=mask)
            assert torch.equal(first[:, :, real], second[:, :, real]), (name, left)


def test_sinks_start_after_the_padding_and_in_every_document():
    q, k, _ = qkv(n_q=60)
    method = METHODS["sink-window"]  # 3 sinks, 20 recent
    keep = torch.arange(60).ge(11).unsqueeze(0)
    seen = grid(plan(method, q, k, mask=Causal() & Padding(keep)), 1, 2, 60, 60)[0, 0]
    assert seen[59].nonzero().flatten().tolist() == [11, 12, 13, *range(40, 60)]
    seen = grid(plan(method, q, k, mask=Causal() & Documents(torch.tensor([0, 25, 60]))), 1, 2, 60, 60)[0, 0]
    assert seen[59].nonzero().flatten().tolist() == [25, 26, 27, *range(40, 60)]
    assert seen[24].nonzero().flatten().tolist() == [0, 1, 2, *range(5, 25)]
