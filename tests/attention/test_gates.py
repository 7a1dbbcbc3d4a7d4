"""Gates: pooled input, true targets without N x N, training that touches nothing else, files that are checked."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tilewise
from tests import tiny
from tests.conformance.common import qkv
from tilewise.attention import SLA, SPT, Boxes, Layout
from tilewise.attention import scores as scores_module
from tilewise.attention.gates import (
    BlockGate,
    BlockLoss,
    BoundaryPredictor,
    ChunkAdapters,
    Fit,
    Gates,
    TrueMax,
    block_lesson,
    boundary_lesson,
    chunk_lesson,
    chunk_loss,
    fit,
)
from tilewise.attention.gates.rotary import frequencies, resampled, turn
from tilewise.attention.gates.store import describe, rebuild
from tilewise.errors import UserError
from tilewise.models import bundled_gates, capture, gated, gated_names, load_model, serves
from tilewise.models.gates import load_gates, save_gates
from tilewise.tiles import NONE, Causal, Documents, Padding, Tiling, Window


def _layout(q, k, tile: int = 8, mask=None) -> Layout:
    view = (mask or Causal()).bind(q.shape[2], k.shape[2])
    return Layout(q, k, view, Tiling(tile), Tiling(tile), q.shape[3] ** -0.5)


def _gates(seed: int = 0, layers=(0, 2), **settings) -> Gates:
    return Gates(
        {layer: BlockGate(8, 4, 2, **{"width": 6, **settings}, seed=seed + layer) for layer in layers}
    )


def _lessons(gates: Gates, count: int = 3) -> list[dict]:
    out = []
    for seed in range(count):
        q, k, _ = qkv(heads=4, kv_heads=2, n_q=70, dtype=torch.float32, seed=seed)
        out.append({layer: block_lesson(gate, 3 * q, k, tile=8) for layer, gate in gates.items()})
    return out


# Rotary positions


def test_rotation_is_that_of_transformers_and_can_be_taken_off():
    model, n = tiny.make("llama"), 40
    seen: dict[str, Tensor] = {}
    attention = model.model.layers[1].self_attn
    attention.q_proj.register_forward_hook(lambda module, given, out: seen.update(q=out))
    tokens = torch.randint(256, (1, n), generator=torch.Generator().manual_seed(0))
    rotated = capture(model, tokens, layers=[1])[1][0]
    plain = seen["q"].unflatten(-1, (4, 8)).transpose(1, 2)
    angles = frequencies(float(model.config.rope_parameters["rope_theta"]), 8)
    torch.testing.assert_close(torch.tensor(angles), model.model.rotary_emb.inv_freq)
    at = torch.arange(n).view(1, 1, n)
    torch.testing.assert_close(turn(plain, at, angles), rotated)
    torch.testing.assert_close(turn(rotated, at, angles, back=True), plain)
    cos, sin = model.model.rotary_emb(plain, at[0])
    torch.testing.assert_close(turn(plain, at, angles), apply_rotary_pos_emb(plain, plain, cos, sin)[0])


def test_partial_rotation_leaves_the_rest_and_none_leaves_all():
    x, at = torch.randn(2, 4, 9, 8, dtype=torch.float64), torch.arange(9).view(1, 1, 9)
    turned = turn(x, at, (0.5, 0.1))
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.equal(turned[..., :4], x[..., :4])
    torch.testing.assert_close(turn(turned, at, (0.5, 0.1), back=True), x)
    assert turn(x, at, ()) is x
    assert resampled(frequencies(100.0, 8), 8, 8) == frequencies(100.0, 8)
    assert resampled(frequencies(100.0, 8), 8, 4) == pytest.approx(frequencies(100.0, 4))


# The gate


@pytest.mark.evidence
@pytest.mark.parametrize("rotary", [None, 50.0, (0.7, 0.2)])
@pytest.mark.parametrize("mask", [None, Causal() & Padding(torch.arange(30).ge(5).unsqueeze(0))])
def test_gate_is_its_definition(rotary, mask):
    """Unrotated, pooled, taken to few numbers, rotated by where the tile begins, compared: in loops."""
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=30)
    gate = BlockGate(
        head_dim=8,
        heads=4,
        kv_heads=2,
        width=4,
        rotary=rotary,
        query_pools=("mean", "min"),
        key_pools=("max",),
        seed=3,
    )
    layout = _layout(q, k, 8, mask)
    got = gate(gate.pool(layout))
    first = 0 if mask is None else 5
    angles = gate.angles

    def rotated(x, at, angles, sign):
        out, half = x.clone(), len(angles)
        for i, angle in enumerate(angles):
            c, s = torch.tensor(at * angle).cos(), sign * torch.tensor(at * angle).sin()
            out[i], out[half + i] = x[i] * c - x[half + i] * s, x[half + i] * c + x[i] * s
        return out

    short = tuple(angles[i * len(angles) // c] for c in [min(2, len(angles) * 4 // 8)] for i in range(c))
    for head in range(4):
        for i in range(4):
            rows = [rotated(q[0, head, t], t, angles, -1) for t in range(8 * i, min(8 * i + 8, 30))]
            pooled = torch.cat([torch.stack(rows).mean(0), torch.stack(rows).amin(0)])
            left = rotated(pooled @ gate.query[head].double(), 8 * i, short, 1)
            for j in range(4):
                tokens = range(max(8 * j, first), min(8 * j + 8, 30))
                keys = torch.stack([rotated(k[0, head // 2, t], t, angles, -1) for t in tokens]).amax(0)
                right = rotated(keys @ gate.key[head // 2].double(), tokens[0], short, 1)
                torch.testing.assert_close(got[0, head, i, j], left @ right / 2, rtol=1e-6, atol=1e-6)


def test_hidden_keys_do_not_enter_whatever_they_hold():
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=30, dtype=torch.float32)
    mask = Causal() & Padding(torch.arange(30).ge(9).unsqueeze(0))
    gate, spoiled = BlockGate(8, 4, 2, 6), k.clone()
    spoiled[:, :, :9] = torch.nan
    for x in (k, spoiled):
        assert torch.equal(gate(gate.pool(_layout(q, x, 8, mask))), gate(gate.pool(_layout(q, k, 8, mask))))


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Causal() & Window(20, 0),
        Causal() & Documents(torch.tensor([0, 9, 9, 50])),
        Window(None, None),
    ],
)
@pytest.mark.parametrize("at_once", [1, 1000, 10**9])
def test_true_max_is_its_definition_whatever_the_pieces(mask, at_once, monkeypatch):
    monkeypatch.setattr(scores_module, "IN_CACHE", at_once)
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=50)
    layout = _layout(q, k, 8, mask)
    got = TrueMax().score(layout, layout.kinds() != NONE)
    logits = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    weights = logits.masked_fill(~layout.view.tokens(), -torch.inf).softmax(-1).nan_to_num(0)
    for i in range(7):
        for j in range(7):
            want = weights[:, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].amax((2, 3))
            torch.testing.assert_close(got[:, :, i, j].double(), want, rtol=1e-5, atol=1e-7)


class _Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_a_lesson_holds_nothing_n_by_n(monkeypatch):
    monkeypatch.setattr(scores_module, "IN_CACHE", 1 << 16)
    n, gate = 1024, BlockGate(8, 4, 2, 6)
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=n, dtype=torch.float32)
    with _Largest() as largest:
        lesson = block_lesson(gate, q, k, tile=16, mask=Causal(), scale=0.3)
    assert largest.most <= 4 * n * n / 16 < n * n and lesson.target.shape == (1, 4, 64, 64)
    torch.testing.assert_close(lesson.target.sum(-1), torch.ones(1, 4, 64))


@torch.no_grad()
def test_loss_is_a_divergence():
    """0 where the gate says the shares of the lesson, and the rows that are skipped have no say."""
    gates = _gates()
    lesson = _lessons(gates, 1)[0][0]
    loss = BlockLoss(skip=0.25)
    assert float(loss(lambda pooled: lesson.target.clamp(min=1e-30).log(), lesson)) == pytest.approx(
        0, abs=1e-6
    )
    assert float(loss(gates[0], lesson)) > 0.01
    changed = lesson._replace(target=lesson.target.clone())
    changed.target[:, :, :2] = changed.target[:, :, :2].flip(-1)
    assert float(loss(gates[0], lesson)) == float(loss(gates[0], changed))
    assert float(BlockLoss(skip=0.0)(gates[0], lesson)) != float(loss(gates[0], lesson))


def test_lessons_are_the_same_by_name_and_under_the_usual_mask_and_scale():
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=40, dtype=torch.float32)
    usual = {"mask": Causal(), "scale": 8**-0.5}
    gate, predictor, adapters = BlockGate(8, 4, 2), BoundaryPredictor(8, 4, 2), ChunkAdapters(8, 4, 2)
    made = block_lesson(gate=gate, q=q, k=k, tile=16, **usual)
    assert torch.equal(made.target, block_lesson(gate, q, k, tile=16).target)
    bounds = boundary_lesson(predictor=predictor, q=q, k=k, **usual)
    assert torch.equal(bounds.target, boundary_lesson(predictor, q, k).target)
    ends = torch.arange(40) % 7 == 0
    chunks = chunk_lesson(adapters=adapters, q=q, k=k, ends=ends, scale=8**-0.5)
    assert torch.equal(chunks.target, chunk_lesson(adapters, q, k, ends).target)
    assert torch.equal(chunk_loss(adapters=adapters, lesson=chunks), chunk_loss(adapters, chunks))


@pytest.mark.parametrize("kind", [BoundaryPredictor, ChunkAdapters])
def test_other_kinds_are_saved_and_loaded_too(tmp_path, kind):
    gates = Gates({layer: kind(8, 4, 2, width=4, window=3, rotary=50.0, seed=layer) for layer in (1, 2)})
    save_gates(gates, tmp_path / "g", dtype=torch.float32)
    found = load_gates(tmp_path / "g", model=tiny.make("llama"))
    assert type(found[1]) is kind and found[1].settings() == gates[1].settings()
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in gates.state_dict().items())


@pytest.mark.parametrize(
    "kind",
    [
        lambda: SLA(8, 0.2, 0.3, tile=(16, 32), feature="elu"),
        lambda: SPT(8, subspaces=4, codewords=3, share=0.5),
    ],
)
def test_layers_that_serve_as_gates_are_saved_and_loaded_too(tmp_path, kind):
    torch.manual_seed(0)
    gates = Gates({layer: kind() for layer in (0, 2)})
    for x in gates.parameters():
        torch.nn.init.normal_(x)
    save_gates(gates, tmp_path / "g", dtype=torch.float32)
    found = load_gates(tmp_path / "g", model=tiny.make("llama"))
    assert found[2].settings() == gates[2].settings() and found[2].method().parameters().keys()
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in gates.state_dict().items())


def test_a_file_holds_no_order(tmp_path):
    with pytest.raises(ValueError, match="a file holds an SLA in the tokens' own order"):
        save_gates(Gates({0: SLA(8, order=Boxes((4, 4), (2, 2)))}), tmp_path / "g")


# What they serve

EACH = {
    "seer-attention": (lambda seed: BlockGate(8, 4, 2, 6, seed=seed), {"top_k": 2, "tile": 16}),
    "dhsa": (lambda seed: BoundaryPredictor(8, 4, 2, seed=seed), {"budget": 40, "block": 16, "local": 8}),
    "chunk-llm": (lambda seed: ChunkAdapters(8, 4, 2, seed=seed), {"top_k": 2, "longest": 12}),
    "sla": (lambda seed: SLA(8, tile=(16, 16)), {"critical": 0.2, "negligible": 0.0}),
    "spt": (lambda seed: SPT(8), {"share": 0.2}),
}


@pytest.mark.parametrize("name", EACH)
def test_gates_become_the_method_they_serve_in_their_layers(name):
    """With the settings given, and in a patched model, where another seed of the gates is another method."""
    torch.manual_seed(0)
    make, settings = EACH[name]
    one, other = (Gates({layer: make(seed + layer) for layer in (0, 2)}) for seed in (0, 7))
    if name == "sla":
        torch.nn.init.normal_(other[2].project.weight)
    recipe = gated(one, **settings)
    assert serves(one) == name and set(recipe.methods) == {0, 2} and recipe.layers is None
    assert all(getattr(recipe.methods[2], key) == value for key, value in settings.items())
    assert recipe.decodes is ("decode" in recipe.modes) is (name in ("chunk-llm", "spt"))
    assert recipe.needs != "nothing" and "a search" not in recipe.needs
    model, tokens = (
        tiny.make("llama"),
        torch.randint(256, (1, 150), generator=torch.Generator().manual_seed(0)),
    )

    def logits(setting):
        with torch.no_grad(), tilewise.patch(model, setting):
            return model(tokens, use_cache=False).logits

    mine = logits(recipe)
    assert torch.equal(mine, logits(dict(recipe.methods)))
    for wrong in (gated(other, **settings), "dense"):
        assert (mine - logits(wrong)).abs().max() > 1e-5


def test_settings_that_do_not_fit_are_refused():
    gates = _gates()
    assert gated(gates, threshold=0.1).methods[0].top_k is None and gated(gates).methods[0].top_k == 8
    with pytest.raises(ValueError, match="the settings of seer-attention are threshold, tile, top_k, got g"):
        gated(gates, odd=1, gate=3)
    with pytest.raises(ValueError, match="tile must be an integer >= 1, got 0"):
        gated(gates, tile=0)
    with pytest.raises(ValueError, match="name must be one of seer-attention, dhsa, .*got 'moba'"):
        bundled_gates("moba")
    with pytest.raises(ValueError, match="layers must be the number of the model's layers"):
        gated(gates).save("nowhere.json")


@pytest.mark.parametrize("name", gated_names())
def test_gates_of_the_bundled_model_come_with_it(name):
    """They fit it, serve what their file is called, are small, and read as it does: no leak."""
    model, _ = load_model()
    gates = load_gates(bundled_gates(name), model=model)
    assert serves(gates) == name and gates.layers == tuple(range(6))
    assert bundled_gates(name).stat().st_size < 450_000
    recipe, tokens = (
        gated(gates),
        torch.tensor([list(b"What the gates of this model were trained for. " * 8)]),
    )
    with torch.no_grad(), tilewise.patch(model, recipe, decode=recipe if recipe.decodes else "dense"):
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        assert model(tokens[:, -1:], past_key_values=cache).logits.isfinite().all()


# Training


def test_training_moves_gates_and_nothing_else():
    """The model's weights stay as they are bit for bit, and have no gradient."""
    model = tiny.make("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    gates, start = _gates(), _gates()
    tokens = torch.randint(256, (3, 70), generator=torch.Generator().manual_seed(1))
    lessons = [
        {
            layer: block_lesson(gates[layer], q, k, tile=8)
            for layer, (q, k, _) in capture(model, row, layers=[0, 2]).items()
        }
        for row in tokens
    ]
    losses = fit(gates, lessons, BlockLoss(), steps=30, rate=3e-2, seed=0)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(x, start.state_dict()[name]) for name, x in gates.state_dict().items())


def test_a_layer_without_lessons_is_left_alone():
    gates, start = _gates(), _gates()
    lessons = [{2: lesson[2], 7: None} for lesson in _lessons(gates)]
    fit(gates, lessons, BlockLoss(), steps=3)
    assert torch.equal(gates[0].query, start[0].query) and not torch.equal(gates[2].query, start[2].query)
    with pytest.raises(ValueError, match=r"none of the layers \[0, 2\]"):
        fit(gates, [{1: lessons[0][2]}], BlockLoss(), steps=1)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_interrupted_and_resumed_is_the_same_bit_for_bit(stop):
    whole, seen = _gates(), []
    losses = fit(
        gates=whole, lessons=_lessons(whole), loss=BlockLoss(), steps=8, rate=1e-2, seed=5,
        progress=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert seen == list(enumerate(losses))
    first = Fit(gates=_gates(), lessons=_lessons(whole), loss=BlockLoss(), steps=8, rate=1e-2, seed=5)
    assert len(first.run(until=stop, progress=None)) == stop
    second = Fit(_gates(seed=90), _lessons(whole), BlockLoss(), steps=8, rate=1e-2, seed=5)
    second.load_state_dict(first.state_dict())
    assert second.run() == losses
    for name, x in second.gates.state_dict().items():
        assert torch.equal(x, whole.state_dict()[name])


def test_every_round_takes_every_lesson_once():
    training = Fit(_gates(), [{0: i} for i in range(5)], lambda gate, i: gate.query.sum() * i, steps=20)
    order = [training._which(step) for step in range(20)]
    assert (
        all(sorted(order[i : i + 5]) == list(range(5)) for i in (0, 5, 10, 15)) and order[:5] != order[5:10]
    )


def test_a_loss_that_is_not_finite_stops_training_before_the_step():
    gates, start = _gates(), _gates()
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        fit(gates, [{0: 0}], lambda gate, lesson: gate.query.sum() * torch.nan, steps=2)
    assert torch.equal(gates[0].query, start[0].query)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: BlockGate(0, 4, 2), "head_dim must be an integer >= 1, got 0"),
        (lambda: BlockGate(8, 4, 3), "heads must be a multiple of kv_heads"),
        (lambda: BlockGate(8, 4, 2, width=5), "width even, got 4, 2, 5"),
        (lambda: BlockGate(8, 4, 2, rotary=-1.0), "rotary must be a base > 0"),
        (lambda: BlockGate(8, 4, 2, rotary=torch.ones(5)), "up to 4 angles"),
        (lambda: BlockGate(8, 4, 2, key_pools=("mean", "mean")), "key_pools must be some of mean, max, min"),
        (lambda: BlockGate(8, 4, 2, query_pools=()), "query_pools must be"),
        (lambda: BlockLoss(1.0), r"skip must be in \[0, 1\), got 1.0"),
        (lambda: Gates({}), "by_layer must map"),
        (lambda: Gates(by_layer={-1: BlockGate(8, 4, 2)}), "by_layer must map"),
        (lambda: Gates({0: BlockGate(8, 4, 2), 1: BlockGate(8, 4, 4)}), "one kind with the same settings"),
        (lambda: _gates()[1], r"gates for the layers \[0, 2\], not for 1"),
        (lambda: fit(_gates(), [], BlockLoss(), steps=1), "lessons must hold at least one"),
        (lambda: fit(_gates(), [{}], BlockLoss(), steps=0), "steps must be an integer >= 1"),
        (lambda: fit(_gates(), [{}], BlockLoss(), steps=1, rate=0), "rate must be a number > 0, got 0"),
        (lambda: block_lesson(BlockGate(8, 4, 2), *qkv(heads=2)[:2]), "is for 4 query heads, 2 kv heads"),
        (lambda: block_lesson(BlockGate(8, 4, 2), *qkv(heads=4, kv_heads=2)[:2], tile=0), "tile must be"),
        (lambda: describe(Gates({0: nn.Linear(2, 2)})), "gates must be of BlockGate"),
    ],
)  # fmt: skip
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# Files


@pytest.mark.parametrize("rotary", [None, 1000.0, (0.7, 0.2)])
def test_saved_and_loaded_is_the_same(tmp_path, rotary):
    gates = _gates(rotary=rotary, key_pools=("mean", "min"))
    save_gates(gates, tmp_path / "g.safetensors", dtype=torch.float32)
    found = load_gates(path=tmp_path / "g.safetensors", device="cpu")
    assert found.layers == (0, 2) and found[2].settings() == gates[2].settings()
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in gates.state_dict().items())
    assert not any(p.requires_grad for p in found.parameters())
    save_gates(gates, tmp_path / "g.safetensors")
    assert load_file(tmp_path / "g.safetensors")["gates.0.query"].dtype == torch.float16


def test_files_that_are_none_or_lack_something(tmp_path):
    path, gates = tmp_path / "g.safetensors", _gates()
    with pytest.raises(UserError, match="do not exist"):
        load_gates(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="does not hold gates"):
        load_gates(path)
    weights, header = dict(gates.state_dict()), describe(gates)

    def stored(weights, header):
        save_file(weights, path, {"gates": json.dumps(header)})
        with pytest.raises(UserError) as refused:
            load_gates(path)
        return str(refused.value)

    some = {name: x for name, x in weights.items() if name != "gates.2.key"}
    assert "the weights lack gates.2.key" in stored(some, header)
    assert "have beside what is known odd" in stored({**weights, "odd": torch.ones(1)}, header)
    assert "gates.0.key is [2, 3], the settings say [2, 24, 6]" in stored(
        {**weights, "gates.0.key": torch.ones(2, 3)}, header
    )
    assert "kind must be one of block" in stored(weights, {**header, "kind": "odd"})
    assert "settings are not those of BlockGate" in stored(weights, {**header, "settings": {"odd": 1}})
    assert "the weights lack gates.3" in stored(weights, {**header, "layers": [0, 2, 3]})
    save_file(weights, path)
    with pytest.raises(UserError, match="does not hold gates"):
        load_gates(path)
    assert torch.equal(rebuild(header, weights)[0].query, gates[0].query)


@pytest.mark.parametrize(
    ("gates", "match"),
    [
        ({}, None),
        ({"layers": (0, 3)}, "a gate for layer 3, the model has 3 layers"),
        ({"sizes": (8, 2, 2)}, "for heads 2, the model has 4"),
        ({"sizes": (8, 4, 4)}, "for kv_heads 4, the model has 2"),
        ({"sizes": (16, 4, 2)}, "for head_dim 16, the model has 8"),
    ],
)
def test_gates_of_another_model_are_refused(tmp_path, gates, match):
    layers, sizes = gates.get("layers", (0, 2)), gates.get("sizes", (8, 4, 2))
    save_gates(Gates({layer: BlockGate(*sizes) for layer in layers}), tmp_path / "g")
    if match is None:
        assert load_gates(tmp_path / "g", model=tiny.make("llama")).layers == layers
        return
    with pytest.raises(UserError, match=match):
        load_gates(tmp_path / "g", model=tiny.make("llama"))
