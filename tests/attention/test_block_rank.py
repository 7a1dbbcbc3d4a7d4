"""BlockRank: its mask against the grid, linear cost, no order among documents, what the auxiliary loss teaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, silu

from tests.conformance.common import exact, qkv, widest
from tilewise.attention import attend, plan
from tilewise.attention.block_rank import BlockRank, ranking_loss
from tilewise.tiles import Causal, Documents, Mask, Padding, TileMap


def _grid(instruction: int, documents: list[int], query: int, extra: int = 0) -> Tensor:
    """Who sees whom, token by token, as the paper says it."""
    names = ["instruction"] * instruction
    for number, length in enumerate(documents):
        names += [f"document {number}"] * length
    names += ["query"] * (query + extra)
    seen = torch.zeros(len(names), len(names), dtype=torch.bool)
    for i, asking in enumerate(names):
        for j, asked in enumerate(names[: i + 1]):
            seen[i, j] = asking == "query" or asked in (asking, "instruction")
    return seen


PROMPTS = [
    (3, [4, 5, 2, 4], 6),
    (0, [4, 5], 3),
    (5, [], 3),
    (2, [0, 3, 0, 0, 4], 2),
    (2, [3, 3, 3], 0),
    (0, [], 0),
    (1, [1], 1),
    (17, [16, 15, 33, 1], 20),
]


@pytest.mark.evidence
@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_mask_is_its_grid(prompt):
    """Boxes say what the grid says, for whole prompts, for their last tokens and for an answer being decoded.

    Controls: neither causal attention nor documents that miss the instruction do.
    """
    mask = BlockRank.of(*prompt)
    want = _grid(*prompt, extra=3)
    n = len(want)
    for total, last in ((n - 3, n - 3), (n, n), (n - 3, min(2, n - 3)), (n, 1)):
        view = mask.bind(last, total)
        assert view.dense is None and view.lo.shape[-1] == 3, "a few integers per token"
        assert torch.equal(view.tokens()[0, 0], want[total - last : total, :total])
    if len(prompt[1]) > 1 and prompt[0]:
        assert not torch.equal(Causal().bind(n, n).tokens()[0, 0], want)
        whole = Documents(mask.cu_seqlens) & Causal()
        assert not torch.equal(whole.bind(n - 3, n - 3).tokens()[0, 0], want[:-3, :-3])


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["native", "torch", "definition"])
def test_attention_is_that_of_the_grid(engine):
    """Output and gradients on every engine, with grouped heads and uneven documents; and a batch of two prompts."""
    prompt = (17, [16, 15, 33, 1], 20)
    q, k, v = (x.to(widest(engine)).requires_grad_() for x in qkv(2, 4, 2, 102, d=8))
    d_out = torch.randn(2, 4, 102, 8, dtype=torch.float64)
    want = exact(q, k, v, _grid(*prompt), d_out)
    out = attend(q, k, v, mask=BlockRank.of(*prompt), engine=engine)
    grads = torch.autograd.grad(out, (q, k, v), d_out.to(out.dtype))
    want.check(dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)), out.dtype)
    other = (5, [40, 0, 0, 20], 37)
    starts = torch.stack([BlockRank.of(*p).cu_seqlens for p in (prompt, other)])
    seen = torch.stack([_grid(*prompt), _grid(*other)]).unsqueeze(1)
    both = attend(q, k, v, mask=BlockRank(starts.int()), engine=engine)
    exact(q, k, v, seen).check({"out": both}, both.dtype)


def _cost(mask: Mask, n: int, tile: int = 64) -> float:
    view = mask.bind(n, n)
    return float(TileMap.everything(n, n, tile=(tile, tile)).cost(view)[1])


@pytest.mark.evidence
@pytest.mark.parametrize("length", [64, 100])
def test_cost_is_linear_in_documents(length):
    """Scores in visible tiles: each document costs the same. Control: causal attention grows quadratically."""
    counts = [8, 16, 32, 64]
    prompts = [(64, [length] * count, 64) for count in counts]
    sizes = [128 + length * count for count in counts]
    ours = [_cost(BlockRank.of(*p), n) for p, n in zip(prompts, sizes, strict=True)]
    causal = [_cost(Causal(), n) for n in sizes]
    if length == 64:  # a document sees the instruction and itself, the query one tile of each
        assert ours == [64 * 64 * (1 + 2 * count + 1 * count + 2) for count in counts]
    assert 1.8 < ours[3] / ours[2] < 2.1 and causal[3] / causal[2] > 3.6
    assert ours[3] < causal[3] / (5 if length == 64 else 3)


@pytest.mark.evidence
def test_other_documents_are_not_read():
    """NaN in one document reaches its own rows and the query's, and not a bit of any other document's.

    Control: under causal attention it reaches everything after it.
    """
    prompt, n = (128, [128] * 4, 128), 768
    mask, hurt = BlockRank.of(*prompt), slice(256, 384)
    q, k, v = qkv(1, 2, 1, n, d=16, dtype=torch.float32)
    clean = attend(q, k, v, mask=mask)
    for x in (k, v):
        x[:, :, hurt] = torch.nan
    got = attend(q, k, v, mask=mask)
    rows = torch.arange(n)
    reached = (rows // 128 == 2) | (rows // 128 == 5)
    assert torch.equal(got[:, :, ~reached], clean[:, :, ~reached])
    assert got[:, :, reached].isnan().all()
    assert attend(q, k, v, mask="causal")[:, :, 256:].isnan().all()


class Ranker(nn.Module):
    """A small decoder with rotary positions; returns logits and the middle layer's queries and keys."""

    def __init__(self, vocabulary: int, width: int = 32, heads: int = 2, layers: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            parts = {"before": nn.RMSNorm(width), "qkv": nn.Linear(width, 3 * width, bias=False)}
            parts |= {"out": nn.Linear(width, width, bias=False), "between": nn.RMSNorm(width)}
            parts |= {"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)}
            self.layers.append(nn.ModuleDict(parts))
        self.last = nn.RMSNorm(width)

    def forward(self, tokens: Tensor, mask: Mask, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, seen = self.embed(tokens), []
        for layer in self.layers:
            parts = layer["qkv"](layer["before"](x)).chunk(3, -1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
            q, k = _rotate(q, positions), _rotate(k, positions)
            seen.append((q, k))
            x = x + layer["out"](attend(q, k, v, mask=mask).transpose(1, 2).flatten(2))
            x = x + layer["down"](silu(layer["up"](layer["between"](x))))
        return self.last(x) @ self.embed.weight.T, *seen[len(seen) // 2]


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, x.shape[3], 2, dtype=x.dtype) / x.shape[3])
    angles = positions.to(x.dtype).unsqueeze(-1) * frequencies
    c, s, even, odd = angles.cos(), angles.sin(), x[..., ::2], x[..., 1::2]
    return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)


@pytest.mark.evidence
def test_order_of_documents_moves_their_relevance_and_nothing_else():
    """A whole model with shared positions: permuted documents have permuted relevance, and the same next word.

    Controls: causal attention, sequential positions, and both, as a plain model has them, do not.
    """
    torch.manual_seed(1)
    model = Ranker(60).double()
    lengths, order = [4, 7, 5, 6, 3], [3, 0, 4, 1, 2]
    start, *documents, query = torch.randint(60, (30,)).split([2, *lengths, 3])

    def run(order: list[int], causal: bool, shared: bool) -> tuple[Tensor, Tensor]:
        prompt = torch.cat([start, *(documents[i] for i in order), query]).unsqueeze(0)
        ranked = BlockRank.of(2, [lengths[i] for i in order], 3)
        positions = ranked.positions(query_start=64) if shared else torch.arange(30)
        with torch.no_grad():
            logits, q, k = model(prompt, Causal() if causal else ranked, positions)
        return ranked.relevance(q[:, :, -2:], k)[0], logits[0, -1]

    for causal, shared in ((False, True), (True, True), (False, False), (True, False)):
        relevance, word = run(list(range(5)), causal, shared)
        permuted, same_word = run(order, causal, shared)
        moved = float((permuted - relevance[order]).abs().max() / relevance.max())
        changed = float((same_word - word).abs().max() / word.abs().max())
        if shared and not causal:
            assert moved < 1e-12 and changed < 1e-12, (moved, changed)
        else:
            assert moved > 1e-3 and changed > 1e-3, (causal, shared, moved, changed)
        assert float(relevance.sum()) == pytest.approx(1)


WORDS, NAMES, SIZE = 48, 24, 3  # a document is its name and three words


def _prompts(count: int, documents: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts `[count, N]`, the relevant document, and its name, which is the answer.

    The query is two words of one document. Words differ between and within the documents of a prompt where there
    are enough of them.
    """

    def draw(most: int, size: int) -> Tensor:
        return torch.stack([torch.randperm(most, generator=g)[:size] for _ in range(count)])

    repeats = -(-documents * SIZE // WORDS)
    words = torch.cat([draw(WORDS, WORDS) for _ in range(repeats)], 1)[:, : documents * SIZE]
    words, names = words.view(count, documents, SIZE), draw(NAMES, documents) + WORDS
    right, rows = torch.randint(documents, (count,), generator=g), torch.arange(count)
    asked = words[rows, right].gather(1, draw(SIZE, 2))
    begin = torch.full((count, 1), WORDS + NAMES)
    texts = torch.cat([names.unsqueeze(2), words], 2).flatten(1)
    return torch.cat([begin, texts, begin + 1, asked], 1), right, names[rows, right]


def _ranking(documents: int) -> tuple[BlockRank, Tensor]:
    mask = BlockRank.of(1, [1 + SIZE] * documents, 3)
    return mask, mask.positions(query_start=64)


def _train(weight: float, seed: int) -> Ranker:
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = Ranker(WORDS + NAMES + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 160)
    mask, positions = _ranking(8)
    for _ in range(160):
        tokens, right, name = _prompts(24, 8, g)
        logits, q, k = model(tokens, mask, positions)
        relevance = mask.relevance(q[:, :, -2:], k)
        loss = cross_entropy(logits[:, -1], name) + weight * ranking_loss(relevance, one_hot(right, 8).bool())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model


def _reciprocal_rank(model: Ranker, documents: int) -> float:
    """Mean of 1 / rank of the relevant document among new prompts, by the middle layer's attention."""
    tokens, right, _ = _prompts(256, documents, torch.Generator().manual_seed(99))
    mask, positions = _ranking(documents)
    with torch.no_grad():
        _, q, k = model(tokens, mask, positions)
    relevance = mask.relevance(q[:, :, -2:], k)
    ranks = (relevance >= relevance.gather(1, right.unsqueeze(1))).sum(1)
    return float((1 / ranks).mean())


@pytest.mark.evidence
def test_the_auxiliary_loss_makes_attention_rank():
    """With the authors' weight 0.1 beside the usual loss, attention finds the document; it ranks twice as many too.

    Control: the same model, prompts and steps without it, which stays where guessing is, H_n / n for n documents.
    """
    with_loss, without = _train(0.1, 0), _train(0.0, 0)
    for documents in (8, 16):
        guess = sum(1 / rank for rank in range(1, documents + 1)) / documents
        mine, control = _reciprocal_rank(with_loss, documents), _reciprocal_rank(without, documents)
        assert mine > 0.9 and abs(control - guess) < 0.2, (documents, mine, control, guess)


@pytest.mark.evidence
@pytest.mark.parametrize("group", [1, 3])
def test_relevance_is_the_share_of_attention(group):
    """Against weights of the whole map, renormalised over documents, and against what the kernel gives for each."""
    prompt = (5, [4, 9, 0, 2], 6)
    mask, heads = BlockRank.of(*prompt), 2 * group
    q, k, v = qkv(2, heads, 2, 26, d=8)
    scores = (q @ k.repeat_interleave(group, 1).mT * 8**-0.5).masked_fill(~_grid(*prompt), -torch.inf)
    weights = scores.softmax(-1)[:, :, [22, 25]]
    parts = torch.stack([x.sum(-1) for x in weights.split([5, 4, 9, 0, 2, 6], -1)[1:-1]], -1)
    want = (parts / parts.sum(-1, keepdim=True)).mean((1, 2))
    chosen = q[:, :, [22, 25]]
    torch.testing.assert_close(mask.relevance(chosen, k), want)
    assert not torch.allclose(mask.relevance(q[:, :, [22, 24]], k), want, rtol=1e-2)
    lse = [attend(chosen, x, x, return_lse=True).lse for x in k.split([5, 4, 9, 0, 2, 6], 2)[1:-1]]
    mass = torch.stack(lse, -1).double().softmax(-1).mean((1, 2))
    torch.testing.assert_close(mass, want, rtol=1e-5, atol=1e-7)
    later = torch.cat([k, torch.full_like(k, torch.nan)], 2)
    assert torch.equal(mask.relevance(chosen, later), mask.relevance(chosen, k)), "reads documents only"
    torch.testing.assert_close(mask.relevance(chosen * 2, k, scale=0.5 * 8**-0.5), want)


def test_relevance_and_loss_are_differentiable_and_batched():
    starts = torch.tensor([[0, 2, 5, 9, 12], [0, 0, 4, 4, 12]])
    mask = BlockRank(cu_seqlens=starts)
    q, k = (x.requires_grad_() for x in qkv(2, 2, 1, 12, d=4)[:2])
    for b in range(2):
        alone = BlockRank(starts[b]).relevance(q[b : b + 1, :, -2:], k[b : b + 1])
        torch.testing.assert_close(mask.relevance(q[:, :, -2:], k)[b : b + 1], alone)
    assert torch.equal(mask.present, torch.tensor([[True, True], [True, False]]))
    right = torch.tensor([[False, True], [True, False]])

    def loss(q, k):
        return ranking_loss(mask.relevance(q, k), right, among=mask.present, temperature=0.5)

    assert torch.autograd.gradcheck(loss, (q[:, :, -2:].detach().requires_grad_(), k))


def test_relevance_without_documents_is_zero():
    q, k, _ = (x.requires_grad_() for x in qkv(2, 2, 2, 6, d=4))
    assert BlockRank.of(3, [], 3).relevance(q, k).shape == (2, 0)
    one_empty = BlockRank(torch.tensor([[0, 2, 4, 6], [0, 2, 2, 6]]))
    relevance = one_empty.relevance(q, k)
    assert torch.equal(relevance, torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    grads = torch.autograd.grad(relevance.sum(), (q, k))
    assert all(grad.isfinite().all() for grad in grads)
    nothing = ranking_loss(one_empty.relevance(q, k), torch.zeros(2, 1, dtype=torch.bool))
    assert nothing == 0 and torch.autograd.grad(nothing, q)[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_relevance_accumulates_in_float32(dtype):
    prompt = (5, [40, 90, 20], 6)
    q, k, _ = qkv(1, 2, 2, 161, d=32, dtype=dtype)
    got = BlockRank.of(*prompt).relevance(q[:, :, -2:], k)
    want = BlockRank.of(*prompt).relevance(q[:, :, -2:].double(), k.double())
    assert got.dtype == torch.float32 and want.dtype == torch.float64
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_loss_is_its_formula():
    relevance = torch.rand(3, 5, dtype=torch.float64)
    relevant = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
    among = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 1, 1]]).bool()
    want = 0.0
    for row in (0, 2):
        e = [math.exp(float(x) / 0.05) for x in relevance[row]]
        both = [x for x, is_there in zip(e, among[row], strict=True) if is_there]
        want -= math.log(sum(x for x, right in zip(e, relevant[row], strict=True) if right) / sum(both)) / 2
    assert float(ranking_loss(relevance=relevance, relevant=relevant, among=among)) == pytest.approx(want)
    sure = torch.tensor([[0.0, 1.0]])
    assert ranking_loss(sure, sure.bool(), temperature=0.01) < 1e-6 < ranking_loss(sure, ~sure.bool())
    relevance.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ranking_loss(x, relevant, among=among, temperature=0.3), relevance
    )


def test_positions_are_shared():
    mask = BlockRank.of(2, [3, 1, 4], 2)
    shared = [0, 1, 2, 3, 4, 2, 2, 3, 4, 5]
    assert mask.positions().tolist() == [*shared, 16384, 16385]
    assert mask.positions(n=14, query_start=None).tolist() == [*shared, 6, 7, 8, 9]
    assert mask.positions(query_start=6).tolist() == [*shared, 6, 7]
    batch = BlockRank(torch.stack([mask.cu_seqlens, torch.tensor([0, 0, 1, 2, 2, 3])]))
    want = torch.tensor([[*shared, 50, 51], [0, 0, *range(50, 60)]])
    assert torch.equal(batch.positions(query_start=50), want)
    assert BlockRank.of(3, [], 2).positions(query_start=None).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="query_start must be at least 6"):
        mask.positions(query_start=5)


def test_padding_chunks_and_methods():
    """Right padding, a prompt in chunks, and a sparse method set to choose everything, under the same mask."""
    prompt = (3, [6, 9, 4], 5)
    mask = BlockRank.of(*prompt)
    q, k, v = qkv(1, 2, 2, 27, d=8, dtype=torch.float32)
    want = attend(q, k, v, mask=mask)
    parts = [
        attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], mask=mask) for a, b in ((0, 10), (10, 26), (26, 27))
    ]
    torch.testing.assert_close(torch.cat(parts, 2), want)
    padded = [torch.cat([x, torch.full_like(x[:, :, :5], 9.0)], 2) for x in (q, k, v)]
    keep = torch.arange(32).unsqueeze(0) < 27
    torch.testing.assert_close(attend(*padded, mask=mask & Padding(keep))[:, :, :27], want)
    torch.testing.assert_close(attend(q, k, v, "moba", mask=mask), want)
    assert plan("moba", q, k, mask=mask).tile_maps[0] is not None


def test_bad_arguments_are_refused():
    for bad in ([0, 1, 2], torch.tensor([0.0, 1, 2]), torch.zeros(1, 1, 3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="cu_seqlens must be an int32 or int64 tensor"):
            BlockRank(bad)
    for bad in ([0, 1], [1, 2, 3], [0, 3, 2]):
        with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
            BlockRank(torch.tensor(bad))
    for bad in ((-1, [2], 3), (1, [2.0], 3), (1, [2], None)):
        with pytest.raises(ValueError, match="lengths must be integers >= 0"):
            BlockRank.of(*bad)
    mask = BlockRank.of(2, [3, 4], 3)
    q, k, _ = qkv(1, 2, 2, 12, d=4)
    for q_bad, k_bad, message in (
        (q[0], k, "q must be a floating tensor"),
        (q, k.long(), "k must be a floating tensor"),
        (q[:, :1], k.expand(-1, 2, -1, -1), "q and k do not fit"),
        (q[..., :2], k, "q and k do not fit"),
        (q[:, :, :0], k, "at least one chosen token"),
        (q, k[:, :, :8], "k must hold the 9 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            mask.relevance(q_bad, k_bad)
    with pytest.raises(ValueError, match="the mask's batch"):
        BlockRank(mask.cu_seqlens.expand(3, -1)).relevance(q, k)
    relevance, right = torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="relevant must be boolean"):
        ranking_loss(relevance, right.long())
    with pytest.raises(TypeError, match="among must be boolean"):
        ranking_loss(relevance, right, among=right.long())
    for args in ((relevance[0], right[0]), (relevance, right[:, :2]), (relevance[:1], right)):
        with pytest.raises(ValueError, match=r"must be \[B, M\]"):
            ranking_loss(*args)
    with pytest.raises(ValueError, match=r"must be \[B, M\]"):
        ranking_loss(relevance, right, among=right[:, :2])
    with pytest.raises(ValueError, match="temperature must be > 0"):
        ranking_loss(relevance, right, temperature=0)
    with pytest.raises(ValueError, match="the mask has 3 batch"):
        attend(q, k, k, mask=BlockRank(mask.cu_seqlens.expand(3, -1)))
