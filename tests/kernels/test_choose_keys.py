"""The choice of keys: every engine against the definition, and the definition against its rule written out."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.conformance.test_memory import allocations
from tests.kernels.test_native import LESSER
from tilewise.attention import StatisticalTopK
from tilewise.kernels import EngineRefused
from tilewise.kernels.choose_keys import ENGINES, Call, choose_keys, explain, native, op
from tilewise.kernels.choose_keys.compact import compact
from tilewise.tiles import Causal, Documents, Mask, Padding, TokenMask, Visibility, Window, as_mask

FAST = [name for name in ENGINES if name != "definition"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _view(mask: Mask | None, n_q: int, n_k: int) -> Visibility:
    return as_mask(mask).bind(n_q, n_k)


def _mask(kind: str, b: int, lists: int, n_q: int, tokens: int) -> Mask | None:
    left = torch.arange(tokens).ge(torch.randint(0, tokens, (b, 1)))
    right = torch.arange(tokens).lt(torch.randint(0, tokens + 1, (b, 1)))
    return {
        "none": None,
        "causal": Causal(),
        "window": Causal() & Window(40, None),
        "left padding": Causal() & Padding(left),
        "right padding": Padding(right),
        "documents": Causal() & Documents(torch.tensor([0, tokens // 3, tokens // 3, tokens])),
        "grid": TokenMask(torch.rand(b, lists, n_q, tokens) < 0.5),
        "one grid": TokenMask(torch.rand(n_q, tokens) < 0.5),
    }[kind]


KINDS = ("none", "causal", "window", "left padding", "right padding", "documents", "grid", "one grid")


def _some_call(kind: str, dtype: torch.dtype) -> Call:
    """Small whole numbers, whose products and sums are exact in every format; hence many equal scores."""

    def pick(*of):
        return random.choice(of)

    b, lists, share = pick(1, 2), pick(1, 2, 4), pick(1, 2, 3)
    n_q, tokens, covers, d = (
        pick(1, 3, 17, 40, 70),
        pick(1, 2, 31, 64, 129, 300, 700),
        pick(1, 1, 3, 16),
        pick(1, 3, 8, 64),
    )
    if kind == "documents":
        tokens = n_q
    n_k, key_heads = -(-tokens // covers), pick(*(h for h in (1, 2, 4) if lists % h == 0))
    q = torch.randint(-2, 3, (b, lists * share, n_q, d)).to(dtype)
    k = torch.randint(-2, 3, (b, key_heads, n_k, d)).to(dtype)
    weight = pick(None, torch.randint(-1, 3, (b, lists * share, n_q)).to(dtype))
    top, among, block = pick(1, 2, 5, 30, 1000), None, pick(1, 3, 16, 32, 200)
    if pick(True, False):
        blocks = -(-n_k // block)
        among = torch.rand(b, lists, n_q, blocks).argsort(-1)[..., : random.randint(1, blocks)]
        among = torch.where(torch.rand(among.shape) < 0.2, blocks, among).sort(-1).values
        among = among.masked_fill(among == blocks, -1).int()
    rule = pick({}, {"ends": True}, {"latest": True}, {"most": top * pick(1, 2)})
    view = _view(_mask(kind, b, lists, n_q, tokens), n_q, tokens)
    slope = pick(0.0, 0.5, 1.0)
    return Call(q, k, view, top, lists, weight, slope, covers=covers, among=among, block=block, **rule)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_means_the_same(kind, dtype, engine):
    for _ in range(40):
        call = _some_call(kind, dtype)
        got, want = choose_keys(call, engine), choose_keys(call, "definition")
        assert got.dtype == torch.int32 and got.shape == call.shape
        assert torch.equal(got, want), call


def _by_hand(call: Call, b: int, list: int, i: int) -> list[int]:
    """The keys of one query by the rule, one after the other."""
    share, key_head = call.q.shape[1] // call.lists, list * call.k.shape[1] // call.lists
    seen, view, tokens = {}, call.view, call.view.pos.shape[2]
    head = list * view.lo.shape[1] // call.lists
    lo, hi = (x[b % x.shape[0], head, i] for x in (view.lo, view.hi))
    pos = view.pos[b % view.pos.shape[0], list * view.pos.shape[1] // call.lists]
    for t in range(call.k.shape[2]):
        if call.among is not None and t // call.block not in call.among[b, list, i].tolist():
            continue
        covered = range(t * call.covers, min((t + 1) * call.covers, tokens))
        if not any(bool((lo <= pos[x]).all() and (pos[x] <= hi).all()) for x in covered):
            continue
        score = 0.0
        for h in range(list * share, (list + 1) * share):
            product = sum(float(x) * float(y) for x, y in zip(call.q[b, h, i], call.k[b, key_head, t]))
            weight = 1.0 if call.weight is None else float(call.weight[b, h, i])
            score += weight * (product if product > 0 else call.slope * product)
        seen[t] = score
    if not seen:
        return []
    if call.most is not None:
        if len(seen) > call.top:
            mean = sum(seen.values()) / len(seen)
            spread = math.sqrt(sum((x - mean) ** 2 for x in seen.values()) / (len(seen) - 1))
            least = mean + spread * torch.distributions.Normal(0.0, 1.0).icdf(
                torch.tensor(1 - call.top / len(seen)).double()
            )
            least = min(float(least), max(seen.values()))
            seen = {t: x for t, x in seen.items() if x >= least}
        return sorted(seen)[-call.most :]
    if call.ends:
        seen[min(seen)] = seen[max(seen)] = math.inf
    ranked = sorted(seen, key=lambda t: (-seen[t], -t if call.latest else t))
    return sorted(ranked[: call.top])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "grid" not in kind])
def test_the_definition_is_its_rule(kind):
    for _ in range(6):
        call = _some_call(kind, torch.float64)
        got = choose_keys(call, "definition")
        for b in range(got.shape[0]):
            for list in range(got.shape[1]):
                for i in {0, got.shape[2] // 2, got.shape[2] - 1}:
                    want = _by_hand(call, b, list, i)
                    assert got[b, list, i].tolist() == want + [-1] * (got.shape[3] - len(want)), call


def _row(scores: Tensor, top: int, **rule) -> Call:
    """One query whose scores these are."""
    n = len(scores)
    view = _view(None, 1, n)
    return Call(torch.ones(1, 1, 1, 1), scores.view(1, 1, n, 1), view, top, **rule)


def _sampled(n: int, inside: float, outside: float) -> Tensor:
    """Scores that an even sample of 256 sees as other than they are."""
    step = n // 256
    x = outside + torch.rand(n, generator=_G)
    x[step // 2 :: step] += inside - outside
    return x


def _normal(n: int, share: float = 0.0, other: float = 0.0) -> Tensor:
    """Normal numbers, a share of them something else."""
    x = torch.randn(n, generator=_G)
    return torch.where(torch.rand(n, generator=_G) < share, other, x)


_G = torch.Generator().manual_seed(0)
ROWS = {
    "rising": torch.arange(5000.0),
    "falling": -torch.arange(5000.0),
    "all the same": torch.full((3000,), 0.1),
    "two values": torch.arange(3000).remainder(2).float(),
    "sampled too high": _sampled(4096, 10, 0),
    "sampled too low": _sampled(4096, -10, 0),
    "far apart": torch.cat([_normal(2000), torch.tensor([3e38, -3e38, 1e-40, -1e-40])]),
    "near together": 1 + torch.arange(3000).remainder(7) * 1e-7,
    "tiny": torch.arange(2000).remainder(11) * 1e-42,
    "zeros of both signs": torch.where(_normal(2000) < 0, 0.0, -0.0),
    "infinite": _normal(2000, 0.1, torch.inf),
    "not numbers": _normal(2000, 0.1, torch.nan),
    "minus infinity": _normal(2000, 0.9, -torch.inf),
    "heavy": (4 * _normal(6000)).exp(),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("engine", FAST)
def test_scores_of_every_kind(engine, name):
    """Whatever a row holds, exactly the highest are found, in the order that the definition says."""
    for top in (1, 7, 200, 1999, len(ROWS[name]) - 1):
        for rule in ({}, {"latest": True}, {"ends": True}):
            call = _row(ROWS[name], top, **rule)
            assert torch.equal(choose_keys(call, engine), choose_keys(call, "definition")), (top, rule)


@pytest.mark.parametrize("engine", FAST)
def test_what_is_not_a_number_is_chosen(engine):
    """So that attention gives it on, as it does without a choice; by quantile everything is chosen then."""
    scores = torch.randn(300)
    scores[[70, 200]] = torch.nan
    assert {70, 200} <= set(choose_keys(_row(scores, 5), engine).flatten().tolist())
    assert {200} <= set(choose_keys(_row(scores, 150, most=150), engine).flatten().tolist())
    assert choose_keys(_row(scores * torch.nan, 5), engine).tolist() == [[[[0, 1, 2, 3, 4]]]]


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_moves_nothing_but_near_equals(dtype, engine):
    """Normal numbers: no score that was left out beats one that was chosen by more than both round.

    A sum of n products is off by n eps times the sum of their sizes, in float32, whatever the inputs' format.
    """
    q, k = torch.randn(1, 4, 200, 48).to(dtype), torch.randn(1, 2, 600, 48).to(dtype)
    weight = torch.rand(1, 4, 200)
    view = _view(Causal(), 200, 600)
    call = Call(q, k, view, 40, lists=2, weight=weight, slope=0.01)
    exact = replace(call, q=q.double(), k=k.double(), weight=weight.double())
    chosen = choose_keys(call, engine).long()
    wide = [x.double() for x in (q.unflatten(1, (2, 2)), k.unsqueeze(2))]
    products = wide[0] @ wide[1].mT
    scores = (torch.nn.functional.leaky_relu(products, 0.01) * weight.double().view(1, 2, 2, 200, 1)).sum(2)
    sizes = ((wide[0].abs() @ wide[1].abs().mT) * weight.double().view(1, 2, 2, 200, 1)).sum(2)
    slack = 50 * 2 * torch.finfo(torch.float32).eps * sizes.amax(-1)
    seen = view.tokens().expand_as(scores)
    taken = torch.zeros_like(seen).scatter(3, chosen, True)
    least = scores.masked_fill(~taken, torch.inf).amin(-1)
    best = scores.masked_fill(taken | ~seen, -torch.inf).amax(-1)
    assert (taken.sum(-1) == 40).all() and not (taken & ~seen).any()
    assert (best - least <= slack).all()
    same = (choose_keys(exact, "definition").long() == chosen).all(-1)
    assert same.double().mean() > 0.9


@pytest.mark.parametrize("engine", FAST)
def test_by_quantile_is_statistical_top_k(engine):
    """The kernel's rule is that of the stage, up to scores that lie within rounding of the threshold."""
    q, k = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    view = _view(Causal(), 300, 300)
    got = choose_keys(Call(q, k, view, 20, lists=2, most=300), engine).long()
    taken = torch.zeros(1, 2, 300, 301, dtype=torch.bool).scatter(3, got.masked_fill(got < 0, 300), True)[
        ..., :300
    ]
    scores, seen = q.double() @ k.double().mT, view.tokens().expand(1, 2, 300, 300)
    select = StatisticalTopK(20)
    margin = 1e-5 * scores.abs().amax()
    near = (scores - select.threshold(scores, seen)).abs() < margin
    assert torch.equal(taken & ~near, select.keep(scores, seen) & ~near)
    assert float(near.double().mean()) < 1e-4


@pytest.mark.parametrize("engine", [*FAST, "definition"])
@pytest.mark.parametrize(("n_q", "n_k"), [(0, 0), (0, 5), (5, 0), (1, 1), (9, 3), (3, 9)])
def test_nothing_to_choose(engine, n_q, n_k):
    """Empty sequences, and queries that see nothing: -1 and no more."""
    for rule in (
        {},
        {"ends": True},
        {"most": 8},
        {"among": torch.full((1, 2, n_q, 3), -1, dtype=torch.int32)},
    ):
        call = Call(
            torch.randn(1, 2, n_q, 4),
            torch.randn(1, 1, n_k, 4),
            _view(Causal(), n_q, n_k),
            4,
            lists=2,
            **rule,
        )
        got = choose_keys(call, engine)
        assert got.shape == call.shape
        assert (got[:, :, : max(0, n_q - n_k)] == -1).all()
        if "among" not in rule and n_q and n_k:
            assert (got[:, :, -1, 0] >= 0).all()
    hidden = _view(Padding(torch.zeros(1, n_k, dtype=torch.bool)), n_q, n_k)
    got = choose_keys(Call(torch.randn(1, 2, n_q, 4), torch.randn(1, 1, n_k, 4), hidden, 4), engine)
    assert (got == -1).all()


@pytest.mark.parametrize("engine", FAST)
def test_strides_are_followed(engine):
    q, k = torch.randn(2, 70, 4, 24), torch.randn(2, 70, 2, 48)[..., ::2]
    view = _view(Causal(), 70, 70)
    given = Call(q.transpose(1, 2)[..., :16], k.transpose(1, 2)[..., :16], view, 7, lists=2)
    plain = replace(given, q=given.q.contiguous(), k=given.k.contiguous())
    expanded = replace(given, k=given.k[:, :1].expand(-1, 2, -1, -1))
    assert torch.equal(choose_keys(given, engine), choose_keys(plain, engine))
    assert torch.equal(choose_keys(expanded, engine), choose_keys(replace(given, k=given.k[:, :1]), engine))


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("rule", [{}, {"most": 60}], ids=["top", "quantile"])
def test_later_keys_change_no_earlier_choice(engine, rule):
    q, k = torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 16)
    call = Call(q, k, _view(Causal(), 400, 400), 30, lists=2, **rule)
    later = [torch.cat([x[:, :, :250], -50 * x[:, :, 250:]], 2) for x in (q, k)]
    before, after = choose_keys(call, engine), choose_keys(replace(call, q=later[0], k=later[1]), engine)
    assert torch.equal(before[:, :, :250], after[:, :, :250]) and not torch.equal(before, after)


def test_one_answer_whatever_the_threads():
    call = Call(
        torch.randn(1, 4, 500, 16), torch.randn(1, 2, 500, 16), _view(Causal(), 500, 500), 30, lists=2
    )
    threads, answers = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            answers.append(choose_keys(call, "native"))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(answers[0], other) for other in answers[1:])


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which the compiler would trace
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("engine", ["auto", *FAST])
def test_compiled_whole(engine, fresh_compiler):
    counter = CompileCounterWithBackend("eager")

    def both(q: Tensor, k: Tensor) -> Tensor:
        view = as_mask("causal").bind(q.shape[2], k.shape[2])
        blocks = choose_keys(Call(q, k[:, :, ::8], view, 4, lists=2, covers=8, ends=True), engine)
        return choose_keys(Call(q, k, view, 9, lists=2, among=blocks, block=8), engine)

    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for n in (64, 96, 104, 160, 256):
        q, k = torch.randn(1, 4, n, 8), torch.randn(1, 2, n, 8)
        assert torch.equal(compiled(q, k), both(q, k))
    assert counter.frame_count <= 2
    for _ in range(3):
        torch.library.opcheck(
            torch.ops.tilewise.choose_keys.default, (*op.pack(_some_call("causal", torch.float32)), FAST[-1])
        )


def test_lists_of_booleans_compiled(fresh_compiler):
    keep = torch.rand(3, 5, 40) < 0.3
    compiled = torch.compile(compact, fullgraph=True, backend="eager")
    for most in (1, 7, 40):
        assert torch.equal(compiled(keep, most), compact(keep, most))
        assert torch.equal(compact(keep[0, 0], most), compact(keep, most)[0, 0])


def test_no_n_by_n_at_16384():
    """The torch engine holds some rows at a time."""
    n = 16_384
    call = Call(torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8), _view(Causal(), n, n), 16)
    for one in (call, replace(call, most=32)):
        assert allocations(lambda one=one: choose_keys(one, "torch"))[1] < 4 * n * n // 8


MEMORY = """
import torch
from pathlib import Path
from tilewise.kernels.choose_keys import Call, choose_keys
from tilewise.tiles import Causal
def peak(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
def run(n):
    view = Causal().bind(n, n)
    choose_keys(Call(torch.randn(1, 2, n, 32), torch.randn(1, 1, n, 32), view, 16), "native")
run(64)
before = peak(reset=True)
run(16384)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from Linux's /proc")
def test_resident_memory_at_16384_is_linear():
    """The native engine's own memory does not pass through PyTorch's allocator: that of the process is measured."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    n = 16_384
    assert 2 * n * 32 * 4 < int(done.stdout) < 8 * (3 * n * 32 * 4) + 16 * 2**20 < n * n


LESSER_CHECK = """
import random, torch
from tests.kernels.test_choose_keys import DTYPES, KINDS, ROWS, _row, _some_call
from tilewise.kernels.choose_keys import choose_keys
random.seed(1)
torch.manual_seed(1)
print(torch.backends.cpu.get_cpu_capability())
calls = [_some_call(kind, dtype) for kind in KINDS for dtype in DTYPES for _ in range(8)]
for call in [*calls, *(_row(scores, 77) for scores in ROWS.values())]:
    assert torch.equal(choose_keys(call, "native"), choose_keys(call, "definition")), call
print("all right")
"""


@pytest.mark.parametrize("name", LESSER)
def test_lesser_machines_are_right_too(name):
    done = subprocess.run(
        [sys.executable, "-c", LESSER_CHECK],
        env={**os.environ, **LESSER[name]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "all right" in done.stdout, done.stdout + done.stderr


def test_engines_run_or_raise_and_say_why():
    call = Call(torch.randn(1, 2, 9, 4), torch.randn(1, 1, 9, 4), _view(Causal(), 9, 9), 3)
    chosen = explain(call)
    assert chosen.engine == "native" and chosen.refused["torch"] == "native comes first"
    wide = replace(call, q=call.q.double(), k=call.k.double())
    assert explain(wide).engine == "torch" and "float32 at most" in explain(wide).refused["native"]
    with pytest.raises(
        EngineRefused, match="engine 'native' cannot run this call: computes in float32 at most"
    ):
        choose_keys(wide, "native")
    with pytest.raises(ValueError, match="engine must be 'auto' or one of"):
        choose_keys(call, "triton")
    elsewhere = replace(call, q=call.q.to("meta"), k=call.k.to("meta"))
    assert "runs on CPUs" in explain(elsewhere).refused["native"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top": 0}, ValueError, "top must be an integer >= 1, got 0"),
        ({"top": True}, ValueError, "top must be an integer >= 1, got True"),
        ({"covers": 0}, ValueError, "covers must be an integer >= 1, got 0"),
        ({"block": -1}, ValueError, "block must be an integer >= 1, got -1"),
        ({"most": 2}, ValueError, "most must be None or at least top, 3, got 2"),
        ({"most": 5, "ends": True}, ValueError, "most must be None"),
        ({"slope": 1.5}, ValueError, r"slope must be in \[0, 1\], got 1.5"),
        ({"lists": 3}, ValueError, "lists must divide the 4 heads of q and be a multiple of the 2 of k, got 3"),
        ({"lists": 1}, ValueError, "lists must divide the 4 heads of q and be a multiple of the 2 of k, got 1"),
        ({"q": torch.zeros(1, 4, 9, 5)}, ValueError, r"got \[1, 4, 9, 5\] and \[1, 2, 9, 4\]"),
        ({"k": torch.zeros(1, 2, 9, 4).double()}, TypeError, "share a floating dtype, got torch.float32 and"),
        ({"weight": torch.zeros(1, 4, 8)}, ValueError, r"weight must be \[1, 4, 9\], got \[1, 4, 8\]"),
        ({"covers": 2}, ValueError, "9 queries and 9 tokens, the call has 9 queries and 9 keys for 2 tokens each"),
        ({"among": torch.zeros(1, 2, 9, 3)}, ValueError, r"among must be int32 \[1, 2, 9, 'M'\], got"),
        ({"view": _view(TokenMask(torch.ones(1, 4, 9, 9) > 0), 9, 9)}, ValueError, "divide 2 lists, got .* 4"),
        ({"view": _view(Padding(torch.ones(3, 9) > 0), 9, 9)}, ValueError, "the view must be for batch 1 or 1"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    given = {
        "q": torch.zeros(1, 4, 9, 4),
        "k": torch.zeros(1, 2, 9, 4),
        "view": _view(Causal(), 9, 9),
        "top": 3,
    }
    with pytest.raises(error, match=message):
        Call(**{**given, "lists": 2, **change})


def test_products_are_counted():
    """The whole square without a mask, in rows and columns as computed; about half of it under a causal one."""
    n, counts = 1024, []
    for mask in (None, Causal()):
        native.scores_computed()
        choose_keys(Call(torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8), _view(mask, n, n), 5), "native")
        counts.append(native.scores_computed())
    assert counts[0] == n * n and n * n / 2 < counts[1] < 0.6 * n * n
