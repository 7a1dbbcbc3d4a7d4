"""ChunkLLM: a choice per chunk does what a choice per token does; step by step equals all at once."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from torch import Tensor

from tests.conformance.common import qkv
from tilewise.attention import Pass, Plan, attend, plan
from tilewise.attention.gates import ChunkAdapters, Gates, chunk_lesson, chunk_loss, fit
from tilewise.attention.gates import chunks as chunks_module
from tilewise.attention.recipes.chunk_llm import ChunkLLM, best
from tilewise.tiles import Causal, Padding, TileMap, Tiling

N, LAYERS = 1024, (2, 4, 5)
LEARNT = 96_000  # bytes of the sample that adapters learn from


def _bytes(start: int) -> Tensor:
    data = resources.files("tilewise.data").joinpath("sample.txt").read_bytes()
    return torch.tensor(list(data[start : start + N]))


def _clauses(text: Tensor) -> Tensor:
    """Bytes after which a clause is over: the end of a line, and a space behind a point or a comma."""
    before = torch.cat([text[:1], text[:-1]])
    return (text == 10) | ((text == 32) & torch.isin(before, torch.tensor(list(b".,;:!?)"))))


def _captured(model, start: int) -> dict:
    from tilewise.models import capture

    return capture(model, _bytes(start), layers=LAYERS)


@pytest.fixture(scope="module")
def model():
    from tilewise.models import load_model

    return load_model()[0]


@pytest.fixture(scope="module")
def trained(model) -> Gates:
    """From 20 texts of 1,024 bytes; the model's weights stay as they are."""
    base = model.config.rope_parameters["rope_theta"]
    gates = Gates({layer: ChunkAdapters(64, 4, 2, rotary=base, seed=layer) for layer in LAYERS})
    before = {name: x.clone() for name, x in model.state_dict().items()}
    lessons = []
    for start in range(0, LEARNT - N, 4750):
        ends = _clauses(_bytes(start))
        seen = _captured(model, start)
        lessons.append({layer: chunk_lesson(gates[layer], q, k, ends) for layer, (q, k, _) in seen.items()})
    fit(gates, lessons, chunk_loss, steps=300, rate=3e-3)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    return gates


class _AtRandom(ChunkLLM):
    """The same chunks, and as many choices at times drawn at random in place of the chunks' ends."""

    def plan(self, q, k, view, scale):
        n = k.shape[2]
        bounds, keys = self._cut(k, view)
        chunks = Tiling.from_bounds(bounds)
        own = torch.arange(bounds.shape[-1] - 1)
        g = torch.Generator().manual_seed(1)
        times = torch.randperm(n - 1, generator=g)[: len(own) - 1].sort().values
        last = torch.searchsorted(times, torch.arange(n)) - 1  # the last choice before each token
        asked = times[last.clamp(min=0)]
        ids = chunks.ids(n, q.device)[0, 0]
        queries = self.adapters.features(q, view.q_pos)[:, asked]
        with torch.no_grad():
            scores = self.adapters.scores(queries, chunks.mean(keys.unsqueeze(1))[0][:, 0]).unsqueeze(1)
        before = (own < ids[asked].unsqueeze(-1)) & (last >= 0).unsqueeze(-1)
        keep = best(scores, before, self.top_k) | (own == ids.unsqueeze(-1))
        return Plan((Pass(view, TileMap(keep, Tiling(1), chunks)),), view)


def _told(weights: Tensor) -> type[ChunkLLM]:
    """The same chunks and times, and the choice to be learnt: by the true attention of a chunk's last token."""

    class Told(ChunkLLM):
        def plan(self, q, k, view, scale):
            bounds, _ = self._cut(k, view)
            chunks = Tiling.from_bounds(bounds)
            last = weights.mean(1)[0][(bounds[0, 0, :-1] - 1).clamp(min=0)]  # [chunks, N]
            scores = chunks.split(last.mT.view(1, 1, N, -1), 0).sum(3).mT
            own = torch.arange(bounds.shape[-1] - 1)
            keep = best(scores, own < own.unsqueeze(-1), self.top_k) | (own == own.unsqueeze(-1))
            return Plan((Pass(view, TileMap(keep, chunks, chunks)),), view)

    return Told


SEEN = torch.ones(N, N, dtype=torch.bool).tril()


def _weights(q: Tensor, k: Tensor) -> Tensor:
    logits = q @ k.repeat_interleave(2, 1).mT * q.shape[3] ** -0.5
    return logits.masked_fill(~SEEN, -torch.inf).softmax(-1)


def _held(method: ChunkLLM, q: Tensor, k: Tensor, weights: Tensor) -> tuple[float, float, int]:
    """Share of the true attention that is read, share of all visible scores that are computed, and chunks."""
    made = plan(method, q, k, mask="causal")
    kept = made.kept(torch.arange(N), torch.arange(N), 1)
    return (
        float((weights * kept).sum() / weights.sum()),
        float(kept.sum() / SEEN.sum()),
        method.chunks(k, made.view).shape[2] - 1,
    )


def _as_dense(make, cost: float, *given: Tensor) -> float:
    """Share of the attention that a control holds that reads as much, between two numbers of chunks."""
    below = (0.0, 0.0)
    for top_k in (1, 3, *range(5, 200)):
        held, reads, _ = _held(make(top_k), *given)
        if reads >= cost:
            return below[0] + (held - below[0]) * (cost - below[1]) / (reads - below[1])
        below = held, reads
    raise AssertionError("the control reads less whatever its number of chunks")


@pytest.mark.evidence
def test_a_choice_per_chunk_is_worth_one_per_token(model, trained):
    """On text not seen, a choice for every 20 tokens or more holds at least 0.98 of what choices for every token do
    that read as much, and 0.93 of what the choices hold that the adapters were to learn.

    Controls that read as much: as many choices at random times, and adapters that were not trained, hold less.
    """
    settings, total, choices = {"threshold": 0.5, "longest": 128}, torch.zeros(5), 0
    texts = (98_000, 112_000)
    cases = [(layer, qkv) for start in texts for layer, qkv in _captured(model, start).items()]
    for layer, (q, k, _) in cases:
        adapters, blank = trained[layer], ChunkAdapters(64, 4, 2, seed=90 + layer)
        blank.load_state_dict({**adapters.state_dict(), "query": blank.query, "key": blank.key})
        given = (q, k, _weights(q, k))
        held, cost, chunks = _held(ChunkLLM(adapters, top_k=6, **settings), *given)
        choices += chunks - 1
        controls = (
            (ChunkLLM, adapters, {"every": True}),
            (_AtRandom, adapters, {}),
            (ChunkLLM, blank, {}),
            (_told(given[2]), adapters, {}),
        )
        others = []
        for kind, own, more in controls:
            make = lambda n, kind=kind, own=own, more=more: kind(own, top_k=n, **settings, **more)  # noqa: E731
            others.append(_as_dense(make, cost, *given))
        total += torch.tensor([held, *others]) / len(cases)
    once, every, random, untrained, told = total.tolist()
    print(
        f"per chunk {once:.3f}, per token {every:.3f}, random {random:.3f}, untrained {untrained:.3f};",
        f"to be learnt {told:.3f}; {choices} choices",
    )
    assert choices * 20 < len(cases) * N
    assert once > 0.98 * every and once > 0.93 * told
    assert once > random + 0.03 and once > untrained + 0.01


@pytest.mark.evidence
def test_ends_are_told_and_layers_agree_with_the_rule(model, trained):
    """On text not seen, two thirds of the clauses' ends are told, and of what is told two thirds are ends.

    Control: before training, chance.
    """
    found = torch.zeros(2, 3)
    for start in (98_000, 112_000):
        truth = _clauses(_bytes(start))
        for layer, (_, k, _) in _captured(model, start).items():
            for i, adapters in enumerate((trained[layer], ChunkAdapters(64, 4, 2, seed=90))):
                with torch.no_grad():
                    told = adapters.ends(adapters.features(k, torch.arange(N).view(1, 1, N)))[0] > 0
                found[i] += torch.tensor([(told & truth).sum(), told.sum(), truth.sum()])
    (hits, told, truth), (lucky, guessed, _) = found.tolist()
    assert hits > 0.66 * truth and hits > 0.66 * told
    assert lucky < 0.2 * guessed


@pytest.mark.evidence
@pytest.mark.parametrize("every", [False, True])
def test_choice_is_its_definition(every):
    """The last token of the chunk before (or each token) chooses among the chunks complete by then, in loops."""
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=60)
    adapters = (
        ChunkAdapters(8, 4, 2, width=6, window=3, hidden=5, rotary=None, seed=4)
        .double()
        .requires_grad_(False)
    )
    method = ChunkLLM(adapters=adapters, top_k=2, threshold=0.5, longest=12, every=every)
    kept = plan(method, q, k, mask="causal").kept(torch.arange(60), torch.arange(60), 4)
    queries, keys = q[0].transpose(0, 1).flatten(1), k[0].transpose(0, 1).flatten(1)
    chunks, chosen, running, asked = [], [], [], None
    for token in range(60):
        if every and chunks:
            asked = token
        if asked is not None:
            scores = [
                float(queries[asked] @ adapters.query @ (keys[c].mean(0) @ adapters.key)) for c in chunks
            ]
            chosen = [t for c in sorted(range(len(chunks)), key=lambda c: -scores[c])[:2] for t in chunks[c]]
            asked = None
        running.append(token)
        assert set(kept[0, 0, token].nonzero().flatten().tolist()) == {*chosen, *running}
        window = torch.cat([torch.zeros(2, 16, dtype=torch.float64), keys])[token : token + 3].mT.flatten()
        ends = (
            float((window @ adapters.inner + adapters.inner_bias).relu() @ adapters.end + adapters.end_bias)
            > 0
        )
        if ends or len(running) == 12:
            chunks, running, asked = [*chunks, running], [], token
    assert len(chunks) > 4 and (kept == kept[:, :1]).all()


@pytest.mark.evidence
@pytest.mark.parametrize("prompt", [1, 2, 30, 79])
def test_token_by_token_equals_all_at_once(prompt):
    """Wherever the prompt is split, with the same choices; choices are made at ends alone, and are counted."""
    q, k, v = qkv(heads=4, kv_heads=2, n_q=80)
    method = ChunkLLM(ChunkAdapters(8, 4, 2, seed=4), top_k=2, threshold=0.6, longest=12)
    whole, (seen, state) = attend(q, k, v, method, mask="causal"), method.start(
        q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt]
    )  # fmt: skip
    out = [seen]
    for n in range(prompt + 1, 81):
        before, chosen = state.refreshes, state.chosen
        out.append(method.step(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], state))
        assert (state.refreshes > before) == (state.starts[-1] == n)
        assert state.refreshes > before or state.chosen is chosen
    torch.testing.assert_close(torch.cat(out, 2), whole)
    bounds = method.chunks(k, Causal().bind(80, 80))[0, 0].tolist()
    assert state.refreshes == len(state.starts) - 1
    assert [b for b in state.starts if b < 80] == bounds[:-1]
    assert 4 < state.refreshes < 40


@pytest.mark.evidence
def test_target_is_the_share_of_attention_whatever_the_pieces(monkeypatch):
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=40)
    ends = torch.zeros(40, dtype=torch.bool)
    ends[[4, 5, 20, 31, 39]] = True
    adapters = ChunkAdapters(8, 4, 2)
    weights = (q @ k.repeat_interleave(2, 1).mT * 0.4).masked_fill(
        ~Causal().bind(40, 40).tokens(), -torch.inf
    )
    weights = weights.softmax(-1).mean(1)[0]
    for at_once in (1, 400, 10**9):
        monkeypatch.setattr(chunks_module, "AT_ONCE", at_once)
        lesson = chunk_lesson(adapters, q, k, ends, scale=0.4)
        assert lesson.target.shape == (1, 4, 4)
        for row, token in enumerate((4, 5, 20, 31)):
            want = [weights[token, a:b].sum() for a, b in ((0, 5), (5, 6), (6, 21), (21, 32))]
            torch.testing.assert_close(
                lesson.target[0, row].double(), torch.stack(want), rtol=1e-5, atol=1e-6
            )


def test_later_tokens_never_change_earlier_choices():
    q, k, v = qkv(heads=4, kv_heads=2, n_q=97, dtype=torch.float64)
    method = ChunkLLM(ChunkAdapters(8, 4, 2, seed=4), top_k=2, longest=12)
    for first in (1, 17, 64, 96):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, first:] = 50 * torch.randn_like(x[:, :, first:])
        seen = [
            plan(method, *x[:2], mask="causal").kept(torch.arange(first), torch.arange(97), 4)
            for x in ((q, k), changed)
        ]
        assert torch.equal(*seen)
        before, after = (attend(*x, method, mask="causal")[:, :, :first] for x in ((q, k, v), changed))
        torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused():
    q, k, v = qkv(heads=4, kv_heads=2, n_q=40)
    adapters = ChunkAdapters(
        head_dim=8, heads=4, kv_heads=2, width=4, window=2, hidden=3, rotary=10.0, seed=1
    )
    for settings, match in (
        ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
        ({"longest": 0}, "longest must be an integer >= 1, got 0"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            ChunkLLM(adapters, **settings)
    with pytest.raises(TypeError, match="adapters must be the ChunkAdapters of a layer, got int"):
        ChunkLLM(3)
    with pytest.raises(ValueError, match="this ChunkAdapters is for 4 query heads, 2 kv heads"):
        attend(q, q, q, ChunkLLM(adapters), mask="causal")
    with pytest.raises(ValueError, match="decodes with the state of the 39 tokens before.*it has none"):
        attend(q[:, :, :1], k, v, ChunkLLM(adapters), mask="causal")
    with pytest.raises(ValueError, match="does not support chunked prefill"):
        attend(q[:, :, :2], k, v, ChunkLLM(adapters), mask="causal")
    _, state = ChunkLLM(adapters).start(q[:, :, :30], k[:, :, :30], v[:, :, :30])
    for method in (ChunkLLM(adapters, state=state), ChunkLLM(adapters, every=True).with_state(state)):
        with pytest.raises(
            ValueError, match="of the 39 tokens before, and without every=True; it has that of 30"
        ):
            attend(q[:, :, :1], k, v, method, mask="causal")
    with pytest.raises(ValueError, match="goes on token by token, this is token 40 after 30"):
        ChunkLLM(adapters).carry(q[:, :, :1], k, Causal().bind(1, 40), state)
    with pytest.raises(ValueError, match="without padding"):
        mask = Causal() & Padding(torch.arange(40).ge(3).unsqueeze(0))
        ChunkLLM(adapters).carry(q, k, mask.bind(40, 40), None)
    with pytest.raises(ValueError, match="one sequence of at least one token"):
        ChunkLLM(adapters).start(q[:, :, :0], k[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match=r"ends must be bool \[40\] with an end before the last token"):
        chunk_lesson(adapters, q, k, torch.zeros(40, dtype=torch.bool))
    with pytest.raises(ValueError, match="width must be an integer >= 1, got 0"):
        ChunkAdapters(8, 4, 2, width=0)
