"""LAWCAT: the layer is its formula, keeps what methods of attention keep, and decodes with a state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise import convert
from tilewise.attention import attend, plan
from tilewise.attention.gates import Gates
from tilewise.attention.gates.rotary import turn
from tilewise.compare import quality
from tilewise.models import bundled_gates, gated, load_gates, load_model, patch, save_gates
from tilewise.recurrence import LAWCAT, LinearizedAttention
from tilewise.recurrence.lawcat import TEMPER
from tilewise.tiles import Causal, Padding, Visibility, Window

SIZES = (4, 2, 16)  # heads, kv heads, head_dim


def layer(seed: int = 0, **options) -> LAWCAT:
    """With all of its weights random."""
    made = LAWCAT(*SIZES, features=8, rank=3, **options, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


def drawn(n: int, b: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(  # type: ignore[return-value]
        torch.randn(b, heads, n, SIZES[2], generator=generator, dtype=torch.float64).to(dtype)
        for heads in (SIZES[0], SIZES[1], SIZES[1])
    )


def written_out(made: LAWCAT, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, token by token, one head after the other."""

    def convolved(x: Tensor, weight: Tensor) -> Tensor:
        flat = x.transpose(1, 2).flatten(2)
        rows = [
            sum(weight[-1 - back] * flat[:, t - back] for back in range(made.conv) if t >= back)
            for t in range(x.shape[2])
        ]
        return torch.stack(rows, 1).unflatten(2, (x.shape[1], -1)).transpose(1, 2)

    told = torch.cat((k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2)), 2)
    gates = (made.up(made.down(told)).sigmoid() ** (1 / TEMPER)).unflatten(2, (made.kv_heads, -1))
    q, k = convolved(q, made.q_conv.weight), convolved(k, made.k_conv.weight)

    def phi(x: Tensor, head: int) -> Tensor:
        made_ = x @ made.project[head]
        return torch.cat((made_.softmax(-1), (-made_).softmax(-1)), -1)

    out = torch.zeros_like(q)
    for head in range(made.heads):
        own = head // (made.heads // made.kv_heads)
        state = torch.zeros(len(q), 2 * made.features, v.shape[3], dtype=q.dtype)
        total = torch.zeros(len(q), 2 * made.features, dtype=q.dtype)
        for t in range(q.shape[2]):
            gate, key, query = gates[:, t, own], phi(k[:, own, t], own), phi(q[:, head, t], own)
            if not made.gated:
                gate = torch.ones_like(gate)
            state = gate.unsqueeze(2) * state + key.unsqueeze(2) * v[:, own, t].unsqueeze(1)
            total = gate * total + key
            out[:, head, t] = (query.unsqueeze(1) @ state)[:, 0] / (query * total).sum(-1, keepdim=True)
    return out + out @ made.adapt


@pytest.mark.evidence
@pytest.mark.parametrize("gated_", [True, False])
def test_the_layer_is_its_formula(gated_):
    made, (q, k, v) = layer(gated=gated_).double(), drawn(30)
    got = attend(q, k, v, made.method(), mask="causal")
    torch.testing.assert_close(got, written_out(made, q, k, v), rtol=1e-9, atol=1e-10)


def test_turned_back_positions_do_not_matter():
    """With a rotary base, shifting every position changes nothing; without one it does."""
    q, k, v = drawn(20)
    for base in (100.0, None):
        made = layer(rotary=base).double()
        outs = []
        for shift in (0, 7):
            at = torch.arange(20) + shift
            angles = made.angles or tuple(100.0 ** (-2 * i / 16) for i in range(8))
            turned = [turn(x, at.view(1, 1, -1), angles) for x in (q, k)]
            moved = Visibility.everything(at.view(1, 1, -1), at.view(1, 1, -1))
            outs.append(made.run(*turned, v, moved)[0])
        same = torch.allclose(outs[0], outs[1], rtol=1e-6)
        assert same is (base is not None)


@pytest.mark.evidence
def test_decoding_carries_a_state_of_one_size():
    made, (q, k, v) = layer().double(), drawn(25)
    method = made.method()
    whole = attend(q, k, v, method, mask="causal")
    state = method.carry(q[:, :, :9], k[:, :, :9], v[:, :, :9], Causal().bind(9, 9), None)
    size = state.bytes
    for t in range(9, 25):
        given = (q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        out = attend(*given, method.with_state(state), mask="causal")
        torch.testing.assert_close(out, whole[:, :, t : t + 1], rtol=1e-9, atol=1e-10)
        state = method.carry(*given, Causal().bind(1, t + 1), state)
        assert state.bytes == size


def test_a_plan_hands_on_the_state_that_its_run_ended_in():
    made, (q, k, v) = layer(), drawn(12, dtype=torch.float32)
    method, seen = made.method(), None
    for n_q, n_k in ((10, 10), (1, 11), (1, 12)):
        given = (q[:, :, n_k - n_q : n_k], k[:, :, :n_k], v[:, :, :n_k])
        chosen = plan(method if seen is None else method.with_state(seen), *given[:2], mask="causal")
        assert chosen.after is None  # nothing has run
        attend(*given, chosen, mask="causal")
        want = method.carry(*given, Causal().bind(n_q, n_k), seen)
        seen = chosen.after
        assert not seen.scan.matrix.requires_grad
        for got, ought in ((seen.scan.matrix, want.scan.matrix), (seen.k_tail, want.k_tail)):
            assert torch.equal(got, ought)
    assert plan("dense", q, k, mask="causal").after is None


def test_padding_is_not_there():
    made, (q, k, v) = layer().double(), drawn(20, b=1)
    want = attend(q, k, v, made.method(), mask="causal")
    left = [torch.cat((torch.full_like(x[:, :, :6], 1e3), x), 2) for x in (q, k, v)]
    mask = Causal() & Padding(torch.arange(26).ge(6).unsqueeze(0))
    got = attend(*left, made.method(), mask=mask)
    torch.testing.assert_close(got[:, :, 6:], want, rtol=1e-9, atol=1e-10)


def test_all_parameters_learn_and_nothing_comes_from_the_future():
    made, (q, k, v) = layer(), drawn(40, dtype=torch.float32)
    out = attend(q, k, v, made.method(), mask="causal")
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 20:] *= 2
    assert torch.equal(attend(*later, made.method(), mask="causal")[:, :, :20], out[:, :, :20])


def test_calls_it_cannot_serve():
    made, (q, k, v) = layer().double(), drawn(20)
    method = made.method()
    with pytest.raises(ValueError, match="the mask must be causal"):
        attend(q, k, v, method)
    with pytest.raises(ValueError, match="the mask must be causal"):
        attend(q, k, v, method, mask=Causal() & Window(4, 0))
    with pytest.raises(
        ValueError, match="reads whole prompts, or with a state one token: 1 queries, 20 keys"
    ):
        attend(q[:, :, :1], k, v, method, mask="causal")
    with pytest.raises(ValueError, match="does not support chunked prefill"):
        attend(q[:, :, :2], k, v, method, mask="causal")
    with pytest.raises(ValueError, match="this LAWCAT is for 4 query heads, 2 kv heads"):
        attend(q, q, q, method, mask="causal")
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 3 and 2"):
        LAWCAT(3, 2, 8)
    with pytest.raises(ValueError, match="features must be an integer >= 1, got 0"):
        LAWCAT(4, 2, 8, features=0)
    with pytest.raises(ValueError, match="a state begins with a whole prompt"):
        method.carry(q[:, :, :1], k, v, Causal().bind(1, 20), None)


def test_cost_does_not_grow_with_the_square():
    made = layer().double()
    costs = [float(plan(made.method(), *drawn(n)[:2], mask="causal").added[0].cost()) for n in (64, 128)]
    assert costs[1] == pytest.approx(2 * costs[0])


@pytest.fixture(scope="module")
def bundled():
    return load_model()


def layers_for(model) -> Gates:
    config = model.config
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    made = {i: LAWCAT(*sizes, features=16, rotary=1e5, seed=i) for i in range(config.num_hidden_layers)}
    return Gates(made)


def test_a_file_of_layers_patches_a_model_and_generates_as_it_reads(bundled, tmp_path, monkeypatch):
    """Written, read and used: token by token as all at once, and the model is afterwards what it was."""
    model, _ = bundled
    tokens = torch.randint(32, 127, (2, 60), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=tokens).logits
    save_gates(layers_for(model), tmp_path / "made.safetensors", torch.float32)
    layers = load_gates(tmp_path / "made.safetensors", model=model)
    recipe = gated(layers)
    assert all(isinstance(method, LinearizedAttention) for method in recipe.methods.values())
    runs, run = [], LAWCAT.run
    monkeypatch.setattr(LAWCAT, "run", lambda self, q, *rest: runs.append(q.shape[2]) or run(self, q, *rest))
    with patch(model, recipe, decode=gated(layers), check=False):
        whole = model(input_ids=tokens).logits
        assert runs == [60] * len(layers.layers)  # once each: the answer's own state is handed on
        cache = model(input_ids=tokens[:, :50], use_cache=True)
        steps = []
        for t in range(50, 60):
            cache = model(
                input_ids=tokens[:, t : t + 1], past_key_values=cache.past_key_values, use_cache=True
            )
            steps.append(cache.logits)
    assert runs[len(layers.layers) :] == [50] * len(layers.layers) + [1] * 10 * len(layers.layers)
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 50:], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(whole, before, atol=0.1)
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert F.mse_loss(whole, before) > 0


def recovered(layers: Gates | None, length: int) -> tuple[float, float]:
    """Bits per byte of the sample's last quarter, and the share of ten pass keys found, at this many bytes."""
    on = convert.measured_on(convert.Settings(tokens=length))
    method = "dense" if layers is None else gated(layers)
    with torch.inference_mode(), patch(on.model, method, check=False):
        right = [all(quality.answer(on, question)) for question in convert.questions(on, length)]
        return convert.bits_per_byte(on, length), sum(right) / len(right)


@pytest.mark.evidence
def test_the_bundled_model_converted_finds_pass_keys_beyond_its_training():
    """`tilewise convert --tokens 256 --steps 1400` made the bundled layers.

    All of the softmax attention is gone, and pass keys are found in texts four and eight times as long as those of
    the training; untrained layers find none.
    """
    layers = load_gates(bundled_gates("lawcat"))
    found = {length: recovered(layers, length) for length in (256, 1024, 2048)}
    dense, none = recovered(None, 1024), recovered(layers_for(load_model()[0]), 1024)
    shown = f"converted {found}, dense {dense}, untrained {none}"
    print(shown)
    assert found[256][1] == found[1024][1] == 1.0 and found[2048][1] >= 0.8, shown
    assert found[1024][0] < dense[0] + 0.3, shown
    assert none[0] > dense[0] + 2 and none[1] == 0, shown


@pytest.mark.evidence
@pytest.mark.parametrize("without", ["convolution", "gates"])
def test_convolution_and_gates_are_what_finds_them(without):
    """The trained layers with either taken out find no pass key and predict far worse."""
    whole, layers = load_gates(bundled_gates("lawcat")), load_gates(bundled_gates("lawcat"))
    for _, part in layers.items():
        if without == "gates":
            part.gated = False
        for conv in (part.q_conv, part.k_conv) if without == "convolution" else ():
            conv.weight.data[:-1] = 0
    kept, lost = recovered(whole, 512), recovered(layers, 512)
    assert kept[1] == 1.0 and lost[1] == 0 and lost[0] > kept[0] + 0.7, (kept, lost)
