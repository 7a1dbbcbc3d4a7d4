"""TNT: its formula token by token, shards side by side, what that saves in training, and what it learns of
text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.clock import least_times
from tests.recurrence import note_models
from tilewise.data.recall_tasks import IGNORE, registers
from tilewise.recurrence import TNT, FastWeights

WIDTH, HEADS = 8, 2


def built(dtype: torch.dtype = torch.float64, **options) -> TNT:
    torch.manual_seed(0)
    settings = {"memories": HEADS, "far": 12, "near": (4, 2), "shard": 8, "rate": 0.2}
    made = TNT(WIDTH, **(settings | options)).to(dtype).eval()
    with torch.no_grad():
        made.rate.weight.normal_(std=0.1)
        made.down.normal_(std=0.4)
        for conv in made.convs:
            conv.weight.normal_()
    return made


def inputs(n: int = 41, seed: int = 1) -> Tensor:
    return torch.randn(1, n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(w: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return w[2] @ (F.silu(w[0] @ x) * (w[1] @ x))


def gradient(w: tuple[Tensor, ...], k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Of the squared error, by autograd."""
    parts = tuple(x.detach().requires_grad_() for x in w)
    return torch.autograd.grad((memory(parts, k) - v).square().sum() / 2, parts)


def by_formula(mixer: TNT, x: Tensor, online: bool = False) -> Tensor:
    """One head of one memory and one token at a time; `online` takes gradients where the last token left
    off."""
    x, n, dim = x[0], x.shape[1], WIDTH // HEADS
    q, k, v = (y @ part.weight.T for y, part in zip((x, x, x), (mixer.query, mixer.key, mixer.value)))
    if len(mixer.convs):
        padded = [F.pad(y, (0, 0, 3, 0)) for y in (q, k, v)]
        q, k, v = (F.silu(sum(y[j : n + j] * conv.weight[j] for j in range(4)))
                   for y, conv in zip(padded, mixer.convs))  # fmt: skip
    rates = F.softplus(mixer.rate(x)).view(n, -1, HEADS)
    chunks = ([] if mixer.far is None else [mixer.far]) + list(mixer.near)
    out = torch.zeros(n, WIDTH, dtype=torch.float64)
    for which, chunk in enumerate(chunks):
        is_far = mixer.far is not None and which == 0
        for head in range(HEADS):
            own = slice(head * dim, (head + 1) * dim)
            first = tuple(w[which, head].detach() for w in (mixer.gate, mixer.up, mixer.down))
            now, start, keys = first, first, torch.zeros(dim, dim, dtype=torch.float64)
            for t in range(n):
                key, ask = (F.normalize(y[t, own], dim=0) for y in (k, q))
                if not is_far and mixer.shard is not None and t % mixer.shard == 0:
                    now, keys = first, torch.zeros_like(keys)
                if t % chunk == 0:
                    start = now
                steps = gradient(now if online else start, key, v[t, own])
                now = tuple(w - rates[t, which, head] * step for w, step in zip(now, steps))
                keys = keys + torch.outer(key, key)
                if not is_far and mixer.project:
                    ask = F.normalize(keys @ ask, dim=0)
                out[t, own] += memory(start if is_far else now, ask)
                if (t + 1) % chunk == 0:
                    bounds = (
                        first[0].norm(dim=1),
                        first[1].norm(dim=1),
                        torch.ones(dim, dtype=torch.float64),
                    )
                    shares = [bound / (w.norm(dim=1) + 1e-5) for w, bound in zip(now, bounds)]
                    now = tuple(w * share.clamp(max=1).unsqueeze(1) for w, share in zip(now, shares))
    out = out.view(n, HEADS, dim)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight[:, 0]
    return (out.flatten(1) * F.silu(x @ mixer.share.weight.T)) @ mixer.out.weight.T


@pytest.mark.evidence
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"far": None},
        {"shard": None, "near": (3,)},
        {"near": (1,), "project": False},
        {"near": (), "conv": 0},
    ],
)
def test_it_is_its_formula(options):
    """The control: gradients taken where the last token left off are another function, but for chunks of
    one."""
    mixer, x = built(**options), inputs()
    with torch.no_grad():
        got = mixer(x)[0][0]
    want, online = by_formula(mixer, x).detach(), by_formula(mixer, x, online=True).detach()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert (got - online).norm() > 1e-3 * got.norm()


def test_memories_of_chunks_of_one_are_online():
    mixer, x = built(far=None, near=(1,)), inputs()
    torch.testing.assert_close(mixer(x)[0][0], by_formula(mixer, x, online=True), rtol=1e-9, atol=1e-10)


@pytest.mark.evidence
def test_a_shard_knows_of_others_by_the_global_memory_alone():
    """Gradients of the last output by the inputs: without a global memory none beyond its shard; without
    resets, or with a global memory, some; and those of tokens in an open global chunk are none yet."""
    reaches = {}
    for name, options in (("local", {"far": None}), ("no reset", {"far": None, "shard": None}), ("both", {})):
        mixer, x = built(conv=0, near=(2,), **options), inputs().requires_grad_()
        mixer(x)[0][0, -1].sum().backward()
        reaches[name] = x.grad[0].abs().amax(1) > 0
    assert not reaches["local"][:40].any() and reaches["local"][40]
    assert reaches["no reset"].all()
    assert reaches["both"][:36].all() and not reaches["both"][36:40].any()


def chain(monkeypatch: pytest.MonkeyPatch, mixer: TNT, n: int) -> int:
    """Updates one after the other: calls of a memory's gradient, each of all shards at once."""
    calls: list[int] = []
    whole = FastWeights.lessons

    def counted(self, *told):
        calls.append(1)
        return whole(self, *told)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(FastWeights, "lessons", counted)
        mixer(torch.randn(1, n, WIDTH))
    return len(calls)


@pytest.mark.evidence
def test_the_chain_of_updates_does_not_grow_with_the_small_chunks(monkeypatch):
    """shard / near + N / far, counted; the controls, without reset or with one small chunk alone, need N /
    near."""
    for n in (512, 2048):
        both = built(torch.float32, far=256, near=(8,), shard=64)
        assert chain(monkeypatch, both, n) == 64 // 8 + n // 256
        assert (
            chain(monkeypatch, built(torch.float32, far=256, near=(8,), shard=None), n) == n // 8 + n // 256
        )
        assert chain(monkeypatch, built(torch.float32, far=None, near=(8,), shard=None), n) == n // 8


@pytest.mark.evidence
def test_queries_are_asked_in_the_span_of_the_shards_keys():
    """What of a query is orthogonal to all keys so far is gone; it was much of it, and what is beside it is
    not."""
    mixer = built(memories=1)
    q, k = F.normalize(torch.randn(2, 3, 1, 5, WIDTH, dtype=torch.float64), dim=-1)
    asked, keys = mixer._projected(q, k, torch.zeros(3, 1, WIDTH, WIDTH, dtype=torch.float64), 1)
    for t in range(5):
        basis = torch.linalg.qr(k[:, :, : t + 1].mT).Q  # [3, 1, width, t + 1]
        for x, gone in ((asked, True), (q, False)):
            rest = x[:, :, t] - (basis @ (basis.mT @ x[:, :, t].unsqueeze(-1))).squeeze(-1)
            assert (rest.norm(dim=-1) < 1e-12).all() == gone and (gone or (rest.norm(dim=-1) > 0.3).all())
    torch.testing.assert_close(keys, k.mT @ k)


@pytest.mark.evidence
@pytest.mark.timed
def test_a_training_step_takes_less_time_than_with_small_chunks_alone():
    """A layer over 2,048 tokens, twice as many memories as the plain one. The control: without resets it takes
    as long as that."""
    torch.manual_seed(0)
    common = {"memories": 2, "near": (8,)}
    mixers = {
        "both": TNT(32, far=512, shard=128, **common),
        "no reset": TNT(32, far=512, shard=None, **common),
        "plain": TNT(32, far=None, shard=None, **common),
    }
    x = torch.randn(2, 2048, 32)
    times = least_times(
        {name: lambda mixer=mixer: mixer(x)[0].sum().backward() for name, mixer in mixers.items()}, rounds=2
    )
    assert min(times["plain"], times["no reset"]) > 3 * times["both"], times


@pytest.fixture(scope="module")
def right() -> dict[str, Tensor]:
    """What each kind of trained model knows of fresh facts and registers, `[seeds, 2]`."""
    return {
        kind: torch.tensor([note_models.right(note_models.load(f"{kind}-{seed}"), 7) for seed in range(3)])
        for kind in note_models.SETTINGS
    }


@pytest.mark.evidence
def test_two_time_scales_keep_what_is_far_and_what_is_new(right):
    """Facts from the shard before, and registers that change: on average TNT loses less than three points against
    one memory of small chunks of as many numbers, which takes longer to train, and no seed more than six.

    Controls, trained alike: large chunks alone do not know what a register holds now; local memories alone,
    which are reset, know no fact.
    """
    lost = right["small"] - right["tnt"]
    assert (lost.mean(0) < 0.03).all() and (lost < 0.06).all(), right
    for kind in ("large", "global"):
        assert (right[kind][:, 1] < 0.7).all() and (right[kind][:, 0] > 0.95).all(), right
    assert (right["local"][:, 0] < 0.1).all() and (right["local"][:, 1] > 0.9).all(), right


@pytest.mark.evidence
def test_the_second_stage_makes_small_chunks_of_large_ones(right):
    """Registers are known much better, and facts as well as before. Most of it is what the smaller chunks do by
    themselves; the steps in which only the local memory learns, a tenth of all, add a little for every seed."""
    after, before = right["refined"], right["coarse"]
    assert (after[:, 1] > before[:, 1] + 0.15).all() and (after[:, 0] > before[:, 0] - 0.01).all(), right
    untrained = []
    for seed in range(3):
        model = note_models.load(f"coarse-{seed}")
        note_models.refine(model)
        untrained.append(note_models.right(model, 7)[1])
    gained = after[:, 1] - torch.tensor(untrained)
    assert (gained > 0).all() and gained.mean() > 0.01, (right, untrained)


def test_only_the_local_memory_learned_in_the_second_stage():
    for seed in range(3):
        before, after = (note_models.load(f"{kind}-{seed}") for kind in ("coarse", "refined"))
        other = dict(before.named_parameters())
        changed = {
            name.rpartition("mixer.")[2] for name, p in after.named_parameters() if (p != other[name]).any()
        }
        assert changed == {"gate", "up", "down", "rate.weight", "rate.bias"}
        for name in ("gate", "up", "down"):
            kept, made = (getattr(model.blocks[0].mixer, name)[0] for model in (before, after))
            assert torch.equal(kept, made)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"near must divide shard or else its largest, got \(3,\) and 8"):
        TNT(8, near=(3,), shard=8)
    with pytest.raises(ValueError, match=r"far and near must leave a memory, got None and \(\)"):
        TNT(8, far=None, near=())
    with pytest.raises(ValueError, match="rate must be above 0, got 0"):
        TNT(8, rate=0)
    with pytest.raises(ValueError, match="far must be an integer >= 1, got 0"):
        TNT(8, far=0)
    with pytest.raises(ValueError, match="near must be 2 sizes, one for each local memory"):
        built().refine((1,))


def test_registers_are_asked_for_what_was_last_written():
    """Replayed pair by pair, 4 or 6 tokens later; equal seeds give equal sequences."""
    tokens, targets = registers(40, 90, count=4, apart=(4, 6), vocabulary=30, seed=3)
    again = registers(40, 90, count=4, apart=(4, 6), vocabulary=30, seed=3)
    assert torch.equal(tokens, again[0]) and torch.equal(targets, again[1])
    asked = 0
    for row, answers in zip(tokens.tolist(), targets.tolist()):
        held: dict[int, tuple[int, int]] = {}
        for place in range(0, 90, 2):
            key, value = row[place], row[place + 1]
            assert 1 <= key <= 4 and answers[place + 1] == IGNORE
            if value:
                assert 15 <= value < 30 and answers[place] == IGNORE
                held[key] = (value, place)
                continue
            asked += 1
            assert answers[place] == held[key][0] and place - held[key][1] in (4, 6)
    assert 0.3 < asked / (40 * 45) < 0.45
    with pytest.raises(ValueError, match=r"count between 1 and 14, .* got 1, \(4, 8\), 10 and 15"):
        registers(1, 10, count=15, vocabulary=30)
