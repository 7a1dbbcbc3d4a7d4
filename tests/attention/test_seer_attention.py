"""SeerAttention: a gate trained on the true block-max map chooses better than pooled scores at equal density."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from torch import Tensor

import tilewise
from tests import tiny
from tests.attention.synthetic import true_mass
from tests.conformance.common import qkv
from tilewise.attention import Antidiagonal, Layout, MeanPool, Own, Tiles, TopK, attend, plan
from tilewise.attention.gates import BlockGate, BlockLoss, Gates, TrueMax, block_lesson, fit
from tilewise.attention.recipes.seer_attention import Above, Learned, SeerAttention
from tilewise.tiles import Causal, Tiling

N, TILE, LAYERS = 2048, 64, 6
LEARNT = 96_000  # bytes of the sample that the bundled gates were trained on


def _text(start: int, n: int = N) -> Tensor:
    data = resources.files("tilewise.data").joinpath("sample.txt").read_bytes()
    return torch.tensor(list(data[start : start + n]))


@pytest.fixture(scope="module")
def model():
    from tilewise.models import load_model

    return load_model()[0]


def _gates(model, seed: int = 0) -> Gates:
    base = model.config.rope_parameters["rope_theta"]
    return Gates({layer: BlockGate(64, 4, 2, 32, base, seed=seed + layer) for layer in range(LAYERS)})


@torch.no_grad()
def _logits(model, tokens: Tensor, setting, densities: list[float]) -> Tensor:
    keep = lambda event: densities.append(event.plan.density)  # noqa: E731
    with tilewise.patch(model, setting, check=False, observer=keep):
        logits = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits
    return logits.float().log_softmax(-1)


def _divergences(model, texts: list[Tensor], settings: dict, tile: int = TILE) -> dict[str, float]:
    """How far each setting moves the model's next-byte distribution, nats; all at one density, which is checked."""
    out, used = dict.fromkeys(settings, 0.0), {}
    for tokens in texts:
        dense = _logits(model, tokens, "dense", [])
        for name, setting in settings.items():
            found: list[float] = []
            moved = _logits(model, tokens, setting, found)
            out[name] += float((dense.exp() * (dense - moved)).sum(-1).mean()) / len(texts)
            used[name] = found
    assert len({tuple(found) for found in used.values()}) == 1, "settings differ in density"
    return out


def _fixed(score, count: int, tile: int = TILE) -> Tiles:
    return Tiles(score, TopK(count), (tile, tile), always=(Own(),))


@pytest.mark.evidence
def test_bundled_gates_choose_better_than_pooled_scores_on_text_they_have_not_seen(model):
    """All layers of the bundled model read 4 tiles of 32 a row. Its next bytes move less than two thirds as far as
    by XAttention's sums of stride 8, half as far as by pooled means, and less than twice as far as by the true map.

    Controls: the same gates untrained, which are worse than either.
    """
    from tilewise.models.gates import load_gates

    gates = load_gates(model=model)
    settings = {
        "trained": gates.methods(SeerAttention, top_k=4, tile=TILE),
        "untrained": _gates(model).methods(SeerAttention, top_k=4, tile=TILE),
        "means": _fixed(MeanPool(), 4),
        "antidiagonals": _fixed(Antidiagonal(8), 4),
        "true map": _fixed(TrueMax(), 4),
    }
    found = _divergences(model, [_text(LEARNT), _text(LEARNT + 14_000)], settings)
    print({name: round(value, 4) for name, value in found.items()})
    assert found["trained"] < 0.65 * found["antidiagonals"] and found["trained"] < 0.5 * found["means"]
    assert found["trained"] < 2 * found["true map"]
    assert found["untrained"] > 1.2 * max(found["means"], found["antidiagonals"])


@pytest.mark.evidence
def test_trained_here_and_on_shuffled_maps(model):
    """Ten texts of 1,024 bytes and 400 steps are enough to come half of the way from antidiagonals to the true map.

    Control: the same training on maps whose tiles are shuffled within each row teaches nothing.
    """
    from tilewise.models import capture

    n, tile, made = 1024, 32, {"true": _gates(model), "shuffled": _gates(model)}
    lessons: dict[str, list] = {"true": [], "shuffled": []}
    g = torch.Generator().manual_seed(0)
    for start in range(0, 90_000, 9_000):
        seen = capture(model, _text(start, n))
        right = {
            layer: block_lesson(made["true"][layer], q, k, tile=tile) for layer, (q, k, _) in seen.items()
        }
        wrong = {}
        for layer, lesson in right.items():
            order = torch.rand(lesson.target.shape, generator=g).masked_fill(~lesson.visible, 2).argsort(-1)
            wrong[layer] = lesson._replace(target=lesson.target.gather(-1, order))
        lessons["true"].append(right)
        lessons["shuffled"].append(wrong)
    for name, gates in made.items():
        fit(gates, lessons[name], BlockLoss(), steps=400, rate=1e-2)
    settings = {name: gates.methods(SeerAttention, top_k=4, tile=tile) for name, gates in made.items()}
    settings |= {"antidiagonals": _fixed(Antidiagonal(8), 4, tile), "map": _fixed(TrueMax(), 4, tile)}
    found = _divergences(model, [_text(LEARNT + i * 9_000, n) for i in range(3)], settings)
    print({name: round(value, 4) for name, value in found.items()})
    assert found["true"] < 0.5 * (found["antidiagonals"] + found["map"])
    assert found["shuffled"] > 1.2 * found["antidiagonals"]


@pytest.mark.evidence
@torch.no_grad()
def test_what_is_learnt_is_the_largest_weight_of_each_tile(model):
    """On text not seen, the gate's shares are within 0.2 nats of the true ones, over all layers.

    Controls: untrained gates, and shares made of pooled means, sharpened as suits them best, are several times as
    far.
    """
    from tilewise.models import capture
    from tilewise.models.gates import load_gates

    trained, untrained, loss = load_gates(), _gates(model), BlockLoss()
    found = torch.zeros(3)
    for layer, (q, k, _) in capture(model, _text(LEARNT + 7_000)).items():
        lesson = block_lesson(trained[layer], q, k, tile=TILE)
        layout = Layout(q, k, Causal().bind(N, N), Tiling(TILE), Tiling(TILE), q.shape[3] ** -0.5)
        means = MeanPool().score(layout, lesson.visible).clamp(min=1e-30).log()
        pooled = min(float(loss(lambda x, f=f, m=means: f * m, lesson)) for f in (0.05, 0.1, 0.2, 0.5, 1, 2))
        found += torch.tensor(
            [float(loss(trained[layer], lesson)), float(loss(untrained[layer], lesson)), pooled]
        )
    trained_off, untrained_off, pooled_off = (found / LAYERS).tolist()
    print(f"{trained_off:.3f} trained, {untrained_off:.3f} untrained, {pooled_off:.3f} pooled")
    assert trained_off < 0.2 and untrained_off > 5 * trained_off and pooled_off > 2 * trained_off


@pytest.mark.evidence
@pytest.mark.parametrize("top_k", [3, None])
def test_choice_is_its_definition(top_k):
    """The softmax of the gate's logits over visible tiles; the best of each row or those above the threshold."""
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=75)
    q = 4 * q
    gate = BlockGate(8, 4, 2, width=8, seed=1)
    threshold = None if top_k else 0.15
    method = SeerAttention(gate, top_k=top_k, threshold=threshold, tile=8)
    keep = plan(method, q, k, mask="causal").tile_maps[0].keep
    layout = Layout(q, k, Causal().bind(75, 75), Tiling(8), Tiling(8), 8**-0.5)
    with torch.no_grad():
        logits = gate(gate.pool(layout))
    for head in range(4):
        for row in range(10):
            shares = logits[0, head, row, : row + 1].softmax(-1).tolist()
            if top_k:
                want = {row, *sorted(range(row), key=lambda j: -shares[j])[: top_k - 1]}
            else:
                want = {row, *(j for j in range(row) if shares[j] >= threshold)}
            assert set(keep[0, head, row].nonzero().flatten().tolist()) == want


def test_every_layer_of_a_model_uses_its_own_gate():
    model = tiny.make("llama")
    gates = Gates({layer: BlockGate(8, 4, 2, 6, seed=layer) for layer in (0, 2)})
    used = {}
    tokens = torch.randint(256, (1, 200), generator=torch.Generator().manual_seed(0))
    with tilewise.patch(
        model, gates.methods(SeerAttention, top_k=3, tile=16), observer=lambda e: used.update({e.layer: e})
    ):
        model(input_ids=tokens, use_cache=False)
    assert type(used[1].method).name == "dense"
    for layer in (0, 2):
        event = used[layer]
        assert event.method.gate is gates[layer]
        keep = (
            plan(SeerAttention(gates[layer], top_k=3, tile=16), event.q, event.k, mask="causal")
            .tile_maps[0]
            .keep
        )
        assert torch.equal(keep, event.plan.tile_maps[0].keep)


def test_gate_is_a_score_for_other_methods():
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=96)
    mass, visible = true_mass(q, k, (16, 16))
    keep = (
        plan(Tiles(Learned(BlockGate(8, 4, 2, 6)), Above(threshold=0.5), (16, 16)), q, k, mask="causal")
        .tile_maps[0]
        .keep
    )
    assert (keep.sum(-1) <= 2).all() and keep.shape == mass.shape and not (keep & ~visible).any()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "give top_k or threshold, one of them"),
        ({"top_k": 3, "threshold": 0.1}, "got top_k=3, threshold=0.1"),
        ({"top_k": 0}, "top-k must be an integer >= 1, got 0"),
        ({"threshold": 1.0}, r"threshold must be in \[0, 1\), got 1.0"),
        ({"top_k": 3, "tile": 0}, "tile must be an integer >= 1, got 0"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        SeerAttention(BlockGate(8, 4, 2), **settings)


def test_what_does_not_fit_is_refused():
    q, k, v = qkv(heads=4, kv_heads=4, n_q=40)
    method = SeerAttention(BlockGate(8, 4, 2), top_k=3)
    with pytest.raises(
        ValueError, match="for 4 query heads, 2 kv heads and head_dim 8; the call has 4, 4 and 8"
    ):
        attend(q, k, v, method, mask="causal")
    with pytest.raises(ValueError, match="does not support decode"):
        attend(q[:, :, :1], k[:, :2], v[:, :2], method, mask="causal")
    with pytest.raises(TypeError, match="gate must be the BlockGate of a layer, got int"):
        SeerAttention(3, top_k=3)
