"""PISA: what unselected tiles give, that it errs less than leaving them out, and when the first order helps.

`explicit` and the checks below it serve the tests of other methods that read means as well.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import tilewise
from tests.conformance.common import ENGINES, over_budget, qkv, repeat, run_or_refuse, tile_of
from tilewise.attention import (
    Boxes,
    Layout,
    MeanPool,
    Means,
    Plan,
    Pooled,
    Share,
    Skip,
    Tiles,
    TopK,
    attend,
    plan,
)
from tilewise.attention.recipes.pisa import PISA, Edges, MomentPool
from tilewise.tiles import NONE, PARTIAL, Causal, Documents, Padding, Tiling, TokenMask, Window

N = 130
MASKS = {
    "none": None,
    "causal": "causal",
    "window": Causal() & Window(40, None),
    "documents": Causal() & Documents(torch.tensor([0, 30, 30, N])),
    "left padding": Causal() & Padding(torch.arange(N).ge(torch.tensor([[13], [40]]))),
    "right padding": Padding(torch.arange(N).lt(torch.tensor([[100], [61]]))),
    "any": TokenMask(torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.5),
}


def explicit(made: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """A plan's answer by its meaning: one softmax over all tokens and means that a query reads.

    In the inputs' dtype. Means are products with a matrix of averages made token by token; the first order is the
    mean of `(k - mean of its tile) v^T` over the tokens that a query reads as means. N x N, differentiable.
    """
    (b, heads, n_q, d), n_k = q.shape, k.shape[2]
    kk, vv = repeat(k, heads), repeat(v, heads)
    scale = d**-0.5 if scale is None else scale
    logits, values, shift = [], [], []
    for one in made.passes:
        rows = tile_of(one.tiles.q_tiling, one.q_order, b, heads, n_q)
        keep = repeat(one.tiles.keep, heads).expand(b, heads, -1, -1)
        at = torch.arange(b).view(b, 1, 1, 1), torch.arange(heads).view(1, heads, 1, 1), rows.unsqueeze(3)
        keys, own, weight = kk, vv, torch.zeros(b, heads, 1, n_k, dtype=q.dtype)
        if one.reads is None:
            columns = tile_of(one.tiles.k_tiling, one.k_order, b, heads, n_k)
        else:
            assert isinstance(one.reads, Means)
            average, counts = (x.to(q.dtype) for x in averages(one.reads, b, heads, n_k))
            keys, own, weight = average @ kk, average @ vv, counts.clamp(min=1).log().unsqueeze(2)
            columns = tile_of(one.tiles.k_tiling, None, b, heads, average.shape[2])
        columns_seen = repeat(one.view.tokens(), heads).expand(b, heads, n_q, keys.shape[2])
        seen = columns_seen & keep[(*at, columns.unsqueeze(2))]
        logits.append((q @ keys.mT * scale + weight).masked_fill(~seen, -torch.inf))
        values.append(own)
        moved = torch.zeros(b, heads, n_q, v.shape[3], dtype=q.dtype)
        if one.reads is not None and one.reads.slope:
            moved = first_order(seen, average, counts, q, kk, vv) * scale * one.reads.slope
        shift.append(moved)
    sizes = [x.shape[3] for x in logits]
    both = torch.cat(logits, 3)
    weights = both.softmax(-1).masked_fill(both == -torch.inf, 0).split(sizes, 3)
    return sum(w @ x + w.sum(-1, keepdim=True) * s for w, x, s in zip(weights, values, shift, strict=True))


def averages(reads: Means, b: int, heads: int, n_k: int) -> tuple[Tensor, Tensor]:
    """The matrix of averages `[b, heads, means, n_k]` and the tokens in each mean."""
    own = tile_of(reads.tiling, reads.order, b, heads, n_k)
    members = torch.nn.functional.one_hot(own, reads.tiling.count(n_k)).mT
    members = members * repeat(reads.seen, heads).unsqueeze(2)
    counts = members.sum(-1).double()
    return members / counts.clamp(min=1).unsqueeze(-1), counts


def first_order(seen: Tensor, average: Tensor, counts: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`q C`, with C the mean over the tokens of the means that a query reads."""
    members = (average > 0).to(q.dtype)  # [b, h, means, n]
    centred = k - members.mT @ (average @ k)
    moments = torch.einsum("bhtn,bhnd,bhne->bhtde", members, centred, v.to(q.dtype))
    tokens = (seen * counts.unsqueeze(2)).sum(-1, keepdim=True).clamp(min=1)
    return torch.einsum("bhqd,bhqt,bhtde->bhqe", q, (seen / tokens).to(q.dtype), moments)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def check_plan(method, mask, heads=4, kv_heads=2, n=N, d=8, b=2, engine="torch", seed=0) -> Plan:
    """Forward and gradients of a method on one engine equal the explicit formula; returns the plan."""
    q, k, v = qkv(b, heads, kv_heads, n, d=d, d_v=6, seed=seed)
    made = plan(method, q, k, mask=mask)
    run = run_or_refuse(engine, q, k, v, made)
    if run is None:
        return made
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = explicit(made, *leaves)
    d_out = torch.randn_like(want)
    wanted = [want, *torch.autograd.grad(want, leaves, d_out)]
    out = run(*leaves, None)
    got = [out, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]
    eps = torch.finfo(out.dtype).eps
    for name, mine, yours in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        mine, yours = mine.detach(), yours.detach()
        # Sums of n products are off by up to n eps of what is added up; gradients chain three such sums.
        slack = 8 * n * eps * float(yours.abs().max().clamp(min=1))
        assert float((mine.double() - yours).abs().max()) <= slack, name
    return made


def check_future(method, n=160, tile=64, dtype=torch.float32) -> None:
    """Tokens of later tiles never change earlier outputs: bit for bit, with the plan made from both inputs."""
    q, k, v = qkv(1, 4, 2, n, d=8, dtype=dtype)
    chosen = plan(method, q, k, mask="causal") if method.lookahead == "prompt" else method
    options = {} if isinstance(chosen, Plan) else {"mask": "causal"}
    first = tile * (n // tile)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, first:] = 50 * torch.randn_like(x[:, :, first:])
    before, after = (attend(*x, chosen, engine="torch", **options)[:, :, :first] for x in ((q, k, v), later))
    assert torch.equal(before, after)


def check_dtypes(method, n=150) -> None:
    """Each format errs at most twice as much as the explicit formula evaluated in it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = qkv(2, 4, 2, n, d=16, dtype=dtype)
        made = plan(method, q.double(), k.double(), mask="causal")
        want = explicit(made, q.double(), k.double(), v.double())
        out = attend(q, k, v, made)
        assert out.dtype == dtype
        assert over_budget(out, explicit(made, q, k, v), want) is None, dtype


def check_full(method) -> None:
    """Set to compute everything, a method is dense attention under any mask."""
    for mask in MASKS.values():
        q, k, v = qkv(2, 4, 2, N)
        torch.testing.assert_close(
            attend(q, k, v, method, mask=mask), attend(q, k, v, mask=mask), rtol=1e-12, atol=1e-12
        )


def check_lengths(method, unequal=((33, 5), (40, 1), (7, 0), (0, 7))) -> None:
    for n_q, n_k in (*((n, n) for n in (0, 1, 2, 15, 17, 33, 129)), *unequal):
        q, k, v = qkv(1, 2, 1, n_q, n_k, dtype=torch.float32)
        made = plan(method, q, k, mask="causal")
        got = attend(q, k, v, made, return_lse=True)
        assert got.out.shape == q.shape and got.out.isfinite().all()
        if n_q and n_k:
            torch.testing.assert_close(got.out, explicit(made, q, k, v))
        assert (got.out[:, :, : max(0, n_q - n_k)] == 0).all()
        assert (got.lse[:, :, : max(0, n_q - n_k)] == -torch.inf).all()


def check_compiles(method, lengths: tuple[int, ...] = (64, 97, 257)) -> None:
    """One whole graph, equal to eager bit for bit, and another for all further lengths."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, method, mask="causal"), fullgraph=True, backend=counter
    )
    for n in lengths:
        inputs = qkv(1, 4, 2, n, dtype=torch.float32)
        assert torch.equal(compiled(*inputs), attend(*inputs, method, mask="causal")), n
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@functools.lru_cache(maxsize=2)
def captured(n: int, layers: tuple[int, ...], skip: int = 0) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of some layers of the bundled language model, reading `n` bytes of its text from byte `skip` on."""
    from tilewise.models import capture, load_model

    model, tokenizer = load_model()
    text = (Path(tilewise.__file__).parent / "data/sample.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text[skip : skip + n + 8])["input_ids"][:n])
    return capture(model, tokens, layers=layers)


def least_share(made: Tiles, density: float, q: Tensor, k: Tensor, mask) -> Plan:
    """The plan of these stages at the least share of tiles, to a 256th, that is at least as dense."""
    low, high = 0, 256
    while high - low > 1:
        middle = (low + high) // 2
        enough = plan(replace(made, select=Share(middle / 256)), q, k, mask=mask).density >= density
        low, high = (low, middle) if enough else (middle, high)
    return plan(replace(made, select=Share(high / 256)), q, k, mask=mask)


SMALL = PISA(density=0.3, tile=16)
LAYERS = (2, 3, 4, 5)


def _orders(method: PISA) -> tuple[PISA, PISA, Tiles]:
    """Order 0, order 1, and order 1 with its sign turned."""
    return replace(method, taylor=0), method, replace(method.tiles(), rest=Pooled(-1.0))


@pytest.mark.evidence
@pytest.mark.parametrize("layer", LAYERS)
def test_each_order_errs_less_than_the_one_below_at_every_density(layer):
    """On q, k and v of a trained model: skipping > order 0 > order 1, skipping given at least as many scores.

    Control: with its sign turned, the first order makes order 0 worse.
    """
    q, k, v = captured(2048, LAYERS)[layer]
    dense = attend(q, k, v, mask="causal")
    for density in (0.05, 0.1, 0.2, 0.4):
        method = PISA(density)
        zero, one, turned = (error(attend(q, k, v, x, mask="causal"), dense) for x in _orders(method))
        as_dense = plan(replace(method, taylor=0), q, k, mask="causal").density
        skip = least_share(replace(method.tiles(), rest=Skip()), as_dense, q, k, "causal")
        assert as_dense <= skip.density < 1.1 * as_dense
        skipped = error(attend(q, k, v, skip, mask="causal"), dense)
        assert zero < 0.92 * skipped, (density, skipped, zero)
        assert one < 0.97 * zero, (density, zero, one)
        assert turned > 1.03 * zero, (density, zero, turned)


def _without_slope(k: Tensor, v: Tensor, size: int) -> Tensor:
    """Values of the same mean in each tile of `size` tokens, of which no part is a linear function of its keys."""
    k, v = (x.unflatten(2, (-1, size)).double() for x in (k, v))
    centred, rest = k - k.mean(3, keepdim=True), v - v.mean(3, keepdim=True)
    basis = torch.linalg.qr(centred).Q
    return (v - basis @ (basis.mT @ rest)).flatten(2, 3).to(torch.float32)


@pytest.mark.evidence
def test_the_first_order_lives_on_values_that_go_with_keys():
    """Keys at random, values a linear map of them and noise: the first order takes most of the error of order 0.

    Control: values without the part that goes with the keys of their tile, and nothing else changed. Then the first
    order adds nothing, with either sign.
    """
    g = torch.Generator().manual_seed(0)
    q, k, noise = (torch.randn(1, 2, 2048, 16, generator=g) for _ in range(3))
    v = (k @ torch.randn(16, 16, generator=g) + noise) / 4
    gains = []
    for values in (v, _without_slope(k, v, 32)):
        dense = attend(q, k, values)
        zero, one, turned = (error(attend(q, k, values, x), dense) for x in _orders(PISA(0.1, tile=32)))
        gains.append((1 - one / zero, 1 - turned / zero))
    (with_keys, wrong), without = gains
    assert with_keys > 0.5 and wrong < -0.5, gains
    assert max(map(abs, without)) < 1e-3, gains


@pytest.mark.evidence
def test_shuffled_values_of_a_trained_model_leave_the_first_order_little():
    """As the test before, on real heads: shuffled within tiles, values leave less than half of the gain."""
    g = torch.Generator().manual_seed(0)
    within = (torch.rand(32, 64, generator=g).argsort(-1) + 64 * torch.arange(32).view(-1, 1)).flatten()
    for layer in LAYERS:
        q, k, v = captured(2048, LAYERS)[layer]
        gains = []
        for values in (v, v[:, :, within]):
            dense = attend(q, k, values, mask="causal")
            zero, one, _ = (error(attend(q, k, values, x, mask="causal"), dense) for x in _orders(PISA(0.05)))
            gains.append(1 - one / zero)
        assert gains[1] < 0.5 * gains[0], (layer, gains)


@pytest.mark.evidence
def test_orders_are_those_of_a_taylor_expansion():
    """Keys drawn towards their tile's mean: order 0 errs as their spread does, order 1 as its square.

    The first order takes one matrix for all tiles, so this is so where tiles spread alike. Control: where each
    spreads in its own way, order 1 too falls as the spread.
    """
    d, tiles, size = 8, 8, 16

    def errors(spread: float, alike: bool) -> tuple[float, float]:
        g = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(1, 1, *shape, generator=g, dtype=torch.float64)

        q, (means, mean_values) = draw(32, d), (draw(tiles, 1, d) for _ in range(2))
        each = 1 if alike else tiles
        deviations, value_deviations = (
            x - x.mean(3, keepdim=True) for x in (draw(each, size, d), draw(each, size, d))
        )
        k = (means + spread * deviations).flatten(2, 3)
        v = (mean_values + value_deviations).flatten(2, 3)
        dense = attend(q, k, v)
        coarse = (Tiles(score=MeanPool(), select=TopK(1), tile=(16, 16), rest=Pooled(x)) for x in (0.0, 1.0))
        return tuple(error(attend(q, k, v, x), dense) for x in coarse)  # type: ignore[return-value]

    (zero, one), (zero_half, one_half) = errors(0.1, True), errors(0.05, True)
    assert zero / zero_half == pytest.approx(2, rel=0.05) and one / one_half == pytest.approx(4, rel=0.05)
    (_, one), (_, one_half) = errors(0.1, False), errors(0.05, False)
    assert one / one_half == pytest.approx(2, rel=0.1)


def _half_flat(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of which every other tile of 32 has one value for all its tokens, so that its mean says it all."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 2, 1024, 16, generator=g) for _ in range(2))
    v = (k @ torch.randn(2, 16, 16, generator=g) / 4).unflatten(2, (32, 32))
    v[:, :, ::2] = v[:, :, ::2].mean(3, keepdim=True)
    return q, k, v.flatten(2, 3)


@pytest.mark.evidence
def test_covariance_aware_selection_spends_where_means_fail():
    """At equal density the score that knows |H| errs less. Control: with |H| of other tiles it errs more."""
    for seed in range(3):
        q, k, v = _half_flat(seed)
        dense = attend(q, k, v)
        method = PISA(0.25, taylor=0, tile=32)
        shifted = v.roll(32, 2)  # the neighbouring tile's
        plain, aware, wrong = (replace(method, values=x) for x in (None, v, shifted))
        assert plan(plain, q, k).density == plan(aware, q, k).density == plan(wrong, q, k).density
        errors = [error(attend(q, k, v, x), dense) for x in (plain, aware, wrong)]
        assert errors[1] < 0.95 * errors[0] < 0.95 * errors[2], errors


def test_moment_score_is_its_formula():
    q, k, v = qkv(1, 2, 1, 40, d=8, d_v=5)
    view = Causal().bind(40, 40)
    layout = Layout(q, k, view, Tiling(16), Tiling(16), 0.3)
    among = layout.kinds() != NONE
    got = MomentPool(values=v).score(layout, among)[0]
    for head in range(2):
        logits = torch.full((3, 3), -torch.inf, dtype=torch.float64)
        for i in range(3):
            for j in range(i + 1):
                rows, columns = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
                keys = k[0, 0, columns]
                moment = (keys - keys.mean(0)).T @ v[0, 0, columns]
                pooled = 0.3 * q[0, head, rows].mean(0) @ keys.mean(0) + torch.tensor(len(keys)).log()
                logits[i, j] = pooled + (moment.norm() + 1e-5).log()
        torch.testing.assert_close(got[head], logits.softmax(-1), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"values must be \[1, 1, 40, D_v\].*got \[1, 2, 40, 5\]"):
        plan(PISA(values=v.expand(1, 2, -1, -1)), q, k)


def test_values_reach_the_score_in_tile_order():
    q, k, v = _half_flat(0)
    shuffled = torch.randperm(1024)
    boxes = Boxes((32, 32), (1, 32))
    one = plan(PISA(0.25, tile=32, values=v), q, k).tile_maps[0].keep
    other = plan(PISA(0.25, values=v, order=boxes), q, k).tile_maps[0].keep
    assert torch.equal(one, other)
    wrong = plan(PISA(0.25, values=v[:, :, shuffled], order=boxes), q, k).tile_maps[0].keep
    assert not torch.equal(one, wrong)


def test_tiles_that_the_mask_cuts_through_are_exact():
    q, k, _ = qkv(2, 4, 2, N)
    for mask in MASKS.values():
        made = plan(PISA(0.05, tile=16), q, k, mask=mask)
        layout = Layout(q, k, made.view, Tiling(16), Tiling(16), 1.0)
        kinds = layout.kinds().expand(2, 4, -1, -1)
        exact, coarse = (tiles.keep.expand(2, 4, -1, -1) for tiles in made.tile_maps)
        assert (exact | (kinds != PARTIAL)).all(), "a cut tile is left out"
        assert torch.equal(exact | coarse, kinds != NONE) and not (exact & coarse).any(), "not a partition"
    assert torch.equal(Edges().tiles(layout, kinds != NONE), layout.kinds() == PARTIAL)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("taylor", [0, 1])
def test_equals_the_explicit_formula(mask, taylor):
    check_plan(replace(SMALL, taylor=taylor), mask)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(engine):
    check_plan(SMALL, "causal", engine=engine)


@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (8, 2)], ids=str)
def test_groups(heads):
    check_plan(SMALL, "causal", *heads)


@pytest.mark.parametrize(("grid", "box", "before"), [((4, 4, 8), (2, 2, 4), 0), ((3, 5, 7), (2, 2, 4), 6)])
def test_boxes_of_a_video_even_and_uneven(grid, box, before):
    n = before + grid[0] * grid[1] * grid[2]
    check_plan(PISA(density=0.2, order=Boxes(grid, box, before)), None, n=n)
    q, k, v = qkv(n_q=n + 1)
    with pytest.raises(ValueError, match=f"has {n} tokens, got {n + 1}"):
        attend(q, k, v, PISA(order=Boxes(grid, box, before)))


def test_full_density_is_dense_and_reads_no_means():
    full = PISA(density=1.0, tile=16)
    assert len(plan(full, *qkv()[:2]).passes) == 1
    check_full(full)


@pytest.mark.parametrize("taylor", [0, 1])
def test_lengths_futures_and_formats(taylor):
    method = replace(SMALL, taylor=taylor)
    check_lengths(method)
    check_future(method)
    check_dtypes(method)
    assert SMALL.lookahead == "tile"


def test_compiles_whole():
    check_compiles(replace(SMALL, taylor=0))
    check_compiles(SMALL, lengths=(97,))


def test_rows_that_see_nothing():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 40))
    mask = Padding(torch.zeros(1, 40, dtype=torch.bool))
    got = attend(q, k, v, SMALL, mask=mask, return_lse=True)
    assert (got.out == 0).all() and (got.lse == -torch.inf).all()
    assert all((x == 0).all() for x in torch.autograd.grad(got.out.sum(), (q, k, v)))


def test_padding_may_hold_anything():
    q, k, v = qkv(1, 2, 2, 64, dtype=torch.float32)
    mask = Padding(torch.arange(64).lt(40).unsqueeze(0))
    outs = []
    for value in (0.0, 1e30):
        filled = [x.clone() for x in (k, v)]
        for x in filled:
            x[:, :, 40:] = value
        outs.append(attend(q, *filled, replace(SMALL, values=filled[1]), mask=mask))
    assert torch.equal(*outs) and outs[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density must be in"),
        ({"density": 1.5}, "density must be in"),
        ({"taylor": 2}, "taylor must be 0 or 1"),
        ({"tile": 0}, "tile must be an integer"),
        ({"tile": 1.5}, "tile must be an integer"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PISA(**options)


def test_what_means_cannot_do_is_refused():
    q, k, v = qkv(n_q=64)
    with pytest.raises(ValueError, match="takes no bias"):
        attend(q, k, v, SMALL, bias=torch.zeros(64, dtype=torch.float64))
    with pytest.raises(ValueError, match="takes no softcap"):
        attend(q, k, v, SMALL, softcap=5.0)
    assert attend(q, k, v, replace(SMALL, taylor=0), softcap=5.0).isfinite().all()
