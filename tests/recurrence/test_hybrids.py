"""InfiniteVL: windows for what is near, states for what is far, and memory that stays as it is."""

from __future__ import annotations

import pytest
import torch

from tilewise.recurrence import ModelConfig, SequenceModel, SlidingWindow, infinite_vl
from tilewise.recurrence.attention_mixer import Attention


@pytest.mark.evidence
def test_memory_is_constant_while_streaming():
    """20,000 tokens in uneven pieces: not a byte more after any; full attention's cache grows with each."""
    torch.manual_seed(0)
    model = SequenceModel(infinite_vl(256, 32, heads=2, kv_heads=1, window=64)).eval()
    full = Attention(32, heads=2, kv_heads=1).eval()
    states, cache, held, grown, read = None, None, set(), [], 0
    sizes = [1, 500, 37, 2000, 64, 1, 3000, 2000, 397, 4000, 4000, 4000]
    with torch.no_grad():
        for size in sizes:
            _, states = model(torch.randint(256, (1, size)), states)
            held.add(sum(state.bytes for state in states))
            _, cache = full(torch.randn(1, size, 32), cache)
            grown.append(cache.bytes)
            read += size
    assert read == 20_000 == int(states[0].seen)
    assert len(held) == 1
    assert grown == [8 + 2 * 16 * 4 * sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert grown[-1] > 50 * held.pop()


@pytest.mark.evidence
def test_a_stream_in_pieces_is_the_whole():
    """What is kept is enough: pieces give what one call gives, though the window is much shorter."""
    torch.manual_seed(0)
    model = SequenceModel(infinite_vl(256, 32, heads=2, window=16)).double().eval()
    tokens, states, parts = torch.randint(256, (1, 700)), None, []
    with torch.no_grad():
        whole, _ = model(tokens)
        for piece in tokens.split([1, 9, 190, 300, 200], 1):
            logits, states = model(piece, states)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.evidence
def test_states_carry_what_windows_cannot_reach():
    """A token 200 places back changes the next prediction; in four layers of windows of 16, which reach 60, it
    cannot.

    And dropping the states between two calls drops what it said.
    """
    torch.manual_seed(0)
    local = {"heads": 2, "kv_heads": 1, "window": 16}
    hybrid = SequenceModel(infinite_vl(64, 32, heads=2, kv_heads=1, window=16)).double().eval()
    windows = (
        SequenceModel(ModelConfig(64, 32, ("sliding-window",) * 4, {"sliding-window": local})).double().eval()
    )
    tokens = torch.randint(64, (1, 260))
    other = tokens.clone()
    other[0, 59] = (tokens[0, 59] + 1) % 64
    with torch.no_grad():
        moved = [(model(tokens)[0] - model(other)[0])[0, -1].abs().max() for model in (hybrid, windows)]
        _, states = hybrid(tokens[:, :100])
        _, changed = hybrid(other[:, :100])
        kept = hybrid(tokens[:, 100:], states)[0][0, -1]
        assert torch.allclose(kept, hybrid(tokens)[0][0, -1])
        assert (hybrid(tokens[:, 100:], changed)[0][0, -1] - kept).abs().max() > 1e-9
    assert moved[0] > 1e-9 and moved[1] == 0


def test_layers_are_one_to_three():
    config = infinite_vl(256, 32, blocks=9, window=8)
    assert len(config.layers) == 36 and config.layers[:4] == config.layers[4:8]
    assert config.layers.count("sliding-window") * 3 == config.layers.count("gated-delta-net") == 27
    assert config.layers[0] == "sliding-window"


def test_window_sees_its_tokens():
    """Itself and window - 1 before it: the last token's output changes with those and no others."""
    torch.manual_seed(0)
    mixer, x = SlidingWindow(16, heads=2, window=5).double(), torch.randn(1, 20, 16, dtype=torch.float64)
    want = mixer(x)[0][:, -1]
    for place in range(20):
        other = x.clone()
        other[:, place] += 1
        assert torch.equal(mixer(other)[0][:, -1], want) == (place < 15)


def test_wrong_windows_and_states():
    with pytest.raises(ValueError, match="window must be an integer >= 1, got 0"):
        SlidingWindow(16, window=0)
    with pytest.raises(ValueError, match="kv_heads must be .* got 3 and 4"):
        Attention(16, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="an even size, got 3"):
        Attention(12, heads=4)
    mixer = Attention(16)
    _, state = mixer(torch.randn(2, 3, 16))
    with pytest.raises(ValueError, match="the state is of 2 sequences, the call of 1"):
        mixer(torch.randn(1, 3, 16), state)
    with pytest.raises(ValueError, match="logit_cap must be None or above 0, got 0"):
        ModelConfig(10, 32, ("gla",), logit_cap=0)


def test_layers_of_one_kind_may_have_settings_of_their_own():
    layers = ("sliding-window", ("sliding-window", {"window": 3}), ("gla", {"heads": 4}))
    config = ModelConfig(10, 32, layers, {"sliding-window": {"window": 7, "heads": 2}})
    assert config.parts() == [
        ("sliding-window", {"window": 7, "heads": 2}),
        ("sliding-window", {"window": 3, "heads": 2}),
        ("gla", {"heads": 4}),
    ]
    model = SequenceModel(config).eval()
    assert [block.mixer.window for block in model.blocks[:2]] == [7, 3] and model.blocks[2].mixer.heads == 4
    with pytest.raises(ValueError, match="layers must be of .*got \\['glo'\\]"):
        ModelConfig(10, 32, (("glo", {}),))
