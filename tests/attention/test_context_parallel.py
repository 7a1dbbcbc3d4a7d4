"""Context parallelism: equal to one process, forward and backward; what is sent; how the work is shared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tilewise
from tests.conformance.common import exact, naive, over_budget, qkv, with_grads
from tests.ranks import RanksFailed, run_ranks
from tilewise.attention.context_parallel.attend import Traffic, context_parallel_attend, rank_positions
from tilewise.tiles import (
    Causal,
    Documents,
    Everything,
    Mask,
    Padding,
    Partial,
    Prefix,
    TokenMask,
    Window,
    as_mask,
)

SCHEDULES = ("ring", "token_ring")


@dataclass(frozen=True)
class Case:
    """One call: the whole sequence's sizes, how it is spread, and the mask."""

    schedule: str = "ring"
    layout: str = "contiguous"
    mask: Mask | str | Tensor | None = None
    n_q: int = 50
    n_k: int = 50
    heads: int = 2
    kv_heads: int = 2
    d_v: int = 8
    dtype: torch.dtype = torch.float64
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Whole q, k, v and d_out."""
        q, k, v = qkv(2, self.heads, self.kv_heads, self.n_q, self.n_k, 8, self.d_v, self.dtype)
        d_out = torch.randn(2, self.heads, self.n_q, self.d_v, generator=torch.Generator().manual_seed(9))
        return q, k, v, d_out.to(self.dtype)

    def held(self, world: int) -> list[tuple[Tensor, Tensor]]:
        """Which queries and keys each rank holds."""
        if self.lengths is not None:
            return list(zip(*(torch.arange(sum(x)).split(x) for x in self.lengths)))
        return [
            tuple(rank_positions(n, rank, world, self.layout) for n in (self.n_q, self.n_k))
            for rank in range(world)
        ]


@dataclass
class Outcome:
    """What all ranks got, put together again; and the traffic of each."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    traffic: list[Traffic] = field(default_factory=list)


def attend_slice(rank: int, world: int, case: Case) -> tuple:
    q, k, v, d_out = case.tensors()
    queries, keys = case.held(world)[rank]
    q, d_out = q[:, :, queries], d_out[:, :, queries]
    leaves = [x.requires_grad_() for x in (q, k[:, :, keys], v[:, :, keys])]
    traffic = Traffic()
    out, lse = context_parallel_attend(
        *leaves,
        mask=case.mask,
        schedule=case.schedule,
        layout=case.layout,
        return_lse=True,
        traffic=traffic,
    )
    grads = torch.autograd.grad(out, leaves, d_out)
    return out.detach(), lse.detach(), *grads, traffic


def run(case: Case, world: int) -> Outcome:
    parts = list(zip(*run_ranks(attend_slice, world, case)))
    queries, keys = (torch.cat(x).argsort() for x in zip(*case.held(world)))
    whole = [torch.cat(x, 2) for x in parts[:5]]
    out, lse, dq = (x[:, :, queries] for x in whole[:3])
    dk, dv = (x[:, :, keys] for x in whole[3:])
    return Outcome(out, lse, dq, dk, dv, list(parts[5]))


def check(case: Case, world: int) -> Outcome:
    """The outcome, which must be the float64 formula's to rounding."""
    q, k, v, d_out = case.tensors()
    got = run(case, world)
    seen = as_mask(case.mask).bind(case.n_q, case.n_k).tokens()
    want = exact(q, k, v, seen, d_out)
    want.check({name: getattr(got, name) for name in ("out", "dq", "dk", "dv")})
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-12, atol=1e-12)
    return got


@pytest.mark.evidence
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_one_process(schedule, world):
    """Output, lse and gradients of q, k and v on every rank, causal and not; the ranks do not divide N.

    Control: the exact answer, to float64 rounding; a part left out or counted twice is far outside it.
    """
    for mask in (None, "causal"):
        for layout in ("contiguous", "zigzag"):
            check(Case(schedule, layout, mask, n_q=53, n_k=53, heads=4), world)


def loads(outcome: Outcome, phase: str = "forward") -> list[int]:
    """For each exchange, bytes on the busiest of all links; a link joins two ranks, each way counts alone."""
    busiest: dict[int, int] = {}
    for rank, traffic in enumerate(outcome.traffic):
        for step in traffic.steps(phase):
            for other in range(len(outcome.traffic)):
                sent = traffic.bytes(phase=phase, step=step, target=other)
                busiest[step] = max(busiest.get(step, 0), sent)
                assert sent == 0 or other != rank
    return [busiest[step] for step in sorted(busiest)]


@pytest.mark.evidence
@pytest.mark.parametrize("world", [2, 3, 4])
def test_token_ring_loads_both_directions_with_half_as_much(world):
    """Bytes counted where they are sent, against the paper: a step of ring attention sends K and V one way; one of
    TokenRing sends at most Q one way and (out, lse) the other, so no direction carries more than half, but for lse.

    Control: "ring" sends all one way, and its busiest link carries twice as much. What the paper does not say: both
    send equally much in all, and TokenRing takes two exchanges more, so that it gains from 4 ranks on.
    """
    n, b, heads, d, item = 24 * world, 2, 4, 8, 8
    unit, lse = b * heads * 24 * d * item, b * heads * 24 * item
    ring, token = (run(Case(name, n_q=n, n_k=n, heads=heads, kv_heads=heads), world) for name in SCHEDULES)
    for traffic in ring.traffic:
        assert traffic.steps() == list(range(world - 1))
        for step in traffic.steps():
            assert [traffic.bytes(phase="forward", step=step, way=way) for way in ("up", "down")] == [
                2 * unit,
                0,
            ]
    for traffic in token.traffic:
        down = [traffic.bytes(phase="forward", step=step, way="down") for step in range(world + 1)]
        up = [traffic.bytes(phase="forward", step=step, way="up") for step in range(world + 1)]
        assert down == [unit] * (world - 1) + [0, 0]
        assert up == [0, 0] + [unit + lse] * (world - 1)
        assert traffic.bytes(phase="forward", kind="out") == (world - 1) * unit
    assert max(loads(ring)) == 2 * unit and max(loads(token)) == unit + lse
    assert sum(loads(ring)) == (world - 1) * 2 * unit
    assert sum(loads(token)) == min(2, world - 1) * unit + (world - 1) * (unit + lse)
    assert (sum(loads(token)) < sum(loads(ring))) == (world >= 4)


@pytest.mark.evidence
def test_grouped_heads_turn_the_comparison():
    """With H_q = g H_kv, K and V weigh 2 / g of Q: TokenRing sends less per direction below g = 2, more above."""
    for kv_heads, better in ((8, "token_ring"), (2, "ring"), (1, "ring")):
        most = {name: max(loads(run(Case(name, heads=8, kv_heads=kv_heads), 4))) for name in SCHEDULES}
        assert min(most, key=most.__getitem__) == better, (kv_heads, most)


@pytest.mark.evidence
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zigzag_shares_causal_work_evenly(schedule):
    """Scores computed by each of 4 ranks. Control: contiguous slices, where one has 5.8 times another's."""
    computed = {}
    for layout in ("contiguous", "zigzag"):
        outcome = run(Case(schedule, layout, "causal", n_q=2048, n_k=2048), 4)
        computed[layout] = [traffic.scores for traffic in outcome.traffic]
    even, uneven = computed["zigzag"], computed["contiguous"]
    assert sum(even) == sum(uneven)
    assert len(set(even)) == 1, even
    assert max(uneven) > 1.5 * sum(uneven) / 4, uneven


MASKS = {
    "everything": None,
    "window": Window(9, 3),
    "causal window": Causal() & Window(9, None),
    "documents": Causal() & Documents(torch.tensor([0, 5, 5, 30, 50])),
    "prefix": Prefix(11),
    "padding": Causal() & Padding(torch.arange(50)[None] >= torch.tensor([[0], [13]])),
    "grid": torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(0)) < 0.2,
    "hidden rows": torch.arange(50)[:, None] * torch.ones(50) > 20,
    "nothing": torch.zeros(50, 50, dtype=torch.bool),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MASKS)
def test_masks_hold_at_true_positions(schedule, name):
    layout = "zigzag" if schedule == "ring" else "contiguous"
    check(Case(schedule, layout, MASKS[name]), 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "case",
    [
        Case(heads=8, kv_heads=2, mask="causal", layout="zigzag"),
        Case(heads=3, kv_heads=1, mask="causal"),
        Case(d_v=5, mask="causal"),
        Case(n_q=20, n_k=50, mask="causal", layout="zigzag"),  # a chunk of a prompt over a cache
        Case(n_q=1, n_k=50, mask="causal"),  # one token decoded: two ranks have no query
        Case(n_q=2, n_k=2, mask="causal", layout="zigzag"),
        Case(n_q=0, n_k=50),
        Case(n_q=0, n_k=0, mask="causal"),
        Case(mask="causal", lengths=((7, 0, 43), (0, 41, 9))),
    ],
    ids=lambda case: f"{case.n_q}x{case.n_k} {case.heads}/{case.kv_heads} {case.layout}",
)
def test_sizes(schedule, case):
    check(replace(case, schedule=schedule), 3)


def test_one_rank_is_enough():
    for schedule in SCHEDULES:
        outcome = check(Case(schedule, "zigzag", "causal"), 1)
        assert outcome.traffic[0].steps() == [] and outcome.traffic[0].steps("backward") == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_within_twice_the_naive_error(schedule, dtype):
    case = Case(schedule, "zigzag", "causal", n_q=120, n_k=120, heads=4, kv_heads=2, dtype=dtype)
    q, k, v, d_out = case.tensors()
    seen = torch.ones(120, 120, dtype=torch.bool).tril()
    want = exact(q, k, v, seen, d_out)
    plain = with_grads(lambda q, k, v, bias: naive(q, k, v, seen), q, k, v, d_out)
    got = run(case, 4)
    assert got.out.dtype == got.dk.dtype == dtype and got.lse.dtype == torch.float32
    for name in ("out", "dq", "dk", "dv"):
        assert over_budget(getattr(got, name), getattr(plain, name), getattr(want, name)) is None, name


def two_layers(attention, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers and a use of the lse; the second reads the first's output as queries, keys and values."""
    first = attention(x @ weights[0], x @ weights[1], x @ weights[2])
    second = attention(first.out @ weights[3], first.out, x)
    return second.out + x, first.lse + 2 * second.lse


def stacked_slice(rank: int, world: int, schedule: str, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    held = rank_positions(x.shape[2], rank, world, "zigzag")
    mine, weights = x[:, :, held].requires_grad_(), weights.requires_grad_()
    out, lse = two_layers(
        lambda q, k, v: context_parallel_attend(
            q, k, v, mask="causal", schedule=schedule, layout="zigzag", scale=0.7, return_lse=True
        ),
        mine,
        weights,
    )
    loss = (out * out.detach().sin()).sum() + lse.square().sum()
    d_x, d_weights = torch.autograd.grad(loss, (mine, weights))
    dist.all_reduce(d_weights)
    return d_x, d_weights


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_through_two_layers_and_the_lse(schedule):
    x = torch.randn(1, 2, 37, 6, dtype=torch.float64)
    weights = torch.randn(4, 6, 6, dtype=torch.float64) / 3
    parts = run_ranks(stacked_slice, 3, schedule, x, weights)
    held = torch.cat([rank_positions(37, rank, 3, "zigzag") for rank in range(3)]).argsort()
    whole, weights = x.requires_grad_(), weights.requires_grad_()
    out, lse = two_layers(
        lambda q, k, v: Partial(*tilewise.attend(q, k, v, mask="causal", scale=0.7, return_lse=True)),
        whole,
        weights,
    )
    loss = (out * out.detach().sin()).sum() + lse.square().sum()
    d_x, d_weights = torch.autograd.grad(loss, (whole, weights))
    got = torch.cat([part[0] for part in parts], 2)[:, :, held]
    torch.testing.assert_close(got, d_x, rtol=1e-10, atol=1e-12)
    for _, part in parts:
        torch.testing.assert_close(part, d_weights, rtol=1e-10, atol=1e-12)


def in_a_group(rank: int, world: int) -> tuple[int, Tensor] | None:
    group = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match="group must be one that this process belongs to"):
            context_parallel_attend(*qkv(n_q=4), group=group)
        return None
    place = dist.get_rank(group)
    held = rank_positions(n=10, rank=place, ranks=2, layout="contiguous")
    q, k, v = (x[:, :, held] for x in qkv(n_q=10))
    return place, context_parallel_attend(q=q, k=k, v=v, method="dense", mask="causal", group=group)


def test_a_group_other_than_the_world():
    parts = sorted(filter(None, run_ranks(in_a_group, 3)), key=lambda part: part[0])
    want = tilewise.attend(*qkv(n_q=10), mask="causal")
    torch.testing.assert_close(torch.cat([out for _, out in parts], 2), want, rtol=1e-12, atol=1e-12)


# What is sent


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_nobody_needs_is_not_sent(schedule):
    """Causal, contiguous: keys go up to the last rank and no further, queries down to the first."""
    world, unit = 4, 2 * 2 * 12 * 8 * 8
    outcome = run(Case(schedule, mask="causal", n_q=48, n_k=48), world)
    for rank, traffic in enumerate(outcome.traffic):
        if schedule == "ring":
            assert traffic.bytes(phase="forward", kind="k") == (0 if rank == world - 1 else rank + 1) * unit
            # the sums of key gradients take the same way, and home from the last rank; own shares never leave
            onward = sum(owner < rank for owner in range(world)) if rank < world - 1 else world - 1
            assert traffic.bytes(phase="backward", kind="d_k") == onward * unit
        else:
            assert traffic.bytes(phase="forward", kind="q") == (world - rank if rank else 0) * unit
            assert traffic.bytes(phase="forward", kind="out") == (world - 1 - rank) * unit
            assert traffic.bytes(phase="backward", kind="d_q") == (world - 1 - rank) * unit


def test_zigzag_queries_go_round_by_halves():
    """TokenRing, causal, zigzag: past rank 0 only the late half of the queries has anything left to see."""
    world, unit = 4, 2 * 2 * 16 * 8 * 8
    outcome = run(Case("token_ring", "zigzag", "causal", n_q=64, n_k=64), world)
    for rank, traffic in enumerate(outcome.traffic):
        sent = [traffic.bytes(phase="forward", kind="q", step=step) for step in range(world - 1)]
        owners = [(rank + step) % world for step in range(world - 1)]
        late = [owner < rank or rank == 0 for owner in owners]
        assert sent == [unit // 2 if half else unit for half in late]


def listen(rank: int, world: int, case: Case) -> tuple[list[str], int, int]:
    """Attend, noting the order of what happens and what is really handed to torch.distributed."""
    import tilewise.attention.context_parallel.schedules as schedules
    from tilewise.attention.context_parallel.traffic import Exchange

    events: list[str] = []
    sent = [0]

    def noting(name, call):
        def noted(*args):
            events.append(name)
            return call(*args)

        return noted

    def batch(ops):
        sent[0] += sum(op.tensor.numel() * op.tensor.element_size() for op in ops if op.op is dist.isend)
        return plain_batch(ops)

    plain_batch, dist.batch_isend_irecv = dist.batch_isend_irecv, batch
    Exchange.post, Exchange.wait = noting("post", Exchange.post), noting("wait", Exchange.wait)
    schedules.attend_block = noting("compute", schedules.attend_block)
    schedules.attend_block_backward = noting("compute", schedules.attend_block_backward)
    traffic = attend_slice(rank, world, case)[-1]
    sizes = sum(m.bytes for m in traffic.messages if m.way == "all")
    return events, sent[0], traffic.bytes() - sizes


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_messages_are_under_way_during_the_computation(schedule):
    for events, sent, counted in run_ranks(listen, 3, Case(schedule)):
        assert events == (["post", "compute", "wait"] * 3 + ["post", "wait"]) * 2
        assert sent == counted > 0


def test_traffic_as_text():
    from tilewise.attention.context_parallel.attend import Message

    message = Message(phase="forward", step=1, kind="q", source=0, target=1, way="down", bytes=24)
    traffic = Traffic(messages=[message], scores=3)
    assert str(traffic).splitlines()[1].split() == ["forward", "1", "0", "24", "q"]
    assert traffic.bytes(way="up") == 0 and traffic.bytes(kind="q", target=1) == 24


# What is refused


def refuse(rank: int, world: int, change: str) -> str:
    q, k, v = qkv(n_q=6, dtype=torch.float32)
    other = {
        "method": {"method": "moba"},
        "schedule": {"schedule": "star"},
        "layout": {"layout": "striped"},
        "float mask": {"mask": torch.zeros(6, 6)},
        "placed": {"mask": Causal().at(torch.arange(6), torch.arange(6))},
        "batch": {"mask": Padding(torch.ones(3, 12, dtype=torch.bool))},
        "mask": {"mask": "causal" if rank else None},
        "window": {"mask": Window(rank, 0)},
        "other schedule": {"schedule": SCHEDULES[rank]},
        "zigzag": {"layout": "zigzag"},
    }
    if change == "rank 1":
        k = k[0] if rank else k
    if change == "heads":
        k, v = k[:, : 1 + rank], v[:, : 1 + rank]
    if change == "gradients" and rank:
        q.requires_grad_()
    if change == "zigzag" and rank:
        q = q[:, :, :3]
    try:
        context_parallel_attend(q, k, v, **other.get(change, {}))
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("method", ["method must be None or 'dense'"] * 2),
        ("schedule", ["schedule must be one of 'ring', 'token_ring', got 'star'"] * 2),
        ("layout", ["layout must be one of 'contiguous', 'zigzag', got 'striped'"] * 2),
        ("float mask", ["floating (additive) masks are refused"] * 2),
        ("placed", ["must not be placed"] * 2),
        ("batch", ["the mask has batch 3, the call has 1"] * 2),
        ("mask", ["the same kind of mask"] * 2),
        ("window", ["the same kind of mask"] * 2),
        ("other schedule", ["the same schedule"] * 2),
        ("zigzag", ["the ranks hold [5, 4] of queries"] * 2),
        ("rank 1", ["refused on rank 1", "k must be a tensor [B, H, N, D]"]),
        ("heads", ["the same kv heads, got [1, 2] by rank"] * 2),
        ("gradients", ["the same need of gradients"] * 2),
    ],
)
def test_wrong_arguments_raise_on_all_ranks(change, words):
    for said, word in zip(run_ranks(refuse, 2, change, timeout=20.0), words):
        assert word in said


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="needs a process group"):
        context_parallel_attend(*qkv(n_q=4))


def test_rank_positions():
    for layout in ("contiguous", "zigzag"):
        for n in (0, 1, 5, 16, 17):
            held = [rank_positions(n, rank, 4, layout) for rank in range(4)]
            assert torch.equal(torch.cat(held).sort().values, torch.arange(n))
            assert max(map(len, held)) - min(map(len, held)) <= (1 if layout == "contiguous" else 2)
    assert rank_positions(16, 1, 4, "zigzag").tolist() == [2, 3, 12, 13]
    for wrong in ((-1, 0, 2), (4, 2, 2), (4, -1, 2)):
        with pytest.raises(ValueError, match="must be"):
            rank_positions(*wrong)
    with pytest.raises(ValueError, match="layout must be one of"):
        rank_positions(4, 0, 2, "striped")


def wait_for_a_lost_rank(rank: int, world: int) -> None:
    if rank == 0:
        context_parallel_attend(*qkv(n_q=4))


def test_a_rank_that_does_not_call_is_shown_not_waited_for():
    with pytest.raises(RanksFailed, match=r"(?s)rank 0 .*gather_sizes"):
        run_ranks(wait_for_a_lost_rank, 2, timeout=3.0)


def test_masks_of_other_kinds_are_told_apart():
    from tilewise.attention.context_parallel.attend import _kind

    masks = [Everything(), Causal(), Window(3, 0), Window(3, None), Causal() & Window(3, 0), Prefix(3)]
    masks.append(TokenMask(torch.ones(2, 2, dtype=torch.bool)))
    assert len({_kind(mask) for mask in masks}) == len(masks)
