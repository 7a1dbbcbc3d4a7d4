"""MLA in both forms, and TPLA: against its formula, on ranks, what it keeps, and what it gets wrong by how much."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from tilewise.attention.latent.mla import MLA, LatentState
from tilewise.attention.latent.shards import TPLA
from tilewise.attention.latent.transforms import LatentTransform, reparameterize

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def small(query_latent: int | None = 10, heads: int = 4, latent: int = 24, dtype=torch.float64) -> MLA:
    torch.manual_seed(3)
    mla = MLA(
        dim=20,
        heads=heads,
        head_dim=6,
        rope_dim=4,
        latent=latent,
        query_latent=query_latent,
        rope_base=100.0,
        eps=1e-3,
    )
    for norm in (mla.kv_norm, mla.q_norm):
        if norm is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return mla.to(dtype)


def turned(x: Tensor, base: float) -> Tensor:
    """Rotary positions as a product of complex numbers; `x [..., N, D]` starts at position 0."""
    n, d = x.shape[-2:]
    speed = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(n, dtype=torch.float64).unsqueeze(1) * speed
    spun = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle)
    return torch.view_as_real(spun).flatten(-2)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def formula(
    mla: MLA, x: Tensor, slices: int = 1, transform: LatentTransform | None = None, scores="part"
) -> Tensor:
    """Latent attention written out, one head and one slice at a time; with one slice it is MLA."""
    d = mla.latent
    transform = transform or LatentTransform.identity(d)
    low = x if mla.q_down is None else normed(x @ mla.q_down.weight.T, mla.q_norm.weight, mla.eps)
    queries = (low @ mla.q_up.weight.T).unflatten(-1, (mla.heads, -1))
    kept = x @ mla.kv_down.weight.T
    latent, key_rope = kept[..., :d] @ transform.matrix, turned(kept[..., d:], mla.rope_base)
    ups = [transform.matrix.T @ (mla.kv_norm.weight.unsqueeze(1) * up) for up in (mla.k_up, mla.v_up)]
    hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    total = torch.zeros_like(x)
    for part in torch.arange(d).chunk(slices):
        share = 1.0 if slices == 1 else float(transform.energy[part].sum())
        c = latent[..., part]
        c = c / (c.square().sum(-1, keepdim=True) / share / d + mla.eps).sqrt()
        heads = []
        for h in range(mla.heads):
            plain, rope = queries[:, :, h].split([mla.head_dim, mla.rope_dim], -1)
            products = plain @ (c @ ups[0][h, part]).mT / (share if scores == "share" else 1.0)
            products = products + turned(rope, mla.rope_base) @ key_rope.mT
            weights = (
                (products / math.sqrt(mla.head_dim + mla.rope_dim))
                .masked_fill(hidden, -torch.inf)
                .softmax(-1)
            )
            heads.append(weights @ c @ ups[1][h, part])
        total = total + torch.cat(heads, -1) @ mla.out.weight.T
    return total


# MLA


@pytest.mark.evidence
@pytest.mark.parametrize("query_latent", [None, 10])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_absorbed_is_expanded_is_the_formula(query_latent, n):
    """Both forms, forward and gradients, to float64 rounding."""
    mla, x = small(query_latent), torch.randn(2, n, 20, dtype=torch.float64)
    weights = list(mla.parameters())
    want = formula(mla, x)
    grads = torch.autograd.grad(want.sin().sum(), weights)
    for form in ("expanded", "absorbed", "auto"):
        got, state = mla(x, form=form)
        torch.testing.assert_close(got, want, **EXACT)
        for mine, theirs in zip(torch.autograd.grad(got.sin().sum(), weights), grads):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
        assert state.length == n and state.bytes == 2 * n * (24 + 4) * 8


@pytest.mark.parametrize("form", ["expanded", "absorbed", "auto"])
def test_split_anywhere(form):
    mla, x = small(), torch.randn(2, 30, 20, dtype=torch.float64)
    want, whole = mla(x)
    for cuts in ((7,), (1, 2, 3, 29), range(1, 30)):
        state, parts = None, []
        for piece in x.tensor_split(list(cuts), 1):
            out, state = mla(piece, state, form=form)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), want, **EXACT)
        torch.testing.assert_close(state.latent, whole.latent, **EXACT)
        torch.testing.assert_close(state.rope, whole.rope, **EXACT)


def test_the_sizes_of_deepseek():
    """A latent of 512 and a rotated key of 64: one kv head of 576, a slice of it 320."""
    torch.manual_seed(0)
    mla, x = MLA(64, 2), torch.randn(1, 5, 64)
    want = formula(mla.double(), x.double())
    mla.float()
    naive, _ = mla(x, form="expanded")
    got, state = mla(x, form="absorbed")
    size = want.abs().max()
    assert (got - want).abs().max() <= 2 * max(
        (naive - want).abs().max(), torch.finfo(torch.float32).eps * size
    )
    part = TPLA.shard(mla, LatentTransform.hadamard(512), rank=0, ranks=2)
    kept = part.take_over(reparameterize(mla, LatentTransform.hadamard(512)).keep(x, 0))
    assert (state.latent.shape[2] + state.rope.shape[2], kept.latent.shape[2] + kept.rope.shape[2]) == (
        576,
        320,
    )


def test_no_tokens():
    mla = small()
    out, state = mla(torch.empty(2, 0, 20, dtype=torch.float64))
    assert out.shape == (2, 0, 20) and state.length == 0


# The transforms


@pytest.mark.parametrize("d", [1, 2, 3, 24, 40, 64, 96])
def test_hadamard_is_orthogonal_at_every_size_and_spreads_evenly(d):
    matrix = LatentTransform.hadamard(d, seed=1).matrix
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-13)
    even = d & -d  # the largest power of 2 in d; each of so many slices holds the same of every basis vector
    shares = matrix.square().unflatten(1, (even, -1)).sum(-1)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / even), rtol=1e-12, atol=0)


def test_pca_sorts_by_squares():
    scales = torch.tensor([0.1, 3.0, 1.0, 0.5], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    made = LatentTransform.pca(torch.randn(50, 100, 4, dtype=torch.float64) * scales @ turn)
    torch.testing.assert_close(made.matrix @ made.matrix.mT, torch.eye(4, dtype=torch.float64))
    assert (made.energy.diff() < 0).all() and float(made.energy.sum()) == pytest.approx(1)
    found = (turn @ made.matrix).abs().argmax(1)
    assert found.tolist() == [3, 0, 1, 2]
    assert made.share(slice(0, 2)) > 0.9 and LatentTransform.identity(4).share(slice(0, 2)) == 0.5
    own = LatentTransform(matrix=made.matrix, energy=torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert own.share(slice(1, 3)) == pytest.approx(0.5)
    assert LatentTransform.pca(torch.eye(4)[:1]).share(slice(2, 4)) > 0, "unused axes keep a trace"


def transforms(mla: MLA, x: Tensor) -> dict[str, LatentTransform]:
    latents = mla.kv_down(x)[..., : mla.latent]
    return {
        "none": LatentTransform.identity(mla.latent),
        "hadamard": LatentTransform.hadamard(mla.latent, seed=0),
        "pca": LatentTransform.pca(latents),
    }


def test_a_change_of_basis_changes_nothing():
    mla, x = small(), torch.randn(2, 30, 20, dtype=torch.float64)
    before = {name: p.clone() for name, p in mla.named_parameters()}
    want, _ = mla(x)
    for transform in transforms(mla, x).values():
        changed = reparameterize(mla=mla, transform=transform)
        for form in ("expanded", "absorbed"):
            torch.testing.assert_close(changed(x, form=form)[0], want, **EXACT)
    for name, p in mla.named_parameters():
        assert torch.equal(p, before[name])


# TPLA


def decode(
    rank: int, world: int, slices: int, name: str, scores: str, prompt: int
) -> tuple[Tensor, LatentState]:
    mla, x = small(), torch.randn(2, 21, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        part = TPLA.shard(mla, transforms(mla, x)[name], slices=slices, scores=scores)
        outs, state = [], None
        for piece in [x[:, :prompt], *x[:, prompt:].split(1, 1)]:
            out, state = part(piece, state)
            outs.append(out)
    return torch.cat(outs, 1), state


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("world", "slices", "name", "scores"),
    [(2, 2, "pca", "part"), (2, 2, "hadamard", "share"), (4, 2, "pca", "share"), (4, 4, "hadamard", "part")],
)
def test_on_ranks_it_is_its_formula(world, slices, name, scores):
    """Prompt and tokens one by one, over gloo ranks, against the formula in one process, float64 rounding.

    Control: MLA itself, and the formula without the transform, are far from it.
    """
    x = torch.randn(2, 21, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mla = small()
    with torch.no_grad():
        want = formula(mla, x, slices, transforms(mla, x)[name], scores)
        others = [mla(x)[0], formula(mla, x, slices, None, scores)]
    for got, state in run_ranks(decode, world, slices, name, scores, 9):
        torch.testing.assert_close(got, want, **EXACT)
        assert state.latent.shape == (2, 21, 24 // slices)
        assert all((got - other).abs().max() > 1e-2 for other in others)


def memory(state: LatentState) -> int:
    """Bytes of the memory behind a state, which must be what it says of itself."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (state.latent, state.rope)
    }
    assert sum(storages.values()) == state.bytes
    return state.bytes


def hold(rank: int, world: int, sliced: bool) -> tuple[int, int]:
    """Bytes that one rank holds after a prompt of 100 tokens, and after 5 more."""
    mla, x = small(latent=48), torch.randn(1, 105, 20, dtype=torch.float64)
    transform = LatentTransform.hadamard(48)
    run = reparameterize(mla, transform)
    with torch.no_grad():
        _, state = run(x[:, :100])
        if sliced:
            run = TPLA.shard(mla, transform)
            state = run.take_over(state)
        prompt = memory(state)
        for token in x[:, 100:].split(1, 1):
            _, state = run(token, state)
    return prompt, memory(state)


@pytest.mark.evidence
def test_a_rank_keeps_its_slice_of_the_latent():
    """Bytes of the tensors held per rank: MLA keeps latent + rope on each, TPLA latent / 2 + rope.

    Control: MLA on the same two ranks.
    """
    for width, sliced in ((48, False), (24, True)):
        for held in run_ranks(hold, 2, sliced):
            assert held == tuple((width + 4) * tokens * 8 for tokens in (100, 105))


# What slicing gets wrong, in a trained layer


class Recall(nn.Module):
    """One layer of latent attention that learns to recall: pairs of key and value, then keys that ask."""

    PAIRS, ASKED, WORDS = 16, 8, 32

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(self.WORDS, 48), nn.Embedding(self.WORDS + 1, 48)
        self.norm = nn.RMSNorm(48)
        self.mla = MLA(48, 4, head_dim=12, rope_dim=4, latent=latent)
        self.head = nn.Linear(48, self.WORDS)

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the attention layer receives, `[count, PAIRS + ASKED, 48]`, and the values asked for."""
        keys = torch.rand(count, self.WORDS, generator=generator).argsort(1)[:, : self.PAIRS]
        values = torch.randint(0, self.WORDS, keys.shape, generator=generator)
        asked = torch.randint(0, self.PAIRS, (count, self.ASKED), generator=generator)
        blank = torch.full((count, self.ASKED), self.WORDS)
        x = self.keys(torch.cat([keys, keys.gather(1, asked)], 1)) + self.values(
            torch.cat([values, blank], 1)
        )
        return self.norm(x), values.gather(1, asked)

    def logits(self, mixed: Tensor) -> Tensor:
        """From the attention layer's output at the last places."""
        return self.head(mixed[:, -self.ASKED :])

    def accuracy(self, mixed: Tensor, answers: Tensor) -> float:
        return float((self.logits(mixed).argmax(-1) == answers).float().mean())


@lru_cache
def trained(seed: int, latent: int = 32) -> Recall:
    """Two seconds of training; it then recalls without error."""
    torch.manual_seed(seed)
    model, generator = Recall(latent), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(300):
        x, answers = model.batch(32, generator)
        loss = nn.functional.cross_entropy(model.logits(model.mla(x)[0]).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def examples(model: Recall) -> tuple[Tensor, Tensor, dict[str, LatentTransform]]:
    """New inputs, their answers, and the bases, PCA's found from inputs of its own."""
    generator = torch.Generator().manual_seed(99)
    x, answers = model.batch(256, generator)
    return x, answers, transforms(model.mla, model.batch(256, generator)[0])


def sum_of_parts(
    mla: MLA, basis: LatentTransform, x: Tensor, scores: str = "part", grouped: bool = False
) -> Tensor:
    """TPLA over two slices; `grouped`: grouped latent attention, where each half of the heads has one slice."""
    d, half, total = mla.latent // 2, mla.heads // 2, torch.zeros_like(x)
    for r in range(2):
        heads = slice(r * half, (r + 1) * half) if grouped else slice(0, mla.heads)
        part = TPLA(mla=mla, transform=basis, columns=slice(r * d, (r + 1) * d), heads=heads, scores=scores)
        total += part.partial(x)[0]
    return total


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.evidence
@pytest.mark.parametrize("scores", ["part", "share"])
def test_less_is_lost_with_pca_and_with_all_heads_on_every_slice(scores):
    """A layer that recalls perfectly, cut in two without retraining; error against MLA, and what it still recalls.

    PCA beats slicing as it is (control). TPLA beats grouped latent attention (GLA), which keeps as much per rank
    but lets each head see one slice only, in every basis; as in the paper, TPLA by PCA is nearly as good as MLA.
    """
    for seed in (0, 1, 2):
        model = trained(seed)
        x, answers, bases = examples(model)
        want, _ = model.mla(x)
        assert model.accuracy(want, answers) == 1.0
        assert bases["pca"].share(slice(0, 16)) > 0.9, "a steep spectrum"
        tpla = {name: sum_of_parts(model.mla, basis, x, scores) for name, basis in bases.items()}
        gla = {name: sum_of_parts(model.mla, basis, x, scores, grouped=True) for name, basis in bases.items()}
        errors = {name: off(y, want) for name, y in tpla.items()}
        assert errors["pca"] < 0.85 * min(errors["none"], errors["hadamard"]), errors
        recalled = {name: model.accuracy(y, answers) for name, y in tpla.items()}
        lost = {name: model.accuracy(y, answers) for name, y in gla.items()}
        assert recalled["pca"] > 0.985 and 1 - recalled["pca"] < 0.5 * (1 - recalled["none"]), recalled
        for name in bases:
            assert errors[name] < 0.8 * off(gla[name], want) and recalled[name] > lost[name] + 0.05, (
                name,
                lost,
            )


def test_pca_needs_a_steep_spectrum():
    """Where the paper's choice fails: a latent so narrow that it is full. Half of its axes hold four fifths of the
    squares, the others still matter, and PCA, which gives them scores of their own, is worse than no transform."""
    model = trained(0, latent=16)
    x, _, bases = examples(model)
    want, _ = model.mla(x)
    errors = {name: off(sum_of_parts(model.mla, basis, x), want) for name, basis in bases.items()}
    assert bases["pca"].share(slice(0, 8)) < 0.85 and errors["pca"] > errors["none"], errors


@pytest.mark.evidence
def test_hadamard_evens_out_the_norm():
    """How well a slice tells the whole latent's squares, mean size of the logarithm of estimate over truth.

    Control: slices as they are, of latents with outlying coordinates as large models have them. (The scores
    Hadamard does not help, here as in the paper.)
    """
    latents = torch.randn(1000, 24, dtype=torch.float64)
    latents[:, [2, 3, 17]] *= 20
    wrong = {}
    for name, basis in (("none", LatentTransform.identity(24)), ("hadamard", LatentTransform.hadamard(24))):
        turned = latents @ basis.matrix
        shares = [turned[:, c].square().sum(-1) / basis.share(c) for c in (slice(0, 12), slice(12, 24))]
        wrong[name] = float(
            torch.stack([(s / latents.square().sum(-1)).log().abs().mean() for s in shares]).mean()
        )
    assert wrong["hadamard"] < 0.6 * wrong["none"], wrong


@pytest.mark.evidence
def test_prompts_read_without_slicing():
    """Prefill-decode separation: no error in the prompt, so less in all, and as little in what is decoded.

    Control: the same tokens with the prompt read by TPLA itself.
    """
    for seed in (0, 1, 2):
        model = trained(seed)
        x, _, bases = examples(model)
        start, (want, _) = model.PAIRS, model.mla(x)
        parts = [TPLA.shard(model.mla, bases["pca"], rank=rank, ranks=2) for rank in range(2)]
        prompt, state = reparameterize(model.mla, bases["pca"])(x[:, :start])
        assert off(prompt, want[:, :start]) < 1e-5
        states, decoded = [part.take_over(state) for part in parts], []
        for token in x[:, start:].split(1, 1):
            outs, states = zip(*(part.partial(token, state) for part, state in zip(parts, states)))
            decoded.append(outs[0] + outs[1])
        separate = off(torch.cat([prompt, *decoded], 1), want)
        alone = sum_of_parts(model.mla, bases["pca"], x)
        assert off(alone[:, :start], want[:, :start]) > 0.05 and separate < 0.9 * off(alone, want)
        assert off(torch.cat(decoded, 1), want[:, start:]) < 1.1 * off(alone[:, start:], want[:, start:])


# Wrong arguments


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"heads": 0}, "heads must be an integer >= 1, got 0"),
        ({"dim": 2.0}, "dim must be"),
        ({"rope_dim": 3}, "rope_dim must be an even integer"),
        ({"latent": -1}, "latent must be"),
        ({"query_latent": 0}, "query_latent must be"),
    ],
)
def test_sizes_that_do_not_fit(wrong, words):
    with pytest.raises(ValueError, match=words):
        MLA(**{"dim": 8, "heads": 2, "latent": 8} | wrong)


def test_calls_that_do_not_fit():
    mla, x = small(), torch.randn(2, 3, 20, dtype=torch.float64)
    _, state = mla(x)
    for call, words in (
        (lambda: mla(x, form="fast"), "form must be one of 'auto', 'expanded', 'absorbed'"),
        (lambda: mla(x[..., :5]), r"x must be a tensor \[B, N, 20\]"),
        (lambda: mla(x[:1], state), "state has batch 2, x has 1"),
        (lambda: reparameterize(mla, LatentTransform.hadamard(d=8)), "latents of 8, the module has 24"),
        (lambda: LatentTransform.identity(d=0), "d must be an integer >= 1"),
        (lambda: LatentTransform.pca(latents=torch.empty(0, 4)), "at least one sample"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_parts_that_do_not_fit():
    mla, basis = small(), LatentTransform.identity(24)
    x = torch.randn(1, 3, 20, dtype=torch.float64)
    part = TPLA.shard(mla=mla, transform=basis, slices=2, scores="part", group=None, rank=1, ranks=2)
    for call, words in (
        (lambda: TPLA.shard(mla, basis, rank=2, ranks=2), r"rank must be in 0\.\.1"),
        (lambda: TPLA.shard(mla, basis, rank=0, ranks=3), r"slices must divide the ranks \(3\)"),
        (lambda: TPLA.shard(mla, basis, rank=0, ranks=10, slices=2), "4 heads cannot be split over 5"),
        (lambda: TPLA(mla, basis, slice(0, 24, 2), slice(0, 4)), "columns must be a slice without gaps"),
        (lambda: TPLA(mla, basis, slice(0, 12), slice(4, 4), group=None), "heads must be a slice"),
        (lambda: TPLA(mla, basis, slice(0, 12), slice(0, 4), scores="all"), "scores must be one of"),
        (lambda: part.partial(x.clone().requires_grad_()), "does not support training"),
        (
            lambda: part.take_over(LatentState(latent=torch.zeros(1, 2, 12), rope=torch.zeros(1, 2, 4))),
            "latents of 24, got 12",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def other_group(rank: int, world: int) -> str:
    part = TPLA.shard(small(), LatentTransform.identity(24), rank=rank, ranks=4)
    try:
        part(torch.randn(1, 3, 20, dtype=torch.float64))
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_group_of_another_size():
    for said in run_ranks(other_group, 2):
        assert "the 4 ranks that the parts were made for, got 2" in said
