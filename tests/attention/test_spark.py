"""Spark: the Gaussian threshold's counts and cost, and attention to what it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.attention.compared import captured
from tests.conformance.common import exact, grid, qkv, repeat, with_grads
from tests.conformance.weighted import MASKS, N, error
from tilewise.attention import Centroid, Own, Tiles, attend, plan
from tilewise.attention.recipes.spark import Spark, spark_attention
from tilewise.attention.statistical import StatisticalTopK
from tilewise.attention.token_choice import lists_plan
from tilewise.kernels.choose_keys.compact import compact
from tilewise.tiles import Causal, Padding, Window

SMALL = Spark(top_k=12, rank=4)


def _heavy(rows: int, n: int) -> Tensor:
    """Log-normal numbers: few very large ones stretch the deviation."""
    return (2 * torch.randn(rows, n)).exp()


@pytest.mark.evidence
@pytest.mark.parametrize("n", [256, 1024, 4096])
@pytest.mark.parametrize("share", [0.02, 0.08, 0.25])
def test_expected_count_on_gaussian_scores(n, share):
    """On average k, whatever mean and spread, and varying less from row to row than a binomial count.

    The tolerance is 4 deviations of the mean of so many binomial counts, and half a number for the deviation, which
    is estimated. Controls: on heavy-tailed scores the average is less than half of k (at a share of 2 % both fall
    into the tail, and nothing is said); an exact top-k takes k of both.
    """
    k = round(share * n)
    rows = 4000 * 256 // n
    select = StatisticalTopK(k)
    spread, shift = torch.rand(rows, 1).add(0.1) * 50, 100 * torch.randn(rows, 1)
    gaussian = torch.randn(rows, n, dtype=torch.float64) * spread + shift
    counts = select.keep(gaussian).sum(-1).double()
    deviation = math.sqrt(k * (1 - k / n))
    assert abs(float(counts.mean()) - k) < 4 * deviation / math.sqrt(rows) + 0.5
    assert float(counts.std()) < deviation
    heavy = _heavy(rows, n)
    if share >= 0.08:
        assert float(select.keep(heavy).sum(-1).double().mean()) < 0.5 * k
    for x in (gaussian, heavy):
        assert bool((x >= x.topk(k, -1).values[:, -1:]).sum(-1).eq(k).all())


@pytest.mark.evidence
def test_what_is_kept_is_the_top():
    """Whatever is kept is no smaller than what is not: the choice is an exact top-k for its own count."""
    for x in (torch.randn(50, 300), _heavy(50, 300)):
        kept = StatisticalTopK(30).keep(x)
        for row, keep in zip(x, kept):
            assert keep.any() and row[keep].min() >= row[~keep].max()


class _Reads(TorchDispatchMode):
    """Counts the numbers that operations read, and notes which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.numbers += sum(x.numel() for x in tree_flatten(args)[0] if isinstance(x, Tensor))
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _reads(call, n: int) -> _Reads:
    x = torch.randn(16, n)
    with _Reads() as reads:
        call(x)
    return reads


@pytest.mark.evidence
def test_linear_time_without_a_sort():
    """Numbers read double with n, and no operation sorts or ranks; lists are made of it in linear time as well.

    Control: the exact top-k is made by one that does.
    """
    sorts = {"sort", "topk", "argsort", "kthvalue", "msort", "unique"}
    for call in (StatisticalTopK(40).soft, lambda x: compact(StatisticalTopK(40).keep(x), 80)):
        few, many = _reads(call, 4096), _reads(call, 8192)
        assert not few.names & sorts
        assert 1.9 < many.numbers / few.numbers < 2.002  # the lists themselves do not grow
    assert _reads(lambda x: x.topk(40, -1), 4096).names & sorts


@pytest.mark.evidence
def test_gradients_pass_through_the_threshold():
    """To 1e-6 of finite differences, mean and deviation included. Control: with a fixed threshold they differ."""
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    select = StatisticalTopK(k=8)
    assert torch.autograd.gradcheck(select.soft, (x,))
    d_out = torch.randn(3, 40, dtype=torch.float64)
    (whole,) = torch.autograd.grad((select.soft(x) * d_out).sum(), x)
    fixed = (x - select.threshold(x).detach()).clamp(min=0)
    (alone,) = torch.autograd.grad((fixed * d_out).sum(), x)
    assert float((whole - alone).abs().max()) > 0.01
    assert (alone[fixed == 0] == 0).all() and (whole[fixed == 0] != 0).all()


@pytest.mark.evidence
@pytest.mark.parametrize("layer", [1, 2, 3, 4, 5])
def test_half_the_channels_find_keys_on_a_trained_model(layer):
    """q, k and v of the bundled model, about 64 keys for each of 2,048 queries.

    The predictor sees half of the channels, of a model that was not trained for it: it errs less than as many
    tokens drawn at random (the control), and more than all channels do. With all channels the threshold errs at
    most 5 % more than an exact top-k that reads as many keys per query; in layer 1, whose scores have heavy
    tails, a fifth.
    """
    q, k, v = captured(2048, (1, 2, 3, 4, 5))[layer]
    dense = attend(q, k, v, mask="causal")
    view = Causal().bind(2048, 2048)
    scores = (q @ repeat(k, 4).mT).masked_fill(~view.tokens(), -torch.inf)
    made = {rank: plan(Spark(64, rank), q, k, mask="causal") for rank in (None, 64)}
    kept = float((made[64].passes[0].reads.index >= 0).sum(-1).double()[:, :, 64:].mean())

    def best(x: Tensor, count: int) -> float:
        top, index = x.topk(count, -1)
        lists = lists_plan(index.masked_fill(top == -torch.inf, -1), view)
        return error(attend(q, k, v, lists, mask="causal"), dense)

    half, full = (error(attend(q, k, v, x, mask="causal"), dense) for x in made.values())
    drawn = torch.rand(scores.shape).masked_fill(scores == -torch.inf, -torch.inf)
    random, exactly = best(drawn, 64), best(scores, math.ceil(kept))
    assert full < half < random
    assert 48 < kept < 80 and full < (1.3 if layer == 1 else 1.05) * exactly


@pytest.mark.parametrize("forced", [False, True])
def test_as_a_select_stage(forced):
    """Any score of tiles can be cut by it; forced tiles are chosen in addition."""
    scores, among = torch.randn(2, 3, 20, 64), torch.rand(2, 3, 20, 64) < 0.8
    must = torch.zeros_like(among)
    must[..., 5] = forced
    keep = StatisticalTopK(8).select(scores, among, must & among)
    assert torch.equal(keep, (StatisticalTopK(8).keep(scores, among) | must) & among)
    q, k, v = qkv(1, 2, 2, 128)
    tiles = Tiles(score=Centroid(), select=StatisticalTopK(2), tile=(8, 8), always=(Own(),))
    made = plan(tiles, q, k, mask="causal")
    assert made.density < 0.5 and tiles.lookahead == "tile"
    assert attend(q, k, v, made).isfinite().all()


def test_the_threshold_is_its_formula():
    x = torch.randn(5, 33, dtype=torch.float64)
    among = torch.rand(5, 33) < 0.7
    got = StatisticalTopK(6).threshold(x, among)
    for row, some, have in zip(x, among, got):
        y = row[some]
        quantile = torch.distributions.Normal(0.0, 1.0).icdf(
            torch.tensor(1 - 6 / len(y), dtype=torch.float64)
        )
        assert float(have) == pytest.approx(float(min(y.mean() + y.std() * quantile, y.max())), abs=1e-9)


def test_rows_of_few_and_of_equal_numbers():
    select = StatisticalTopK(4)
    assert select.keep(torch.randn(2, 4)).all() and select.soft(torch.ones(2, 3)).eq(1).all()
    assert select.keep(torch.full((2, 9), 0.1)).any(-1).all()  # rounding leaves no row without
    assert select.keep(torch.zeros(2, 0)).shape == (2, 0) and select.threshold(torch.zeros(2, 0)).shape == (
        2,
        1,
    )
    assert not select.keep(torch.randn(2, 9), torch.zeros(2, 9, dtype=torch.bool)).any()
    assert select.soft(torch.randn(2, 9).bfloat16()).dtype == torch.bfloat16


def test_compact_lists_places_in_order():
    keep = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    assert compact(keep, 3).tolist() == [[0, 2, 3], [-1, -1, -1], [1, 2, 3]]
    assert compact(keep, 4).tolist() == [[0, 2, 3, -1], [-1] * 4, [0, 1, 2, 3]]
    assert compact(keep[:, :0], 2).tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize("method", [SMALL, Spark(top_k=5, rank=8, most=6), Spark(top_k=20)], ids=str)
def test_reads_what_lies_above_the_threshold(method):
    n = 70
    q, k, _ = qkv(2, 4, 2, n)
    for mask in (Causal(), None, Causal() & Window(30, None)):
        made = plan(method, q, k, mask=mask)
        pairs, seen = grid(made, 2, 4, n, n), made.view.tokens().expand(2, 4, n, n)
        rank = 4 if method.rank is None else method.rank
        scores = q[..., :rank] @ repeat(k, 4)[..., :rank].mT
        want = StatisticalTopK(method.top_k).keep(scores, seen)
        most = 2 * method.top_k if method.most is None else method.most
        want &= want.flip(-1).cumsum(-1).flip(-1) <= most
        assert torch.equal(pairs, want)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_is_attention_over_its_lists_under_any_mask(mask, biased):
    q, k, v = qkv(2, 4, 2, N)
    bias = torch.randn(1, 4, N, N, dtype=torch.float64) if biased else None
    made, d_out = plan(SMALL, q, k, mask=mask), torch.randn_like(q)
    pairs = grid(made, 2, 4, N, N)
    assert not (pairs & ~made.view.tokens()).any()
    got = with_grads(lambda q, k, v, bias: attend(q, k, v, made, bias=bias), q, k, v, d_out, bias)
    exact(q, k, v, pairs, d_out, bias).check(got)


def _by_hand(q: Tensor, k: Tensor, v: Tensor, top_k: int, rank: int, seen: Tensor) -> Tensor:
    """The paper's attention over the whole grid."""
    heads, d = q.shape[1], q.shape[3]
    k, v = repeat(k, heads), repeat(v, heads)
    first, second = q[..., :rank] @ k[..., :rank].mT, q[..., rank:] @ k[..., rank:].mT
    keep = StatisticalTopK(top_k).keep(first.detach(), seen)
    weights = (first / rank**0.5).masked_fill(~keep, -torch.inf).softmax(-1).masked_fill(~keep, 0)
    return (weights * torch.nn.functional.softplus(second / (d - rank) ** 0.5)) @ v


@pytest.mark.parametrize("mask", [None, "causal", "padded"])
def test_the_papers_own_attention(mask):
    """Against its formula over the whole grid, gradients too; rows that see nothing give 0."""
    n = 60
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, n, d=8, d_v=5))
    if mask == "padded":
        mask = Causal() & Padding(torch.arange(n).ge(torch.tensor([[0], [9]])))
    seen = (Causal() if mask == "causal" else mask).bind(n, n).tokens() if mask else torch.ones(n, n).bool()
    got = spark_attention(q=q, k=k, v=v, top_k=10, rank=5, mask=mask)
    want = _by_hand(q, k, v, 10, 5, seen.expand(2, 4, n, n))
    torch.testing.assert_close(got, want)
    d_out = torch.randn_like(got)
    for one, two in zip(
        torch.autograd.grad(got, (q, k, v), d_out), torch.autograd.grad(want, (q, k, v), d_out)
    ):
        torch.testing.assert_close(one, two)
        assert one.isfinite().all()
    if mask not in (None, "causal"):
        assert (got[1, :, :9] == 0).all()


def test_the_papers_own_attention_in_other_formats_and_lengths():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q, k, v = qkv(1, 2, 1, 40, dtype=dtype)
        out = spark_attention(q, k, v, top_k=8, mask="causal")
        want = _by_hand(*(x.double() for x in (q, k, v)), 8, 4, torch.ones(40, 40).tril().bool())
        assert out.dtype == dtype
        assert (
            float((out.double() - want).abs().max())
            < 4 * torch.finfo(dtype).eps * float(want.abs().max()) * 40
        )
    for n_q, n_k in ((0, 0), (0, 5), (5, 0), (1, 1), (1, 9), (9, 3)):
        out = spark_attention(*qkv(1, 2, 1, n_q, n_k, dtype=torch.float32), top_k=4, mask="causal")
        assert out.shape == (1, 2, n_q, 8) and out.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"top_k": 9, "most": 8}, "most must be an integer >= 9, got 8"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Spark(**options)


def test_other_bad_input():
    q, k, v = qkv(1, 2, 2, 9)
    with pytest.raises(ValueError, match="rank must be at most head_dim 8, got 9"):
        attend(q, k, v, Spark(rank=9))
    with pytest.raises(ValueError, match="below head_dim 8, got 8"):
        spark_attention(q, k, v, rank=8)
    with pytest.raises(ValueError, match="k must be an integer >= 1, got 0"):
        StatisticalTopK(k=0)
