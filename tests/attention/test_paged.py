"""Paged attention, cascades and balanced decoding against dense attention, plain lists and counts."""

from __future__ import annotations

import importlib
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.conformance.common import exact, over_budget, widest
from tilewise.attention.paged import attend as paged_attend
from tilewise.attention.paged.attend import attend_paged
from tilewise.attention.paged.balance import (
    Balance,
    Item,
    balance,
    balance_longest_first,
    decode_partials,
    lean_decode,
)
from tilewise.attention.paged.cascade import Shared, cascade
from tilewise.attention.paged.pages import Pages
from tilewise.kernels import EngineRefused
from tilewise.kernels.attend_tiles import Call
from tilewise.tiles import Partial, Window, merge

cascade_module = importlib.import_module("tilewise.attention.paged.cascade")
ENGINES = ["native", "torch", "definition"]
RAGGED = [37, 0, 130, 1, 64, 5]


def _pages(
    lengths, size: int, heads: int = 2, d: int = 16, dtype=torch.float64, d_v: int = 8, seed: int = 0
) -> Pages:
    """Sequences in pages scattered over a pool of random numbers; unused entries lie outside of it."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=g)
    k = torch.randn(len(order), heads, size, d, generator=g, dtype=torch.float64).to(dtype)
    v = torch.randn(len(order), heads, size, d_v, generator=g, dtype=torch.float64).to(dtype)
    table = torch.full((len(lengths), max(counts) + 2), -7)
    for b, own in enumerate(order[: sum(counts)].split(counts)):
        table[b, : counts[b]] = own
    return Pages(k, v, table, torch.tensor(lengths))


def _queries(batch: int, heads: int, n_q: int, d: int = 16, dtype=torch.float64) -> Tensor:
    return torch.randn(
        batch, heads, n_q, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    ).to(dtype)


def _seen(n_q: int, n_k: int, left: int | None = None) -> Tensor:
    """Causal, aligned bottom-right, with a window."""
    i, j = torch.arange(n_q).unsqueeze(1) + n_k - n_q, torch.arange(n_k)
    return (j <= i) & ((j >= i - left) if left is not None else True)


def _check(got: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, lse: Tensor | None = None) -> None:
    """One sequence's rows against the float64 answer: got `[H, n, D_v]`, q `[H, n, D]`, k `[H_kv, N, D]`."""
    want = exact(q[None], k[None], v[None], seen)
    want.check({"out": got[None]})
    if lse is not None and lse.dtype == torch.float64:
        torch.testing.assert_close(lse[None], want.lse, rtol=1e-11, atol=1e-11)


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1, 7, 16, 300])
@pytest.mark.parametrize("n_q", [1, 3, 40])
def test_equals_dense_attention_over_gathered_sequences(engine: str, size: int, n_q: int) -> None:
    """Ragged lengths, grouped heads, decoding and chunks of prompts. Control: two pages exchanged."""
    dtype = widest(engine)
    pages, q = _pages(RAGGED, size, dtype=dtype), _queries(len(RAGGED), 6, n_q, dtype=dtype)
    for left in (None, 9):
        mask = "causal" if left is None else Window(left, 0)
        got = attend_paged(q, pages, mask=mask, engine=engine, return_lse=True)
        for b, n in enumerate(RAGGED):
            _check(got.out[b], q[b], *pages.sequence(b), _seen(n_q, n, left), got.lse[b])
    table = pages.table.clone()
    table[2, :1], table[4, :1] = table[4, :1].clone(), table[2, :1].clone()
    moved = Pages(pages.k, pages.v, table, pages.lengths)
    wrong = attend_paged(q, moved, engine=engine)
    with pytest.raises(AssertionError, match="wrong"):
        _check(wrong[2], q[2], *pages.sequence(2), _seen(n_q, RAGGED[2]))


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ENGINES)
def test_queries_may_be_ragged_padded_or_packed(engine: str) -> None:
    """Each sequence brings another number of queries. Control: counts moved by one sequence give other rows."""
    dtype, counts = widest(engine), torch.tensor([5, 0, 33, 1, 64, 2])
    pages, q = _pages(RAGGED, 16, dtype=dtype), _queries(len(RAGGED), 4, 64, dtype=dtype)
    padded = attend_paged(q, pages, q_lengths=counts, engine=engine, return_lse=True)
    packed_q = torch.cat([q[b, :, :n] for b, n in enumerate(counts.tolist())], 1)[None]
    cu = torch.tensor([0, *counts.cumsum(0).tolist()], dtype=torch.int32)
    packed = attend_paged(packed_q, pages, cu_seqlens=cu, engine=engine, return_lse=True)
    for b, (first, last) in enumerate(pairwise(cu.tolist())):
        rows, seen = q[b, :, : last - first], _seen(last - first, RAGGED[b])
        _check(
            padded.out[b, :, : last - first], rows, *pages.sequence(b), seen, padded.lse[b, :, : last - first]
        )
        _check(packed.out[0, :, first:last], rows, *pages.sequence(b), seen, packed.lse[0, :, first:last])
        assert not padded.out[b, :, last - first :].any()
        assert (padded.lse[b, :, last - first :] == -torch.inf).all()
    moved = torch.tensor([0, *counts.roll(1).cumsum(0).tolist()])
    wrong = attend_paged(packed_q, pages, cu_seqlens=moved, engine=engine)
    with pytest.raises(AssertionError, match="wrong"):
        _check(wrong[0, :, :5], q[0, :, :5], *pages.sequence(0), _seen(5, 37))


def test_bias_and_mask_tensors_padded_and_packed() -> None:
    pages, counts = _pages([20, 3], 8), torch.tensor([4, 2])
    bias, keep = torch.randn(1, 4, 6, 20, dtype=torch.float64), torch.rand(1, 1, 6, 20) > 0.3
    q, cu = _queries(1, 4, 6), torch.tensor([0, 4, 6])
    got = attend_paged(q, pages, cu_seqlens=cu, bias=bias, mask=keep, engine="torch")
    for b, (first, last) in enumerate([(0, 4), (4, 6)]):
        n = int(pages.lengths[b])
        k, v = pages.sequence(b)
        want = exact(
            q[:, :, first:last], k[None], v[None], keep[0, :, first:last, :n], bias=bias[:, :, first:last, :n]
        )
        want.check({"out": got[:, :, first:last]})
    rows = torch.randn(2, 1, 1, 30, dtype=torch.float64)
    got = attend_paged(_queries(2, 4, 2), pages, q_lengths=counts.clamp(max=2), bias=rows)
    for b, n in enumerate([20, 3]):
        k, v = pages.sequence(b)
        want = exact(
            _queries(2, 4, 2)[b : b + 1], k[None], v[None], _seen(2, n), bias=rows[b : b + 1, ..., :n]
        )
        want.check({"out": got[b : b + 1]})


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ENGINES)
def test_variants_of_scores_and_masks(engine: str) -> None:
    """The paper's variants: soft cap, ALiBi, a custom mask, and scores that only a function knows.

    Control: the hook left out.
    """
    dtype, lengths = widest(engine), [50, 9]
    pages, q = _pages(lengths, 8, dtype=dtype), _queries(2, 4, 3, dtype=dtype)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05], dtype=dtype).view(1, 4, 1, 1)

    def odd_distance(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & ((q_pos - k_pos) % 3 != 1)

    def alibi(scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return 2 * torch.tanh(scores) - slopes * (q_pos - k_pos)

    hooked = attend_paged(q, pages, mask=odd_distance, logits_hook=alibi, engine=engine)
    capped = attend_paged(q, pages, softcap=2.0, scale=0.5, engine=engine, bias=torch.ones(1, dtype=dtype))
    for b, n in enumerate(lengths):
        k, v = (x.double().repeat_interleave(2, 0) for x in pages.sequence(b))
        i, j = torch.arange(n - 3, n).unsqueeze(1), torch.arange(n)
        scores = q[b].double() @ k.mT
        for got, made, seen in (
            (hooked, alibi(scores / 4, i, j)[0], (j <= i) & ((i - j) % 3 != 1)),
            (capped, 2 * torch.tanh(scores / 4) + 1, j <= i),
        ):
            want = made.masked_fill(~seen, -torch.inf).softmax(-1) @ v
            if dtype == torch.float64:
                torch.testing.assert_close(got[b], want, rtol=1e-11, atol=1e-11)
            else:
                low = made.to(dtype).masked_fill(~seen, -torch.inf).softmax(-1) @ v.to(dtype)
                assert over_budget(got[b], low, want) is None
    plain = attend_paged(q, pages, mask=odd_distance, engine=engine)
    assert float((plain - hooked).abs().max()) > 0.1


class Reads:
    """Counts the bytes of keys and values that calls of the kernel need: the visible keys of their sequences."""

    def __init__(self, run) -> None:
        self.run, self.bytes, self.calls = run, 0, 0

    def __call__(self, call: Call, engine: str) -> Partial:
        seen = call.view.tokens().any(2).any(1).expand(call.q.shape[0], -1)
        each = call.k.shape[1] * (call.k.shape[3] + call.v.shape[3]) * call.k.element_size()
        self.bytes += int(seen.sum()) * each
        self.calls += 1
        return self.run(call, engine)


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n_q", [1, 3])
def test_cascade_equals_the_concatenation_and_reads_less(engine: str, n_q: int, monkeypatch) -> None:
    """Two levels of shared beginnings and ragged ends. Control: parts merged without their lse are wrong."""
    dtype, lengths = widest(engine), [5, 30, 3, 17, 9, 4]
    system = tuple(x[None] for x in _pages([200], 16, dtype=dtype, seed=1).sequence(0))
    documents, own = _pages([70, 41], 16, dtype=dtype, seed=2), _pages(lengths, 8, dtype=dtype, seed=3)
    group = torch.tensor([0, 1, 0, -1, 1, 0])
    levels = [Shared(system), Shared(documents, group)]
    q = _queries(len(lengths), 4, n_q, dtype=dtype)
    whole = []
    for b, g in enumerate(group.tolist()):
        middle = documents.sequence(g) if g >= 0 else tuple(x[:, :0] for x in documents.sequence(0))
        whole.append([torch.cat([s[0], m, o], 1) for s, m, o in zip(system, middle, own.sequence(b))])

    counted = Reads(paged_attend.attend)
    monkeypatch.setattr(paged_attend, "attend", counted)
    got = cascade(q, levels, own, engine=engine, return_lse=True)
    for b, (k, v) in enumerate(whole):
        _check(got.out[b], q[b], k, v, _seen(n_q, k.shape[1]), got.lse[b])
    assert counted.calls == 3
    each = 2 * (16 + 8) * q.element_size()
    assert counted.bytes == (200 + 70 + 41 + sum(lengths)) * each

    alone = Pages.empty(len(lengths), 120, 16, 2, 16, 8, dtype=dtype)
    most = max(k.shape[1] for k, _ in whole)
    k, v = (
        torch.stack([torch.nn.functional.pad(w[i], (0, 0, 0, most - w[i].shape[1])) for w in whole])
        for i in (0, 1)
    )
    alone.append(k, v, torch.tensor([w[0].shape[1] for w in whole]))
    plain = Reads(counted.run)
    monkeypatch.setattr(paged_attend, "attend", plain)
    assert attend_paged(q, alone, engine=engine).shape == got.out.shape
    assert plain.bytes > 4 * counted.bytes, (plain.bytes, counted.bytes)

    def unweighted(parts):
        return Partial(sum(p.out for p in parts) / len(parts), parts[0].lse)

    monkeypatch.setattr(cascade_module, "merge", unweighted)
    wrong = cascade(q, levels, own, engine=engine)
    with pytest.raises(AssertionError, match="wrong"):
        _check(wrong[0], q[0], *whole[0], _seen(n_q, whole[0][0].shape[1]))


def test_cascade_windows_and_hooks_see_whole_positions() -> None:
    """Positions count through all levels, also where the window or the queries reach into the shared part."""
    prefix, own = _pages([12], 4, seed=1), _pages([2, 6], 4, seed=2)
    middle = _pages([3, 5], 4, seed=3)
    levels = [Shared(prefix), Shared(middle, torch.tensor([1, 0]))]
    q = _queries(2, 2, 4)

    def near(scores, q_pos, k_pos):
        return scores - 0.3 * (q_pos - k_pos).double()

    got = cascade(q, levels, own, mask=Window(9, 0), logits_hook=near, engine="torch")
    for b in range(2):
        parts = zip(prefix.sequence(0), middle.sequence(1 - b), own.sequence(b))
        k, v = (torch.cat(x, 1)[None] for x in parts)
        n = k.shape[2]
        bias = -0.3 * (torch.arange(n - 4, n).unsqueeze(1) - torch.arange(n)).double()
        exact(q[b : b + 1], k, v, _seen(4, n, 9), bias=bias[None, None]).check({"out": got[b : b + 1]})
    apart = cascade(q, Shared(prefix, torch.tensor([-1, -1])), own, engine="torch")
    torch.testing.assert_close(apart, attend_paged(q, own, engine="torch"), rtol=1e-12, atol=1e-12)


@pytest.mark.evidence
@pytest.mark.parametrize("size", [1, 3, 8])
def test_pages_hold_exactly_what_lists_do(size: int) -> None:
    """400 random appends, forks and frees against plain lists; pages held are those that lists would need.

    Control: a fork that did not share would take pages, and a shared last page written in place changes the other.
    """
    rng = random.Random(size)
    pages = Pages.empty(3, 60, size, 1, 2, 1, dtype=torch.float64)
    lists: list[list[float]] = [[], [], []]
    number, forks, refused = 0.0, 0, 0
    for _ in range(400):
        action = rng.random()
        if action < 0.6:
            counts = [rng.choice([0, 0, 1, 2, 5]) for _ in lists]
            values = torch.arange(number, number + 5 * len(lists), dtype=torch.float64).view(-1, 1, 5, 1)
            before = pages.table.clone(), pages.k.clone(), pages.lengths.clone()
            try:
                pages.append(values.expand(-1, -1, -1, 2), -values, torch.tensor(counts))
            except ValueError as reason:
                assert "pages" in str(reason)
                assert all(torch.equal(x, y) for x, y in zip(before, (pages.table, pages.k, pages.lengths)))
                refused += 1
                counts = [0] * len(lists)
                pages.free(longest := max(range(len(lists)), key=lambda i: len(lists[i])))
                lists[longest] = []
            number += 5 * len(lists)
            for b, count in enumerate(counts):
                lists[b] += values[b, 0, :count, 0].tolist()
        elif action < 0.8:
            i = rng.randrange(len(lists))
            empty = [j for j, own in enumerate(lists) if not own]
            held = pages.free_pages
            if empty:
                assert pages.fork(i, into=empty[0]) == empty[0]
                lists[empty[0]] = list(lists[i])
            elif len(lists) < 7:
                assert pages.fork(i) == len(lists)
                lists.append(list(lists[i]))
            assert pages.free_pages == held, "a fork takes no page"
            forks += 1
        else:
            i = rng.randrange(len(lists))
            pages.free(i)
            lists[i] = []
        for b, own in enumerate(lists):
            k, v = pages.sequence(b)
            assert k[0].tolist() == [[x, x] for x in own]
            assert v[0, :, 0].tolist() == [-x for x in own]
        ends = {tuple(own[: end + size]) for own in lists for end in range(0, len(own), size)}
        assert len(ends) <= 60 - pages.free_pages <= sum(-(-len(own) // size) for own in lists)
        assert pages.used_nbytes == (60 - pages.free_pages) * size * 3 * 8
    assert pages.nbytes == 60 * size * 3 * 8
    assert forks > 30 and (refused or size > 1)


def test_a_forked_page_is_copied_only_when_written() -> None:
    pages = Pages.empty(1, 4, 4, 1, 2)
    pages.append(torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2))
    child = pages.fork(0)
    assert pages.free_pages == 2
    more = torch.full((2, 1, 1, 2), 7.0)
    pages.append(more, more, torch.tensor([1, 1]))
    assert pages.free_pages == 1  # the parent copied, the child kept the page
    assert pages.table[0, 0] == pages.table[child, 0] and pages.table[0, 1] != pages.table[child, 1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [4, 300])
def test_what_a_freed_sequence_left_does_no_harm(engine: str, size: int) -> None:
    pages = Pages.empty(3, 12, size, 1, 8)
    bad = torch.full((3, 1, 10, 8), torch.nan)
    pages.append(bad, bad, torch.tensor([10, 10, 0]))
    pages.free(1)
    good = torch.randn(3, 1, 7, 8)
    pages.append(good, good, torch.tensor([0, 7, 0]))
    out = attend_paged(torch.randn(3, 2, 1, 8), pages, engine=engine)
    assert out[1].isfinite().all() and not out[2].any()


SKEWED = [16_000, 900, 30, 2_000, 1, 0, 5_000, 257]


@pytest.mark.evidence
@pytest.mark.parametrize("plan", [balance, balance_longest_first])
@pytest.mark.parametrize("workers", [1, 6, 16, 37])
def test_plans_are_even_where_sequences_are_not(plan, workers: int) -> None:
    """Every key of every head is in one item, loads are near even. Control: one worker per sequence and head."""
    heads, chunk = 2, 64
    made = plan(SKEWED, heads, workers, chunk)
    covered = {(b, h): [] for b in range(len(SKEWED)) for h in range(heads)}
    for own in made.items:
        for item in own:
            assert item.first % chunk == 0 and item.first < item.last
            covered[item.sequence, item.head].append((item.first, item.last))
    for (b, _), spans in covered.items():
        ends = sorted(spans)
        assert [first for first, _ in ends] == [0, *(last for _, last in ends)][: len(ends)]
        assert (ends[-1][1] if ends else 0) == SKEWED[b]
    alone: list[list[Item]] = [[] for _ in range(workers)]
    for number, (b, h) in enumerate(covered):
        alone[number % workers].append(Item(b, h, 0, SKEWED[b]))
    control = Balance(tuple(map(tuple, alone)), chunk)
    assert sum(control.chunks) == sum(made.chunks)
    if plan is balance:
        assert made.largest - made.smallest <= 1
    assert made.skew < 1.3
    if workers > 1:
        assert control.skew > 2.5 > made.skew, (control.skew, made.skew)
    assert sum(made.keys) == heads * sum(SKEWED)


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["torch", "definition"])
@pytest.mark.parametrize("workers", [1, 2, 7, 50])
def test_lean_decoding_is_dense_attention(engine: str, workers: int) -> None:
    """Ragged batches, plain and paged, any number of workers, in float64. Control: one part left out."""
    lengths, q = [130, 0, 7, 61], _queries(4, 6, 1)
    pages = _pages(lengths, 12)
    k, v = (torch.zeros(4, 2, 140, d, dtype=torch.float64) for d in (16, 8))
    for b, n in enumerate(lengths):
        k[b, :, :n], v[b, :, :n] = pages.sequence(b)
    plain = lean_decode(q, (k, v), workers, lengths=pages.lengths, chunk=16, engine=engine, return_lse=True)
    paged = lean_decode(q, pages, workers, chunk=16, engine=engine, return_lse=True)
    planned = lean_decode(
        q, pages, balance_longest_first(lengths, 2, workers, 16), engine=engine, return_lse=True
    )
    for b, n in enumerate(lengths):
        for got in (plain, paged, planned):
            _check(got.out[b], q[b], *pages.sequence(b), _seen(1, n), got.lse[b])
    cut = balance(lengths, 2, workers, 16)
    kept = Balance(tuple(tuple(i for i in own if i[:3] != (0, 0, 0)) for own in cut.items), 16)
    wrong = lean_decode(q, pages, kept, engine=engine)
    with pytest.raises(AssertionError, match="wrong"):
        _check(wrong[0], q[0], *pages.sequence(0), _seen(1, 130))


@pytest.mark.evidence
def test_native_decoding_is_lean_decoding() -> None:
    """The engine's cut inside one call and the plan's calls agree with the float64 answer. Control: other keys."""
    lengths = [1500, 3, 700]
    pages, q = _pages(lengths, 64, dtype=torch.float32), _queries(3, 4, 1, dtype=torch.float32)
    try:
        inside = attend_paged(q, pages, engine="native")
    except EngineRefused as reason:
        pytest.skip(str(reason))
    outside = lean_decode(q, pages, 5, engine="native")
    for b, n in enumerate(lengths):
        for got in (inside, outside):
            _check(got[b], q[b], *pages.sequence(b), _seen(1, n))
        with pytest.raises(AssertionError, match="wrong"):
            _check(inside[b].roll(1, 0), q[b], *pages.sequence(b), _seen(1, n))


@pytest.mark.evidence
@pytest.mark.parametrize("workers", [5, 12, 108])
def test_every_worker_has_as_many_chunks_where_fixed_splits_leave_some_idle(workers: int) -> None:
    """Shares differ by a chunk at most. Control: equally many splits of each head, just enough for all workers.

    Heads times splits that do not divide by the workers leave workers idle in the last round; more so if ragged.
    """
    heads, chunk = 8, 256
    for lengths in ([65_536], [16_384, 16_384, 16_384], [60_000, 8_000, 700]):
        lean = balance(lengths, heads, workers, chunk)
        assert lean.largest - lean.smallest <= 1
        places = len(lengths) * heads
        splits = -(-workers // places)
        fixed: list[list[Item]] = [[] for _ in range(workers)]
        number = 0
        for b, n in enumerate(lengths):
            width = -(-n // (splits * chunk)) * chunk
            for head in range(heads):
                for first in range(0, n, width):
                    fixed[number % workers].append(Item(b, head, first, min(first + width, n)))
                    number += 1
        rounds = Balance(tuple(map(tuple, fixed)), chunk)
        assert sum(rounds.chunks) == sum(lean.chunks)
        even = places * splits % workers == 0 and len(set(lengths)) == 1
        idle = sum(rounds.largest - own for own in rounds.chunks)
        assert idle == 0 if even else idle > sum(rounds.chunks) / 40, (lengths, idle, sum(rounds.chunks))
        assert sum(lean.largest - own for own in lean.chunks) < workers


@pytest.mark.evidence
def test_the_order_of_merging_does_not_matter() -> None:
    """Parts of all workers merged in twenty random trees. Control: the mean of parts depends on the tree."""
    q, pages = _queries(1, 2, 1), _pages([300], 16)
    done = decode_partials(q, pages, 9, chunk=16, engine="definition")
    parts = [partial for own in done for item, partial in own if item.head == 0]
    assert len(parts) >= 5
    k, v = pages.sequence(0)
    want = exact(q[:, :1], k[None, :1], v[None, :1], _seen(1, 300))

    def fold(join, seed: int) -> Partial:
        rng, left = random.Random(seed), list(parts)
        while len(left) > 1:
            rng.shuffle(left)
            left.append(join([left.pop(), left.pop()]))
        return left[0]

    for seed in range(20):
        got = fold(merge, seed)
        want.check({"out": got.out})
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-12, atol=1e-12)
    means = [
        fold(lambda two: Partial((two[0].out + two[1].out) / 2, two[0].lse), seed).out for seed in range(20)
    ]
    assert max(float((x - means[0]).abs().max()) for x in means) > 1e-3


def _small() -> tuple[Tensor, Pages]:
    return torch.randn(2, 2, 1, 4), _pages([5, 2], 4, 1, 4, torch.float32, 4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.zeros(2, 1, 4)}, TypeError, "k must be a floating tensor"),
        ({"v": torch.zeros(9, 1, 4, 4, dtype=torch.float64)}, TypeError, "share dtype"),
        ({"v": torch.zeros(9, 1, 5, 4)}, ValueError, "same first three sizes"),
        ({"table": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "table must be int64"),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths must be int64"),
        ({"lengths": torch.tensor([1])}, ValueError, "a row per sequence"),
        ({"lengths": torch.tensor([99, 0])}, ValueError, r"lengths must be in 0\.\.16"),
        (
            {"lengths": torch.tensor([9, 0]), "table": torch.full((2, 4), 77)},
            ValueError,
            r"table must name .* \[77\]",
        ),
    ],
)
def test_bad_pages_are_refused(change: dict, error: type, words: str) -> None:
    good = {
        "k": torch.zeros(9, 1, 4, 4),
        "v": torch.zeros(9, 1, 4, 4),
        "table": torch.zeros(2, 4, dtype=torch.int64),
    }
    Pages(**good, lengths=torch.tensor([3, 2]))
    with pytest.raises(error, match=words):
        Pages(**{**good, "lengths": torch.tensor([3, 2]), **change})


def test_bad_calls_are_refused() -> None:
    q, pages = _small()
    one, two = torch.tensor([1]), torch.tensor([1, 1])
    for words, error, options in (
        ("q_lengths must be int64", TypeError, {"q_lengths": one}),
        (r"q_lengths must be in 0\.\.1", ValueError, {"q_lengths": 2 * two}),
        ("mask must be boolean", TypeError, {"mask": torch.zeros(1, 9)}),
        ("mask must return a boolean", TypeError, {"mask": lambda q_pos, k_pos: q_pos - k_pos}),
        ("mask must broadcast to", ValueError, {"mask": torch.ones(1, 3, dtype=torch.bool)}),
        ("bias must be floating", TypeError, {"bias": two}),
        ("logits_hook must return", TypeError, {"logits_hook": lambda scores, i, j: scores[:1]}),
        ("softcap must be", ValueError, {"softcap": 0.0}),
        ("engine must be", ValueError, {"engine": "none"}),
    ):
        with pytest.raises(error, match=words):
            attend_paged(q, pages, **options)
    packed = q.transpose(0, 2).reshape(1, 2, 2, 4)
    with pytest.raises(TypeError, match="cu_seqlens must be"):
        attend_paged(packed, pages, cu_seqlens=two)
    with pytest.raises(ValueError, match="cu_seqlens must go from 0 to the 2 queries"):
        attend_paged(packed, pages, cu_seqlens=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="two ways"):
        attend_paged(packed, pages, cu_seqlens=torch.tensor([0, 1, 2]), q_lengths=two)
    with pytest.raises(ValueError, match="q must be"):
        attend_paged(q[:1], pages)
    with pytest.raises(TypeError, match="q must be torch.float32"):
        attend_paged(q.double(), pages)
    with pytest.raises(TypeError, match="pages must be Pages"):
        attend_paged(q, q)
    with pytest.raises(ValueError, match="need no gradient"):
        attend_paged(q.requires_grad_(), pages)


def test_bad_appends_forks_and_frees_are_refused() -> None:
    _, pages = _small()
    new = torch.zeros(2, 1, 3, 4)
    for words, error, arguments in (
        ("k must be torch.float32", TypeError, (new.double(), new)),
        ("v must be", ValueError, (new, new[:1])),
        ("as many tokens", ValueError, (new, new[:, :, :2])),
        ("counts must be int64", TypeError, (new, new, torch.tensor([1.0, 1.0]))),
        (r"counts must be in 0\.\.3", ValueError, (new, new, torch.tensor([4, 0]))),
        ("needs .* pages", ValueError, (new.repeat(1, 1, 90, 1), new.repeat(1, 1, 90, 1))),
    ):
        with pytest.raises(error, match=words):
            pages.append(*arguments)
    for index in (-1, 2, "a"):
        for act in (pages.free, pages.fork, pages.sequence):
            with pytest.raises(ValueError, match="i must be a sequence"):
                act(index)
    with pytest.raises(ValueError, match="without tokens"):
        pages.fork(0, into=1)


def test_bad_cascades_and_plans_are_refused() -> None:
    q, own = _small()
    _, shared = _small()
    for words, error, level in (
        ("group of level 0 must be int64", TypeError, Shared(shared, torch.tensor([0]))),
        (r"group of level 0 must be in -1\.\.1", ValueError, Shared(shared, torch.tensor([0, 2]))),
        ("k of level 0 must have", ValueError, (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))),
        ("shared must be", TypeError, []),
        ("keys must be Pages", TypeError, Shared(q)),
        (
            "as many tokens before",
            ValueError,
            [Shared(shared, torch.tensor([0, 1])), Shared(shared, torch.tensor([0, 0]))],
        ),
    ):
        with pytest.raises(error, match=words):
            cascade(q, level, own)
    with pytest.raises(TypeError, match="mask must be a mask object"):
        cascade(q, shared, own, mask=torch.ones(1, 9, dtype=torch.bool))
    for words, arguments in (
        ("heads must be", ([3], 0, 1)),
        ("workers must be", ([3], 1, 0)),
        ("chunk must be", ([3], 1, 1, 0)),
        ("lengths must be >= 0", ([-3], 1, 1)),
    ):
        with pytest.raises(ValueError, match=words):
            balance(*arguments)
    with pytest.raises(ValueError, match="queries must be"):
        balance_longest_first([3], 1, 1, queries=0)
    with pytest.raises(ValueError, match="lengths must be None"):
        lean_decode(q, own, 2, lengths=own.lengths)
    with pytest.raises(ValueError, match="lengths must be int64"):
        lean_decode(q, (own.k[:2], own.v[:2]), 2, lengths=torch.tensor([99, 1]))
    with pytest.raises(ValueError, match="q must be"):
        lean_decode(q[:1], own, 2)
    with pytest.raises(TypeError, match="q must be"):
        lean_decode(q.double(), own, 2)
    assert balance([], 1, 2).skew == 1.0
