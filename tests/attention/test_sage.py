"""SageAttention2: what smoothing, groups, formats and adaptive precision each do for the error, on a real model."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from torch import Tensor

import tilewise
from tilewise.attention import (
    Pass,
    Plan,
    Quantised,
    SageAttention2,
    Tiles,
    TopK,
    TrueMass,
    accuracy,
    adaptive,
    attend,
    output_quality,
    plan,
)
from tilewise.kernels.attend_tiles import Call, definition, native
from tilewise.models import bundled_model, capture, load_model, logit_quality
from tilewise.tiles import Everything

FOUR = {"qk": "int4", "pv": "native"}


@pytest.fixture(scope="module")
def model():
    return load_model(bundled_model())


@pytest.fixture(scope="module")
def tokens(model) -> Tensor:
    text = resources.files("tilewise.data").joinpath("sample.txt").read_text(encoding="utf-8")
    return torch.tensor(model[1](text[:6000])["input_ids"])[:1024]


@pytest.fixture(scope="module")
def layers(model, tokens) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    return capture(model[0], tokens)


def distance(method, q, k, v) -> float:
    """Relative L1 distance of causal attention from the exact one."""
    return accuracy(got=attend(q, k, v, method, mask="causal"), want=attend(q, k, v, mask="causal"))[1]


def total(method, layers) -> float:
    return sum(distance(method, *x) for x in layers.values())


@pytest.mark.evidence
def test_smoothing_recovers_what_four_bits_lose(layers):
    """Less error with keys smoothed, less with queries, least with both, on text and with outlier channels.

    Outliers are what the paper smooths away: channels on which all tokens share a large value. With them smoothing
    both comes back to the error without them, and none is useless. Control: subtracting another sequence's means
    (keys reversed along the channels) gains nothing.
    """
    none = total(SageAttention2(**FOUR, smooth_q=False, smooth_k=False), layers)
    keys = total(SageAttention2(**FOUR, smooth_q=False, smooth_k=True), layers)
    queries = total(SageAttention2(**FOUR, smooth_q=True, smooth_k=False), layers)
    both = total(SageAttention2(**FOUR, smooth_q=True, smooth_k=True), layers)
    print(
        f"4 bits, sum of relative L1 over layers: none {none:.3f}, k {keys:.3f}, q {queries:.3f}, both {both:.3f}"
    )
    assert both < min(keys, queries) and max(keys, queries) < none

    outliers = torch.zeros(64)
    outliers[::16] = 15.0
    shifted = {layer: (q + outliers, k + outliers, v) for layer, (q, k, v) in layers.items()}
    plain = total(SageAttention2(**FOUR, smooth_q=False, smooth_k=False), shifted)
    smoothed = total(SageAttention2(**FOUR, smooth_q=True, smooth_k=True), shifted)
    wrong = {layer: (q, k - k.mean(2, keepdim=True).flip(3), v) for layer, (q, k, v) in shifted.items()}
    broken = total(SageAttention2(**FOUR, smooth_q=False, smooth_k=False), wrong)
    print(f"with outlier channels: none {plain:.3f}, both {smoothed:.3f}, wrong means {broken:.3f}")
    assert plain > 5 * smoothed and smoothed < 1.3 * both and broken > 4 * smoothed


@pytest.mark.evidence
def test_smaller_groups_err_less(layers):
    """A scale for each thread's tokens errs less than one for a warp's, a block's, a head's; one a token least."""
    errors = {
        group: total(SageAttention2(**FOUR, smooth_q=True, group=group), layers)
        for group in ("token", "thread", "warp", "block", "tensor")
    }
    print({group: round(error, 3) for group, error in errors.items()})
    assert list(errors.values()) == sorted(errors.values()) and errors["tensor"] > 1.1 * errors["thread"]


@pytest.mark.evidence
def test_e4m3_with_the_static_scale_holds_weights_and_values(layers):
    """Of 8-bit formats E4M3 loses least of the weights, and the scale 1/448 matters: unscaled, small ones vanish.

    Smoothing values helps where channels have a mean, and only there (the control has it removed).
    """
    errors = dict.fromkeys(("e4m3", "e5m2", "unscaled", "int8"), 0.0)
    for q, k, v in layers.values():
        call = Call(q, k, v, Everything().bind(1024, 1024), scale=0.125)
        weights = torch.softmax(0.125 * q @ k.repeat_interleave(2, 1).mT, -1)
        top = weights.amax(-1, keepdim=True)
        want = weights @ v.repeat_interleave(2, 1)
        for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
            got = definition.run(Call(**{**call.__dict__, "weights": dtype})).out
            errors[name] += accuracy(got, want)[1]
        unscaled = (weights / top).to(torch.float8_e4m3fn).float() * top
        steps = (weights / top * 127).round() / 127 * top
        for name, rounded in (("unscaled", unscaled), ("int8", steps)):
            errors[name] += accuracy(rounded @ v.repeat_interleave(2, 1), want)[1]
    print({name: round(error, 4) for name, error in errors.items()})
    assert errors["e4m3"] < 0.7 * min(errors["e5m2"], errors["int8"]) and errors["e4m3"] < errors["unscaled"]

    q, k, v = layers[3]
    centred = v - v.mean(2, keepdim=True)
    offset = centred + 4 * centred.std()
    gain = {}
    for name, values in (("offset", offset), ("centred", centred)):
        plain, smooth = (
            accuracy(
                attend(q, k, values, SageAttention2("int8", "fp8", smooth_v=on), mask="causal"),
                attend(q, k, values, mask="causal"),
            )[2]
            for on in (False, True)
        )
        gain[name] = plain / smooth
    print(f"error without over with smoothed values: {gain}")
    assert gain["offset"] > 2 and 0.9 < gain["centred"] < 1.1


@pytest.mark.evidence
def test_adaptive_precision_spends_8_bits_where_4_fail(model, tokens, layers):
    """Half of the layers in 8 bits, chosen by their own outputs (the paper) and by the model's (ours).

    Both come nearer to the exact model than 4 bits throughout. The paper's measure finds the layers whose outputs 4
    bits harm most; on this small model it misses that the first layer's error travels through all others, which
    ours sees. Control: the layers that ours passes over, in their place.
    """
    low, high = SageAttention2(**FOUR), SageAttention2("int8", pv="native")
    by_output = output_quality(layers=layers, method=low, mask="causal", scale=None)
    by_logits = logit_quality(model=model[0], tokens=tokens, method=low)
    chosen = {
        name: adaptive(quality=quality, share=0.5, low=low, high=high)
        for name, quality in (("paper's", by_output), ("ours", by_logits))
    }
    assert all(sorted(m.qk for m in each.values()) == ["int4"] * 3 + ["int8"] * 3 for each in chosen.values())

    def swapped(setting):
        return {layer: low if method is high else high for layer, method in setting.items()}

    def answer(setting) -> Tensor:
        with torch.no_grad(), tilewise.patch(model[0], setting):
            return model[0](input_ids=tokens.view(1, -1), use_cache=False).logits.log_softmax(-1)

    exact = answer("dense")
    settings = {"4": low, "8": high, **chosen, "ours, swapped": swapped(chosen["ours"])}
    kl = {
        name: float((exact.exp() * (exact - answer(each))).sum(-1).mean()) for name, each in settings.items()
    }
    print({name: f"{x:.2e}" for name, x in kl.items()})
    assert kl["8"] < kl["ours"] < kl["paper's"] < kl["4"]
    assert 3 * kl["ours"] < kl["ours, swapped"]
    local = {
        name: sum(by_output[i] for i, m in each.items() if m is low)
        for name, each in settings.items()
        if name in ("paper's", "ours, swapped", "ours")
    }
    assert local["paper's"] == max(local.values())


@pytest.mark.evidence
def test_int8_products_reach_the_level_of_the_paper(model, tokens, layers):
    """8 bits on this CPU: cosine above 0.999 and relative L1 below 2 % in every layer; the model's loss stays.

    The paper reports its 8-bit version as lossless end to end. Control: 4 bits without smoothing, one scale a head,
    runs through the same products and loses a hundred times as much.
    """
    if not native.multiplies_int8():
        pytest.skip("this machine multiplies no 8-bit integers")
    for q, k, v in layers.values():
        out = attend(q, k, v, SageAttention2(), mask="causal", engine="native")
        cosine, far, _ = accuracy(out, attend(q, k, v, mask="causal"))
        assert cosine > 0.999 and far < 0.02
    ids, losses = tokens.view(1, -1), {}
    settings = {
        "exact": "dense",
        "int8": "sage2",
        "control": SageAttention2(**FOUR, smooth_k=False, group="tensor"),
    }
    with torch.no_grad():
        for name, setting in settings.items():
            with tilewise.patch(model[0], setting):
                losses[name] = float(model[0](input_ids=ids, labels=ids, use_cache=False).loss)
    print({name: round(loss, 5) for name, loss in losses.items()})
    assert abs(losses["int8"] - losses["exact"]) < 1e-3
    assert losses["control"] - losses["exact"] > 20 * abs(losses["int8"] - losses["exact"])


def test_the_integers_are_what_runs(layers):
    """The quantised call holds int8 numbers of the whole range and scales that give the operands back."""
    q, k, v = layers[0]
    made = plan(SageAttention2(qk="int4", group="warp"), q, k, mask="causal")
    ((call, _),) = made.applied(q, k, v, None, 0.125, None, False)
    assert call.q.dtype == call.k.dtype == torch.int8
    assert int(call.q.abs().max()) == int(call.k.abs().max()) == 7
    assert torch.equal(call.q_scale[:, :, :32], call.q_scale[:, :, :1].expand(-1, -1, 32))
    assert not torch.equal(call.q_scale[:, :, 31], call.q_scale[:, :, 32])
    half = call.q_scale.unsqueeze(3) / 2
    assert ((call.q * call.q_scale.unsqueeze(3) - q).abs() <= half * 1.001).all()


def test_threads_share_every_eighth_query_and_two_neighbouring_keys_of_eight():
    from tilewise.attention.precisions import GROUPS
    from tilewise.kernels.attend_tiles.rounding import shared

    n = 192
    for side, same in (
        (0, lambda i: (i // 32, i % 8)),
        (1, lambda i: (i // 64, i % 8 // 2)),
    ):
        one = torch.arange(1.0, n + 1).view(1, 1, n)
        groups: dict = {}
        for i in range(n):
            groups.setdefault(same(i), []).append(i)
        want = torch.tensor([max(groups[same(i)]) + 1.0 for i in range(n)])
        assert torch.equal(shared(one, GROUPS["thread"][side])[0, 0], want)
    assert len(groups) == 12 and all(len(x) == 16 for x in groups.values())


def test_precision_goes_with_any_choice_of_tiles(layers):
    """A composition no paper has: the same tiles, chosen by their true mass, in 8 bits."""
    q, k, v = layers[2]
    stages = {"score": TrueMass(), "select": TopK(4), "tile": (64, 64)}
    precision = Quantised(qk="int8", pv="native", smooth_k=True, smooth_v=False, group="thread")
    exact, rounded = Tiles(**stages), Tiles(**stages, precision=precision)
    plans = [plan(method, q, k, mask="causal") for method in (exact, rounded)]
    assert plans[0].density == plans[1].density < 0.7
    want, got = (attend(q, k, v, made, mask="causal") for made in plans)
    cosine, far, _ = accuracy(got, want)
    assert 0 < far < 0.02 and cosine > 0.999
    assert torch.equal(attend(q, k, v, plans[1].unrounded(), mask="causal"), want)
    (one,) = plans[1].passes
    same = Plan((Pass(one.view, one.tiles, precision=precision),), one.view)
    assert torch.equal(attend(q, k, v, same, mask="causal"), got)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk": "int3"}, "qk must be one of int8, int4, got 'int3'"),
        ({"pv": "int8"}, "pv must be one of native, fp8, got 'int8'"),
        ({"group": "head"}, "group must be one of token, thread, warp, block, tensor, got 'head'"),
        ({"smooth_v": True}, "smooth_v needs pv='fp8'"),
    ],
)
@pytest.mark.parametrize("kind", [SageAttention2, Quantised])
def test_settings_that_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_adaptive_takes_the_worst_first():
    with pytest.raises(ValueError, match="share must be between 0 and 1, got 2"):
        adaptive({0: 0.5}, 2)
    assert adaptive({0: 0.5, 1: 0.4}, 0)[1] == SageAttention2("int4", "fp8", smooth_q=True)
    assert [m.qk for m in adaptive({0: 0.5, 1: 0.4}).values()] == ["int4", "int8"]
    assert [m.qk for m in adaptive({0: 0.5, 1: 0.4}, 1.0).values()] == ["int8", "int8"]


def test_capture_gives_the_attention_its_inputs(model, tokens):
    seen = capture(model=model[0], tokens=tokens[:40], layers=[1, 4])
    assert set(seen) == {1, 4} and seen[1][0].shape == (1, 4, 40, 64) and seen[1][1].shape == (1, 2, 40, 64)
    two = capture(model[0], tokens[:80].view(2, 40))
    assert set(two) == set(range(6)) and torch.allclose(two[1][0][:1], seen[1][0], atol=1e-4)
    with pytest.raises(ValueError, match="tokens must be integers"):
        capture(model[0], torch.randn(1, 4))
