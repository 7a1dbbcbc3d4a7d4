"""Patching pretrained models: right in every mode, undone on leaving, and never leaking the future."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, masking_utils

import tilewise
from tests import tiny
from tilewise.attention import (
    HISA,
    S2O,
    ChunkLLM,
    FlexPrefill,
    MoBA,
    PBSAttention,
    PrFlashAttention,
    ProxyAttn,
    Quest,
    SageAttention2,
    SinkWindow,
    Spark,
    VerticalSlash,
    XAttention,
    named,
)
from tilewise.attention.gates import ChunkAdapters
from tilewise.errors import UserError
from tilewise.models.bridge import Bridge

SMALL = {
    "dense": tilewise.attention.Dense(),
    "moba": MoBA(16, 3),
    "pbs": PBSAttention(64, 0.6, 32),
    "flexprefill": FlexPrefill(0.4, 0.1, 16, 16),
    "pr-flash": PrFlashAttention(budget=3, tile=16),
    "proxy-attn": ProxyAttn(1, 2, 0.5, 16, tile=16),
    "quest": Quest(8, 4),
    "hisa": HISA(8, 4, 12),
    "spark": Spark(12),
    "s2o": S2O(32, 0.9, 16, 4),
    "vertical-slash": VerticalSlash(6, 12, 16, 16, 2, 4),
    "sage2": SageAttention2(smooth_k=False),  # Gemma caps scores, which smoothing would shift
    "sink-window": SinkWindow(4, 40),
    "xattention": XAttention(4, 0.6, 32),
}
EXACT = {"moba": MoBA(16, 1000), "pbs": PBSAttention(64, 1.0, 32),
         "pr-flash": PrFlashAttention(budget=1000, tile=16),
         "flexprefill": FlexPrefill(1.0, 0.1, 16, 16), "proxy-attn": ProxyAttn(1, 2, 1.0, tile=16),
         "quest": Quest(8, 1000), "hisa": HISA(8, 1000, 1000), "spark": Spark(1000), "s2o": S2O(32, 0.0, 16, 4),
         "vertical-slash": VerticalSlash(6, 10**6, 16, 16, 2, 4),
         "sink-window": SinkWindow(4, 10_000),
         "xattention": XAttention(4, 1.0, 32), "dense": tilewise.attention.Dense()}  # fmt: skip


@pytest.fixture(params=sorted(tiny.CONFIGS))
def model(request):
    return tiny.make(request.param)


def _tokens(n: int, batch: int = 2, seed: int = 0):
    return torch.randint(256, (batch, n), generator=torch.Generator().manual_seed(seed))


def _padding(tokens, side: str, count: int):
    mask = torch.ones_like(tokens)
    mask[0, :count] = 0
    return mask if side == "left" else mask.flip(1)


@torch.no_grad()
def _logits(model, tokens, mask=None):
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits


def _near(a, b):
    """Within what float32 loses on the way through three layers."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_every_named_method_has_a_small_variant():
    assert set(SMALL) == set(named())
    assert set(EXACT) == {name for name, kind in named().items() if kind.exact}


@pytest.mark.parametrize("name", sorted(EXACT))
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_full_density_equals_the_unpatched_model(model, name, side):
    tokens = _tokens(150)
    mask = None if side == "none" else _padding(tokens, side, 37)
    before = _logits(model, tokens, mask)
    with tilewise.patch(model, EXACT[name], check=False):
        inside = _logits(model, tokens, mask)
    shown = torch.ones_like(tokens) if mask is None else mask
    _near(inside[shown.bool()], before[shown.bool()])


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"dense"}))
def test_method_really_runs_and_is_undone_bit_for_bit(model, name):
    tokens = _tokens(300)
    before = _logits(model, tokens)
    interfaces = [dict(i._global_mapping) for i in (AttentionInterface, AttentionMaskInterface)]
    with tilewise.patch(model, SMALL[name]):
        inside = _logits(model, tokens)
    assert (inside - before).abs().max() > 1e-3, "the method changed nothing"
    assert torch.equal(_logits(model, tokens), before)
    assert interfaces == [dict(i._global_mapping) for i in (AttentionInterface, AttentionMaskInterface)]


def test_undone_after_an_error():
    model, tokens = tiny.make("llama"), _tokens(40)
    before = _logits(model, tokens)
    with pytest.raises(RuntimeError, match="inside"), tilewise.patch(model, "moba"):
        raise RuntimeError("inside")
    assert torch.equal(_logits(model, tokens), before)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_generate_at_full_density_equals_the_unpatched_model(model, cache, side):
    tokens = _tokens(60)
    mask = torch.ones_like(tokens) if side == "none" else _padding(tokens, "left", 13)
    options = {
        "attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False,
        "cache_implementation": cache, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    before = model.generate(tokens, **options)
    for method in (EXACT["sink-window"], EXACT["moba"]):
        with tilewise.patch(model, method, decode=method, check=False):
            inside = model.generate(tokens, **options)
        assert torch.equal(before.sequences, inside.sequences)
        _near(torch.stack(inside.logits), torch.stack(before.logits))


@pytest.mark.parametrize("name", ["sink-window", "moba"])
def test_token_by_token_equals_the_full_forward(name):
    """Prefill of half, then single tokens through the cache, with the sparse method in both modes."""
    model, tokens = tiny.make("llama"), _tokens(120, batch=1)
    with tilewise.patch(model, SMALL[name], decode=SMALL[name]), torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :60], use_cache=True).past_key_values
        steps = []
        for t in range(60, 120):
            result = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits)
    _near(torch.cat(steps, 1), whole[:, 60:])


@pytest.mark.parametrize("name", ["dense", "sink-window", "moba"])
def test_second_turn_equals_one_prompt(name):
    """Chunked prefill: a second prompt over a filled cache."""
    model, tokens = tiny.make("llama"), _tokens(128, batch=1)
    with tilewise.patch(model, SMALL[name]), torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :64], use_cache=True).past_key_values
        second = model(tokens[:, 64:], past_key_values=cache).logits
    _near(second, whole[:, 64:])


def test_unsupported_mode_raises():
    model, tokens = tiny.make("llama"), _tokens(128, batch=1)
    with tilewise.patch(model, SMALL["pbs"]), torch.no_grad():
        cache = model(tokens[:, :64], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="pbs does not support chunked prefill"):
            model(tokens[:, 64:], past_key_values=cache)


def test_layers_and_per_layer_methods():
    model, tokens = tiny.make("llama"), _tokens(120)
    seen = []
    with tilewise.patch(model, {0: "moba", 2: SinkWindow(1, 8)}, observer=seen.append):
        _logits(model, tokens)
    assert [(e.layer, type(e.method).__name__) for e in seen] == [
        (0, "MoBA"),
        (1, "Dense"),
        (2, "SinkWindow"),
    ]
    seen.clear()
    with tilewise.patch(model, "moba", layers=[1], observer=seen.append):
        _logits(model, tokens)
    assert [type(e.method).__name__ for e in seen] == ["Dense", "MoBA", "Dense"]
    assert all(e.seconds > 0 and 0 < e.plan.density <= 1.5 for e in seen)


def test_prefill_and_decode_methods_are_chosen_apart():
    model, tokens, seen = tiny.make("llama"), _tokens(60, batch=1), []
    with tilewise.patch(model, SMALL["xattention"], decode=SMALL["sink-window"], observer=seen.append):
        model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    kinds = [(type(e.method).__name__, e.q.shape[2]) for e in seen]
    assert kinds[:3] == [("XAttention", 60)] * 3
    assert kinds[3:] and set(kinds[3:]) == {("SinkWindow", 1)}


CHUNKS = {layer: ChunkLLM(ChunkAdapters(8, 4, 2, seed=layer), top_k=1, longest=9) for layer in range(3)}


def _one_by_one(model, tokens, prompt: int, **options):
    """Logits of the tokens after the prompt, read one by one; each layer's methods as an observer saw them."""
    seen, out = [], []
    with tilewise.patch(model, CHUNKS, observer=seen.append, **options), torch.no_grad():
        cache = model(tokens[:, :prompt], use_cache=True).past_key_values
        for n in range(prompt, tokens.shape[1]):
            out.append(model(tokens[:, n : n + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(out, 1), seen


def test_a_state_is_handed_on_in_every_layer():
    """Token by token, with a state for each layer, is reading all at once. Controls: dense steps are not, and the
    states of other layers are not."""
    # No byte twice: in the first layer, whose keys know no neighbours, chunks of equal bytes are equally good.
    model, tokens = (
        tiny.make("llama"),
        torch.randperm(256, generator=torch.Generator().manual_seed(0))[None, :120],
    )
    with tilewise.patch(model, CHUNKS), torch.no_grad():
        whole = model(tokens).logits[:, 60:]
    mine, seen = _one_by_one(model, tokens, 60, decode=CHUNKS)
    _near(mine, whole)
    steps = [event.plan.tile_maps[0] for event in seen if event.q.shape[2] == 1]
    assert len(steps) == 180 and all(step.keep.sum() == 2 < step.keep.shape[3] for step in steps)
    dense, _ = _one_by_one(model, tokens, 60)
    turned, _ = _one_by_one(model, tokens, 60, decode={layer: CHUNKS[2 - layer] for layer in range(3)})
    for other in (dense, turned):
        assert (other - whole).abs().max() > 1e-3
    some, seen = _one_by_one(model, tokens, 60, decode={1: CHUNKS[1]})
    assert (some - dense).abs().max() > 1e-5
    kinds = [type(event.method).__name__ for event in seen if event.q.shape[2] == 1]
    assert kinds == ["Dense", "ChunkLLM", "Dense"] * 60


def test_a_new_prompt_begins_a_new_state():
    model, (first, second) = tiny.make("llama"), (_tokens(70, 1, seed) for seed in (1, 2))
    alone, _ = _one_by_one(model, second, 40, decode=CHUNKS)
    with tilewise.patch(model, CHUNKS, decode=CHUNKS), torch.no_grad():
        old = model(first[:, :40], use_cache=True).past_key_values
        cache = model(second[:, :40], use_cache=True).past_key_values
        again = [model(second[:, n : n + 1], past_key_values=cache).logits for n in range(40, 70)]
        with pytest.raises(
            ValueError, match="decodes with the state of the 40 tokens before.*has that of 70"
        ):
            model(first[:, 40:41], past_key_values=old)
        with pytest.raises(ValueError, match="a state is that of one sequence"):
            model(_tokens(40))
    assert torch.equal(torch.cat(again, 1), alone)


def test_a_state_in_a_static_cache():
    model, tokens = tiny.make("llama"), _tokens(50, batch=1)
    with tilewise.patch(model, CHUNKS, decode=CHUNKS):
        options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        one, other = (
            model.generate(tokens, cache_implementation=kind, **options) for kind in ("dynamic", "static")
        )
    assert torch.equal(one, other)


def test_gradients_flow_through_a_patched_model():
    model, tokens = tiny.make("llama"), _tokens(64)

    def gradient(method):
        model.zero_grad()
        if method is None:
            model(tokens, labels=tokens).loss.backward()
        else:
            with tilewise.patch(model, method, check=False):
                model(tokens, labels=tokens).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    dense = gradient(None)
    _near(gradient(EXACT["moba"]), dense)
    assert (gradient(MoBA(16, 1)) - dense).abs().max() > 1e-5


def test_packed_sequences_equal_separate_ones():
    model = tiny.make("llama")
    first, second = _tokens(50, 1, 1), _tokens(70, 1, 2)
    positions = torch.cat([torch.arange(50), torch.arange(70)]).unsqueeze(0)
    with tilewise.patch(model, SinkWindow(2, 20)), torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        alone = [model(x, use_cache=False).logits for x in (first, second)]
    _near(packed, torch.cat(alone, 1))


def test_masks_tilewise_does_not_know_are_still_right():
    """A custom overlay on the causal mask arrives as a boolean grid."""
    seen = masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (q < 20) & (k < 20))
    from tilewise.models.masking import box_mask

    grid = box_mask(1, 40, 40, mask_function=seen, use_vmap=True, device="cpu")
    expected = (torch.arange(40) <= torch.arange(40).unsqueeze(1)) | (
        (torch.arange(40) < 20) & (torch.arange(40).unsqueeze(1) < 20)
    )
    assert grid.dtype == torch.bool and torch.equal(grid[0, 0], expected)


@pytest.mark.parametrize("window", [1, 7, 50])
@pytest.mark.parametrize("offset", [0, 30])
def test_boxes_equal_the_grid_that_transformers_makes(window, offset):
    """Causal, sliding, chunked and packed masks, with padding and offsets, against transformers' own grid."""
    from tilewise.models.masking import BoxMask, box_mask

    n_q, n_k = 40, 40 + offset
    keep = torch.ones(2, n_k, dtype=torch.bool)
    keep[0, :9] = False
    functions = {
        "causal": masking_utils.causal_mask_function,
        "sliding": masking_utils.sliding_window_causal_mask_function(window),
        "both ways": masking_utils.sliding_window_bidirectional_mask_function(window),
        "chunked": masking_utils.chunked_causal_mask_function(max(window, 2), torch.tensor([9, 0])),
    }
    if not offset:
        ids = (torch.arange(40) >= 15).long().expand(2, -1)
        positions = torch.where(ids == 1, torch.arange(40) - 15, torch.arange(40))
        functions["packed"] = masking_utils.packed_sequence_compatibility_function(
            masking_utils.sliding_window_causal_mask_function(window), positions, ids
        )
    for name, function in functions.items():
        terms = {"q_offset": offset, "kv_offset": 0, "mask_function": function, "attention_mask": keep}
        grid = masking_utils.sdpa_mask(2, n_q, n_k, allow_is_causal_skip=False, device="cpu", **terms)
        ours = BoxMask(box_mask(2, n_q, n_k, device="cpu", **terms), n_q).bind(n_q, n_k).tokens()
        assert torch.equal(ours.expand_as(grid), grid), name


@pytest.mark.parametrize("name", sorted(SMALL))
def test_leak_check_passes_for_every_method(model, name):
    with tilewise.patch(model, SMALL[name], check=True):
        pass


def test_leak_check_catches_a_missing_mask(monkeypatch):
    """The failure it is for: attention registered while the mask function goes missing."""
    model = tiny.make("llama")
    monkeypatch.setattr(Bridge, "__call__", _without_mask(Bridge.__call__))
    with (
        pytest.raises(UserError, match="leak check failed for LlamaForCausalLM"),
        tilewise.patch(model, "dense"),
    ):
        pass
    assert model.config._attn_implementation == "sdpa"


def _without_mask(call):
    def wrapped(self, module, query, key, value, attention_mask, **kwargs):
        everything = torch.zeros(1, 1, query.shape[2], key.shape[2])
        return call(self, module, query, key, value, everything, **kwargs)

    return wrapped


def test_leak_check_leaves_training_mode_as_it_was():
    model = tiny.make("llama").train()
    model.model.layers[1].eval()
    with tilewise.patch(model, "moba"):
        assert model.training and not model.model.layers[1].training


def test_registered_names_work_with_attn_implementation(tmp_path):
    names = tilewise.register()
    try:
        assert "tilewise:xattention" in names
        directory, tokens = tiny.save(tmp_path / "m"), _tokens(300, 1)
        plain = AutoModelForCausalLM.from_pretrained(directory)
        ours = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="tilewise:xattention")
        dense = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="tilewise:dense")
        _near(_logits(dense, tokens), _logits(plain, tokens))
        with tilewise.patch(plain, "xattention", check=False):
            assert torch.equal(_logits(plain, tokens), _logits(ours, tokens))
    finally:
        for name in names:
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(name, None)


def test_nested_patch_raises_and_the_outer_goes_on():
    model, tokens = tiny.make("llama"), _tokens(100)
    with tilewise.patch(model, SMALL["moba"]):
        inside = _logits(model, tokens)
        with pytest.raises(UserError, match="already patched"), tilewise.patch(model, "dense"):
            pass
        assert torch.equal(_logits(model, tokens), inside)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "xatention"}, "did you mean xattention"),
        ({"attention": "moba", "layers": [3]}, r"layers must be indices in 0..2, got 3"),
        ({"attention": "moba", "decode": "pbs"}, "pbs does not decode"),
    ],
)
def test_bad_input_is_said_and_changes_nothing(arguments, message):
    model = tiny.make("llama")
    with pytest.raises(UserError, match=message), tilewise.patch(model, **arguments):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_models_that_cannot_be_patched_are_named(monkeypatch):
    with (
        pytest.raises(TypeError, match="PreTrainedModel, got Linear"),
        tilewise.patch(torch.nn.Linear(2, 2), "dense"),
    ):
        pass
    model = tiny.make("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with (
        pytest.raises(UserError, match="LlamaForCausalLM does not go through"),
        tilewise.patch(model, "dense"),
    ):
        pass


def test_attention_dropout_is_refused():
    model = tiny.make("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with (
        tilewise.patch(model, "dense"),
        pytest.raises(ValueError, match="attention dropout is not supported"),
    ):
        model(_tokens(8))


def test_events_name_the_engine_that_ran():
    """float64 is beyond the native engine, and soft-capping beyond PyTorch's: layers say what they ran on."""
    tokens = _tokens(60, batch=1)
    for name, dtype, engine in (
        ("llama", torch.float32, "native"),
        ("llama", torch.float64, "sdpa"),
        ("gemma2", torch.float64, "torch"),
    ):
        seen, model = [], tiny.make(name).to(dtype)
        with tilewise.patch(model, "dense", check=False, observer=seen.append):
            _logits(model, tokens)
        assert [event.engines for event in seen] == [(engine,)] * 3
