"""NSA and FSA: the branches against the formulas written out, what each is needed for, the two loops counted."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tests.conformance.common import naive, over_budget, qkv, repeat
from tilewise.attention.native_sparse import BlockMLP, NativeSparseAttention, attend_blocks, loop_costs

N, LENGTH, STRIDE, BLOCK, TOP_N, WINDOW = 75, 8, 4, 12, 4, 11


def _layer(heads=4, kv_heads=2, dtype=torch.float64, seed=0) -> NativeSparseAttention:
    """A layer of small blocks whose compression is no plain mean."""
    torch.manual_seed(seed)
    layer = NativeSparseAttention(
        dim=10, heads=heads, kv_heads=kv_heads, head_dim=6, length=LENGTH, stride=STRIDE, block=BLOCK,
        top_n=TOP_N, window=WINDOW, hidden=5,
    )  # fmt: skip
    with torch.no_grad():
        for mlp in (layer.compress_k, layer.compress_v):
            mlp.places.normal_(std=0.5)
            mlp.last.weight.normal_()
        layer.q.weight.mul_(4)
    return layer.to(dtype)


def _blocks(mlp: BlockMLP, x: Tensor) -> Tensor:
    """Compression, block by block."""
    made = []
    for first in range(0, x.shape[2] - LENGTH + 1, STRIDE):
        block = x[:, :, first : first + LENGTH] + mlp.places
        hidden = nn.functional.gelu(block.flatten(2) @ mlp.first.weight.T + mlp.first.bias)
        made.append(block.mean(2) + hidden @ mlp.last.weight.T + mlp.last.bias)
    return torch.stack(made, 2)


def definition(
    layer: NativeSparseAttention, x: Tensor, summed: bool = True, forced: bool = True
) -> tuple[Tensor, Tensor]:
    """The layer by its formulas, N x N, and the tokens that the selected branch reads `[B, H_q, N, N]`.

    `summed=False` lets every query head choose for itself, `forced=False` forces no block: both are not NSA.
    """
    q, keys, values, gates = layer.project(x)
    b, heads, n, _ = q.shape
    ck, cv = _blocks(layer.compress_k, keys[0]), _blocks(layer.compress_v, values[0])
    ends = torch.arange(ck.shape[2]) * STRIDE + LENGTH - 1
    i = torch.arange(n).unsqueeze(1)
    seen = (ends <= i).expand(b, heads, n, -1)
    scores = (q @ repeat(ck, heads).mT / math.sqrt(layer.head_dim)).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen, 0).detach()
    blocks = -(-n // BLOCK)
    importance = torch.zeros(b, heads, n, blocks, dtype=x.dtype)
    for j in range(blocks):
        for m in range(BLOCK // STRIDE):
            for back in range(LENGTH // STRIDE):
                at = BLOCK // STRIDE * j + m - back
                if 0 <= at < weights.shape[3]:
                    importance[..., j] += weights[..., at]
    if summed:
        group = importance.unflatten(1, (layer.kv_heads, -1)).sum(2)
        importance = group.repeat_interleave(heads // layer.kv_heads, 1)
    read = torch.zeros(b, heads, n, n, dtype=torch.bool)
    for t in range(n):
        own = t // BLOCK
        for e in range(b):
            for head in range(heads):
                first = {0, own, max(own - 1, 0)} if forced else set()
                rest = sorted(set(range(own + 1)) - first, key=lambda j: -float(importance[e, head, t, j]))
                for j in [*first, *rest][:TOP_N]:
                    read[e, head, t, j * BLOCK : (j + 1) * BLOCK] = True
    j = torch.arange(n)
    read = read & (j <= i)
    near = (j <= i) & (i - j < WINDOW)
    parts = (
        naive(q, ck, cv, seen),
        naive(q, keys[1], values[1], read),
        naive(q, keys[2], values[2], near.expand(b, heads, n, n)),
    )
    out = sum(part * gates[..., c : c + 1] for c, part in enumerate(parts))
    return layer.out(out.transpose(1, 2).flatten(2)), read


@pytest.mark.evidence
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (4, 1)], ids=str)
def test_layer_and_its_gradients_equal_the_formulas(heads):
    """Output, the blocks read, and the gradient of every parameter and of the input.

    Controls: heads of a group that choose apart, and no forced blocks, read other tokens and give another answer.
    """
    layer = _layer(*heads)
    x = torch.randn(2, N, 10, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    want, read = definition(layer, x)
    d_out = torch.randn_like(want)
    wanted = [want, *torch.autograd.grad(want, leaves, d_out)]
    out = layer(x)
    got = [out, *torch.autograd.grad(out, leaves, d_out)]
    for mine, yours in zip(got, wanted, strict=True):
        # Sums of n products are off by up to n eps of what is added up; gradients chain a few such sums.
        slack = 32 * N * 2.3e-16 * float(yours.detach().abs().max().clamp(min=1))
        assert float((mine - yours).detach().abs().max()) <= slack
    q, keys, _, _ = layer.project(x)
    keep = layer.tiles(layer.choose(q, keys), N).keep.repeat_interleave(BLOCK, 3)[..., :N]
    assert torch.equal(keep.expand_as(read) & torch.ones(N, N, dtype=torch.bool).tril(), read)
    wrong = [definition(layer, x, forced=False)]
    if heads[0] > heads[1]:
        wrong.append(definition(layer, x, summed=False))
    for other, other_read in wrong:
        assert not torch.equal(other_read, read)
        assert float((other - want).detach().norm() / want.detach().norm()) > 1e-3


@pytest.mark.evidence
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)], ids=str)
def test_loop_over_key_blocks_equals_the_selected_branch(heads):
    """Forward and backward. Control: the blocks of other queries give another answer."""
    layer = _layer(*heads)
    q, keys, values, _ = layer.project(torch.randn(2, N, 10, dtype=torch.float64))
    index = layer.choose(q, keys)
    leaves = [x.detach().requires_grad_() for x in (q, keys[1], values[1])]
    want = layer.branches(leaves[0], (keys[0], leaves[1], keys[2]), (values[0], leaves[2], values[2]))[1]
    d_out = torch.randn_like(want)
    wanted = [want, *torch.autograd.grad(want, leaves, d_out)]
    out = attend_blocks(q=leaves[0], k=leaves[1], v=leaves[2], index=index, block=BLOCK)
    got = [out, *torch.autograd.grad(out, leaves, d_out)]
    for mine, yours in zip(got, wanted, strict=True):
        slack = 32 * N * 2.3e-16 * float(yours.detach().abs().max().clamp(min=1))
        assert float((mine - yours).detach().abs().max()) <= slack
    other = attend_blocks(*leaves, index.roll(BLOCK, 2), block=BLOCK)
    assert float((other - want).detach().norm() / want.detach().norm()) > 0.05


def _walked(index: Tensor, heads: int, block: int, rows: int) -> tuple[int, int, int]:
    """Products of both loops, walked out one matrix instruction at a time."""
    group, useful, by_queries, by_blocks = heads // index.shape[1], 0, 0, 0
    for chosen in index.flatten(0, 1):
        for row in chosen.tolist():
            for _ in [j for j in row if j >= 0]:
                useful += group * block
                by_queries += sum(rows * block for _ in range(0, group, rows))
        for j in range(int(chosen.max()) + 1):
            count = int((chosen == j).sum())
            by_blocks += group * sum(rows * block for _ in range(0, count, rows))
    return useful, by_queries, by_blocks


@pytest.mark.evidence
def test_loop_over_key_blocks_does_not_pad_small_groups():
    """Padded products against useful ones, for blocks that a layer chose, with 1 to 16 query heads in a group.

    The loop over queries computes 16 / group times what is asked for; the loop over blocks less than a tenth too
    much, whatever the group. Control: at 16 heads, where the first pads nothing, there is nothing to save.
    """
    for group in (1, 2, 4, 8, 16):
        torch.manual_seed(group)
        layer = NativeSparseAttention(16, 2 * group, 2, 8, length=8, stride=4, block=16, top_n=8, window=16)
        with torch.no_grad():
            q, keys, _, _ = layer.project(torch.randn(1, 1024, 16))
            index = layer.choose(q, keys)
        costs = loop_costs(index, heads=2 * group, block=16)
        assert costs[:3] == _walked(index, 2 * group, 16, 16)
        assert costs.by_queries == costs.useful * 16 // group
        assert costs.by_blocks < 1.1 * costs.useful
        saved = costs.by_queries / costs.by_blocks
        assert saved > 0.9 * 16 / group if group < 16 else saved <= 1
        # Blocks are loaded once, but parts of answers are written: as much as heads have, however small the block.
        assert (costs.moved_by_blocks < costs.moved_by_queries) == (group < 16)


def test_loop_costs_by_hand():
    """Three queries of two heads: all chose block 0, the last block 1 as well. Rows of 2, tiles of 2."""
    index = torch.tensor([[[[0, -1], [0, -1], [0, 1]]]])
    costs = loop_costs(index=index, heads=2, block=5, rows=2, head_dim=3, tile=2)
    assert costs.useful == 4 * 2 * 5
    assert costs.by_queries == 4 * 2 * 5  # two heads fill two rows
    assert costs.by_blocks == 2 * (4 + 2) * 5  # 3 queries in 4 rows, 1 in 2, for either head
    assert costs.moved_by_queries == 2 * 3 * 6 + 4 * 2 * 5 * 3
    assert costs.moved_by_blocks == 2 * 3 * 6 + 2 * (2 + 1) * 2 * 5 * 3 + 4 * 2 * (3 * 3 + 4)


CODE, TOKENS = 8, 128


def _batch(size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens, and three things to say of each `[size, TOKENS, 3, 2]`: what stands far away, near by, and overall.

    far: the value of one earlier token, farther back than the window, sought by the topic of its segment of 8
    tokens and a code of its own; values of a segment are alike in part. near: the mean of a value over the last 8
    tokens. overall: the mean of another over all tokens so far. Scaled to a variance of about 1.
    """

    def code(count: int) -> Tensor:
        return normalize(torch.randn(size, count, CODE, generator=g), dim=-1)

    own = torch.cat([code(TOKENS // 8).repeat_interleave(8, 1), code(TOKENS)], -1)
    values = torch.randn(size, TOKENS, 3, 2, generator=g)
    alike = torch.randn(size, TOKENS // 8, 2, generator=g).repeat_interleave(8, 1)
    values[:, :, 0] = (values[:, :, 0] + alike) / 2**0.5
    t = torch.arange(TOKENS)
    place = (torch.rand(size, TOKENS, generator=g) * (t - 23).clamp(min=1)).long().unsqueeze(-1)
    sought, far = (
        own.gather(1, place.expand(-1, -1, 2 * CODE)),
        values[:, :, 0].gather(1, place.expand(-1, -1, 2)),
    )
    near = nn.functional.pad(values[:, :, 1].unfold(1, 8, 1).mean(-1), (0, 0, 7, 0)) * 8**0.5
    overall = values[:, :, 2].cumsum(1) / (t + 1).view(1, -1, 1) ** 0.5
    return torch.cat([4 * own, 4 * sought, values.flatten(2)], -1), torch.stack([far, near, overall], 2)


@functools.cache
def _trained(without: int | None, steps: int = 250) -> tuple[float, ...]:
    """Squared error over variance of far, near and overall, on new sequences, after training with a branch shut."""
    torch.manual_seed(0)
    dim = 4 * CODE + 6
    layer = NativeSparseAttention(dim, 2, 1, 2 * CODE, length=8, stride=4, block=8, top_n=5, window=8)
    with (
        torch.no_grad()
    ):  # queries and keys start near the codes: how recall forms from nothing is not the question
        layer.q.weight.mul_(0.1)
        layer.q.weight[: 2 * CODE, 2 * CODE : 4 * CODE] += 1.2 * torch.eye(2 * CODE)
        keys = layer.kv.weight.view(2, 3, 2 * CODE, dim)[0]
        keys.mul_(0.1)
        keys[:, :, : 2 * CODE] += 1.2 * torch.eye(2 * CODE)
        if without is not None:
            layer.gates.bias[without::3] = -1e4
    model = nn.Sequential(layer, nn.Linear(dim, 6), nn.Unflatten(-1, (3, 2)))
    optimizer, g = torch.optim.Adam(model.parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    late = torch.arange(TOKENS) >= 32  # earlier tokens have nothing far away
    for _ in range(steps):
        x, y = _batch(8, g)
        loss = (model(x) - y)[:, late].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = _batch(32, torch.Generator().manual_seed(99))
    with torch.no_grad():
        errors = (model(x) - y)[:, late].square().mean((0, 1, 3)) / y[:, late].square().mean((0, 1, 3))
    return tuple(errors.tolist())


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("branch", "part"), [(0, 2), (1, 0), (2, 1)], ids=["compressed", "selected", "sliding"]
)
def test_each_branch_is_needed(branch, part):
    """Trained on one task, the layer says all three things; with a branch shut, trained alike, it cannot say one.

    Compressed blocks hold what is true overall, selected ones single tokens far away, the window what is near.
    """
    whole, without = _trained(None), _trained(branch)
    assert max(whole) < 0.25, whole
    assert without[part] > 0.35 and without[part] > 3 * whole[part], (whole, without)


def test_chunks_and_single_steps_equal_the_whole():
    layer = _layer(dtype=torch.float32)
    q, keys, values, gates = layer.project(torch.randn(2, N, 10))
    whole = layer.attend(q, keys, values, gates)
    for first, last in ((0, 1), (0, 20), (20, 49), (48, 49), (74, 75)):
        some = slice(first, last)
        state = [tuple(x[:, :, :last] for x in three) for three in (keys, values)]
        part = layer.attend(q[:, :, some], *state, gates[:, :, some])
        torch.testing.assert_close(part, whole[:, :, some])


def test_the_future_changes_nothing():
    layer = _layer(dtype=torch.float32)
    x = torch.randn(1, N, 10)
    for first in (1, 12, 13, 40):
        later = x.clone()
        later[:, first:] = 50 * torch.randn(1, N - first, 10)
        # Blocks of the compression are made by one product, whose rounding may depend on how many there are.
        assert torch.equal(layer(later)[:, :first], layer(x)[:, :first])


def test_chooses_the_first_and_last_blocks_and_no_later_one():
    layer = _layer()
    q, keys, _, _ = layer.project(torch.randn(2, N, 10, dtype=torch.float64))
    index = layer.choose(q, keys)
    assert index.shape == (2, 2, N, TOP_N)
    for t in range(N):
        own = t // BLOCK
        for row in index[:, :, t].flatten(0, 1).tolist():
            chosen = [j for j in row if j >= 0]
            assert len(set(chosen)) == len(chosen) == min(own + 1, TOP_N)
            assert {0, own, max(own - 1, 0)} <= set(chosen) <= set(range(own + 1))


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 12, 13, 33, 129])
def test_lengths(n):
    layer = _layer(dtype=torch.float32)
    x = torch.randn(2, n, 10, requires_grad=True)
    out = layer(x)
    assert out.shape == (2, n, 10) and out.isfinite().all()
    out.sum().backward()
    assert x.grad.isfinite().all()
    if n >= LENGTH:
        torch.testing.assert_close(out, definition(layer, x)[0])


def test_with_every_block_and_a_wide_window_two_branches_are_dense():
    torch.manual_seed(0)
    layer = NativeSparseAttention(10, 4, 2, 6, length=8, stride=4, block=12, top_n=100, window=100).double()
    q, keys, values, _ = layer.project(torch.randn(1, N, 10, dtype=torch.float64))
    every = torch.ones(N, N, dtype=torch.bool).tril().expand(1, 4, N, N)
    _, selected, sliding = layer.branches(q, keys, values)
    torch.testing.assert_close(selected, naive(q, keys[1], values[1], every))
    torch.testing.assert_close(sliding, naive(q, keys[2], values[2], every))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formats(dtype):
    """Every branch, for the same choice, errs at most twice as much as textbook attention in that format."""
    q, k, v = qkv(1, 4, 2, N, d=6, dtype=dtype)
    layer = _layer(dtype=dtype)
    index = layer.choose(q, (k, k, k))
    read = layer.tiles(index, N).keep.repeat_interleave(BLOCK, 3)[..., :N].expand(1, 4, N, N)
    read = read & torch.ones(N, N, dtype=torch.bool).tril()
    _, selected, _ = layer.branches(q, (k, k, k), (v, v, v))
    want = naive(q.double(), k.double(), v.double(), read)
    for got in (selected, attend_blocks(q, k, v, index, BLOCK)):
        assert got.dtype == dtype
        assert over_budget(got, naive(q, k, v, read), want) is None


def test_blocks_in_the_future_are_no_reading():
    q, k, v = qkv(1, 2, 2, 24)
    index = torch.full((1, 2, 24, 1), 1)
    out = attend_blocks(q, k, v, index, block=12)
    assert (out[:, :, :12] == 0).all() and out.isfinite().all()


def test_compression_is_a_mean_at_first():
    mlp = BlockMLP(heads=2, head_dim=4, length=6, stride=3, hidden=7)
    x = torch.randn(1, 2, 20, 4)
    torch.testing.assert_close(mlp(x), x.unfold(2, 6, 3).mean(-1))
    assert mlp.count(20) == 5 and mlp.count(5) == 0 and mlp(x[:, :, :5]).shape == (1, 2, 0, 4)
    assert mlp.ends(20, x.device).tolist() == [5, 8, 11, 14, 17]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads must be an integer >= 1, got 0"),
        ({"heads": 3}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"top_n": 1.5}, "top_n must be an integer >= 1, got 1.5"),
        ({"length": 9}, "stride must divide length and block, got 4, 9 and 16"),
        ({"block": 18}, "stride must divide length and block, got 4, 8 and 18"),
        ({"window": True}, "window must be an integer >= 1, got True"),
    ],
)
def test_bad_settings(options, message):
    good = {"dim": 8, "heads": 4, "kv_heads": 2, "head_dim": 4, "length": 8, "stride": 4, "block": 16}
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(**{**good, **options})


def test_bad_input():
    layer = _layer(dtype=torch.float32)
    q, k, v = qkv(1, 4, 2, 20, d=6, dtype=torch.float32)
    with pytest.raises(ValueError, match="keys must be three tensors, one for each branch, got 2"):
        layer.attend(q, (k, k), (v, v, v), torch.ones(1, 4, 20, 3))
    for options, message in (
        ({"heads": 3, "block": 4}, "heads must be a multiple of the 2 kv heads, got 3"),
        ({"heads": 2, "block": 0}, "block must be an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            loop_costs(torch.zeros(1, 2, 3, 1, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match="length must be a multiple of stride"):
        BlockMLP(1, 4, 6, 4)
    with pytest.raises(ValueError, match="hidden must be >= 1"):
        BlockMLP(1, 4, 6, 3, 0)
