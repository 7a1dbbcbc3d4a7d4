"""The Block Transformer: one function however it is read, what it reads of caches, and what it learns of
text."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.clock import least_times
from tests.recurrence import blocks, decays
from tilewise.recurrence import BlockEmbedder, BlockTransformer, ModelConfig, SequenceModel

N = 23


def built(block: int = 4, prefix: int = 2, dtype: torch.dtype = torch.float64) -> BlockTransformer:
    """All parameters random, so that none hides behind a zero."""
    torch.manual_seed(0)
    made = BlockTransformer(20, 16, (2, 1), heads=2, block=block, prefix=prefix).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def tokens(b: int = 2, n: int = N, seed: int = 1) -> Tensor:
    return torch.randint(20, (b, n), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


shapes = pytest.mark.parametrize(("block", "prefix"), [(4, 2), (1, 1), (2, 3), (8, 1), (16, 4)])


def attention(x: Tensor, layer) -> Tensor:
    """Causal softmax attention of one sequence `[N, width]` by its formula, positions turned as complex
    numbers."""
    mixer, out = layer.mixer, []
    q, k, v = (x @ part.weight.T for part in (mixer.query, mixer.key, mixer.value))
    pairs = torch.arange(mixer.dim // 2).double()
    angles = torch.arange(len(x))[:, None] * 10_000.0 ** (-2 * pairs / mixer.dim)
    spin = torch.polar(torch.ones_like(angles), angles)
    for h in range(mixer.heads):
        own = slice(h * mixer.dim, (h + 1) * mixer.dim)
        turned = [torch.view_as_real(torch.view_as_complex(y[:, own].unflatten(1, (-1, 2)).contiguous()) * spin)
                  .flatten(1) for y in (q, k)]  # fmt: skip
        scores = (turned[0] @ turned[1].T) / mixer.dim**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ v[:, own])
    return torch.cat(out, 1) @ mixer.out.weight.T


def decoder(layers, x: Tensor) -> Tensor:
    """Layers of one sequence by their formula."""
    for layer in layers:
        x = x + attention(norm(x, layer.norm), layer)
        y, part = norm(x, layer.channel_norm), layer.channel
        x = x + (F.silu(y @ part.gate.weight.T) * (y @ part.up.weight.T)) @ part.down.weight.T
    return x


def norm(x: Tensor, layer) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * layer.weight


def by_formula(model: BlockTransformer, row: Tensor) -> Tensor:
    """Logits of the token after each of `row [N]`, block by block."""
    size, logits = model.block, []
    for t in range(1, len(row) + 1):  # what the token at t is predicted from
        own = t // size
        blocks_before = [torch.cat([model.embedder.table.weight[i] for i in row[j * size : (j + 1) * size]])
                         for j in range(own)]  # fmt: skip
        x = decoder(model.block_decoder, torch.stack([model.start, *blocks_before]))
        context = norm(x[-1], model.block_norm) @ model.expand.weight.T + model.expand.bias
        told = [*context.view(model.prefix, -1), *model.embedding.weight[row[own * size : t]]]
        x = decoder(model.token_decoder, torch.stack(told))[-1]
        logits.append(norm(x, model.norm) @ model.head.weight.T)
    return torch.stack(logits)


@pytest.mark.evidence
@pytest.mark.parametrize(("block", "prefix"), [(4, 2), (2, 1), (8, 3)])
def test_it_is_its_formula(block, prefix):
    """Each token from its block's context and the tokens before it in its block, one at a time; the first
    block too.

    The control: the same with the embedding not shifted by a block is another function, and knows the future.
    """
    model, row = built(block, prefix), tokens(1)[0]
    with torch.no_grad():
        want = by_formula(model, row)
        close(model(row.unsqueeze(0))[0][0], want)
        ahead = by_formula(model, row.roll(-block))
    assert (ahead[:-block] - want[:-block]).abs().max() > 1e-3


@shapes
def test_split_anywhere(block, prefix):
    model, x = built(block, prefix), tokens()
    whole, _ = model(x)
    for borders in ([0, 1, N], [0, 4, 9, N], [0, 8, 16, N], [0, 0, 5, 5, N], list(range(N + 1))):
        state, parts = None, []
        for start, end in itertools.pairwise(borders):
            part, state = model(x[:, start:end], state)
            parts.append(part)
        close(torch.cat(parts, 1), whole)


@shapes
def test_caches_are_one_entry_a_block_and_one_block(block, prefix):
    model, x, state = built(block, prefix), tokens(), None
    for t in range(N):
        _, state = model(x[:, t : t + 1], state)
        assert all(cache.parts[0].shape[1] == 1 + (t + 1) // block for cache in state.blocks)
        assert all(cache.parts[0].shape[1] == prefix + (t + 1) % block for cache in state.tokens)
    assert state.bytes == sum(part.bytes for part in (*state.blocks, *state.tokens)) + 8 * (2 * block + 2)


@shapes
def test_padding_is_not_there(block, prefix):
    """On either side, rows unlike, with a state from before, and in what is generated."""
    model, x = built(block, prefix), tokens()
    _, before = model(tokens(n=6, seed=3))
    mask = torch.zeros(2, N + 9, dtype=torch.bool)
    mask[0, 2 : N + 2] = mask[1, 9:] = True
    padded = tokens(n=N + 9, seed=4)
    padded[mask] = x.flatten()
    for state in (None, before):
        want, last = model(x, state)
        got, after = model(padded, state, mask=mask)
        close(got[mask].view_as(want), want)
        close(model(x, after)[0], model(x, last)[0])
    for side in (mask, mask.flip(1)):
        padded = torch.zeros_like(padded)
        padded[side] = x.flatten()
        assert torch.equal(model.generate(padded, 9, mask=side), model.generate(x, 9))


@shapes
def test_packed_sequences_and_rows_that_go_on_unlike(block, prefix):
    model, x = built(block, prefix), tokens(1)
    offsets = torch.tensor([0, 0, 7, 8, N])
    got, after = model(x, cu_seqlens=offsets)
    more, end = tokens(4, 6, seed=5), itertools.pairwise(offsets.tolist())
    mask = torch.arange(6) < torch.tensor([6, 0, 3, 5]).unsqueeze(1)
    further, _ = model(more, after, mask=mask)
    for row, (start, stop) in enumerate(end):
        want, _ = model(torch.cat((x[:, start:stop], more[row : row + 1, : mask[row].sum()]), 1))
        close(torch.cat((got[:, start:stop], further[row : row + 1, : mask[row].sum()]), 1), want)
        alone, _ = model(more[row : row + 1], after.select(torch.tensor([row])))
        close(alone[:, : mask[row].sum()], further[row : row + 1, : mask[row].sum()])


@shapes
def test_it_generates_as_it_reads(block, prefix):
    model, prompt = built(block, prefix), tokens(n=9)
    made, read = model.generate(prompt, 2 * block + 3), prompt
    for i in range(2 * block + 3):  # the whole sequence anew for each token
        assert torch.equal(model(read)[0][:, -1].argmax(-1), made[:, i])
        read = torch.cat((read, made[:, i : i + 1]), 1)
    drawn = [model.generate(prompt, 6, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@shapes
def test_nothing_comes_from_the_future(block, prefix):
    """Bit for bit; and earlier blocks matter, so that there was something to leak."""
    model, x = built(block, prefix, torch.float32), tokens()
    want, _ = model(x)
    for t in range(0, N, 3):
        other = x.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % 20
        assert torch.equal(model(other)[0][:, : t + 1], want[:, : t + 1])
    other = x.clone()
    other[:, 0] = (other[:, 0] + 1) % 20
    assert ((model(other)[0] - want)[:, block + 1 :].abs().amax((0, 2)) > 1e-7).all()


def test_every_parameter_learns_and_any_length():
    model = built(dtype=torch.float32)
    for n in (0, 1, 3, 4, 5, 129):
        logits, state = model(tokens(n=n))
        assert logits.shape == (2, n, 20) and logits.isfinite().all() and (state.count == n).all()
    blocks.loss(model, tokens(), tokens(seed=2)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_bfloat16():
    """As near to float64 as three times what rounding weights alone costs."""
    exact, low, rounded = built(), built(dtype=torch.bfloat16), built()
    rounded.load_state_dict(low.state_dict())
    want, by_weights, got = exact(tokens())[0], rounded(tokens())[0], low(tokens())[0]
    assert got.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert (got.double() - by_weights).norm() <= 3 * max((by_weights - want).norm(), eps * want.norm())


def test_the_embedder_concatenates_and_projects_where_sizes_differ():
    plain, wide = BlockEmbedder(20, 16, 4), BlockEmbedder(20, 16, 4, size=16)
    x = tokens(n=4)
    assert torch.equal(plain(x), plain.table.weight[x].flatten(1)) and plain.table.weight.shape == (20, 4)
    close(wide(x), wide.table.weight[x].flatten(1) @ wide.project.weight.T)


def vanilla(layers: int, width: int) -> SequenceModel:
    return SequenceModel(ModelConfig(blocks.BYTES, width, ("attention",) * layers)).eval()


@pytest.mark.evidence
def test_a_token_reads_a_fraction_of_the_caches():
    """Keys and values counted where attention is called, for each of the tokens behind a context.

    A vanilla Transformer of as many layers reads all N of each layer; here the block decoder reads N / block
    of each of its layers once in a block, and the token decoder its block. The control is a block of one
    token, which saves nothing below.
    """
    width, prefix, saved = 32, 2, {}
    for context in (256, 1024):
        whole = blocks.read_per_token(vanilla(4, width), context, 16)
        tokens_after = range(context + 1, context + 17)
        assert whole == 2 * width * 4 * sum(4 * t for t in tokens_after) / 16
        for size in (1, 4, 8):
            model = BlockTransformer(blocks.BYTES, width, (2, 2), block=size, prefix=prefix).eval()
            found = blocks.read_per_token(model, context, 16)
            below = sum(2 * (1 + t // size) for t in tokens_after if t % size == 0)
            above = sum(2 * (prefix + t % size) for t in tokens_after)
            assert found == 2 * width * 4 * (below + above) / 16
            saved[context, size] = whole / found
    assert saved[1024, 4] > 25 and saved[1024, 8] > 80 and saved[256, 4] > 20, saved
    assert saved[1024, 1] < 2.1, saved


def four_tokens(model: nn.Module, state: object, rows: int) -> None:
    chosen = torch.zeros(rows, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(4):
            _, state = model(chosen, state)


@pytest.mark.evidence
@pytest.mark.timed
def test_a_token_takes_less_time():
    """A batch of 16 with 4,096 tokens before each, layers as many and as wide, four tokens on end (one
    block)."""
    torch.manual_seed(0)
    model, whole = BlockTransformer(blocks.BYTES, 64, (2, 2)).eval(), vanilla(4, 64)
    x = torch.randint(blocks.BYTES, (1, 4096))
    with torch.no_grad():
        state, states = model(x)[1], whole(x)[1]
    rows = torch.zeros(16, dtype=torch.int64)
    begun = {
        "blocks": (model, state.select(rows)),
        "whole": (whole, [state.select(rows) for state in states]),
    }
    times = least_times(
        {name: functools.partial(four_tokens, *given, 16) for name, given in begun.items()}, rounds=4
    )
    assert times["whole"] > 3 * times["blocks"], times


@pytest.mark.evidence
def test_trained_it_models_text_better_than_a_transformer_that_reads_as_much():
    """Bits for each byte of held-out text, the same data and steps.

    Against a Transformer of as many parameters that reads no fewer bytes of caches for a token, and no worse
    than one of as many such layers, which reads 30 times as many. Of two controls one has the trained model's
    contexts
    zeroed, the other was trained without them: blocks that know of no other.
    """
    models = {name: blocks.load(name) for name in ("block", "block-equal", "block-vanilla", "block-cut")}
    found = {name: decays.bits_per_byte(model) for name, model in models.items()}
    read = {name: blocks.read_per_token(model, 1024) for name, model in models.items()}
    sizes = [sum(p.numel() for p in models[name].parameters()) for name in ("block", "block-equal")]
    assert max(sizes) < 1.02 * min(sizes)
    assert read["block"] <= read["block-equal"] and 30 * read["block"] < read["block-vanilla"], read
    for part in models["block"].expand.parameters():
        part.detach().zero_()
    found["zeroed"] = decays.bits_per_byte(models["block"])
    assert found["block"] < found["block-equal"] - 0.4 and found["block"] < found["block-vanilla"] + 0.05, (
        found
    )
    assert min(found["zeroed"], found["block-cut"]) > found["block"] + 0.7, found


def test_bad_arguments():
    with pytest.raises(ValueError, match="must be a multiple of heads, got 16 and 3"):
        BlockTransformer(20, 16, block=3)
    with pytest.raises(ValueError, match="layers must be those of the block and the token decoder, got"):
        BlockTransformer(20, 16, (1, 1, 1))
    with pytest.raises(ValueError, match="prefix must be an integer >= 1, got 0"):
        BlockTransformer(20, 16, prefix=0)
    with pytest.raises(ValueError, match=r"tokens must be integers \[B, N\], got"):
        built()(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="state must hold 2 sequences, got 1"):
        built()(tokens(), built()(tokens(1))[1])
    with pytest.raises(ValueError, match="tokens must hold a token in each row to continue"):
        built().generate(tokens(), 2, mask=torch.tensor([[True] * N, [False] * N]))
