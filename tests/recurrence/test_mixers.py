"""What every mixer keeps: split anywhere, padding on either side, packed sequences, nothing from the future."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.recurrence.mixers import SETTINGS, WIDTH
from tilewise.recurrence import MIXERS, Carried, Mixer, ModelConfig, SequenceModel

every_mixer = pytest.mark.parametrize("name", sorted(MIXERS))
N = 75


def built(name: str, dtype: torch.dtype = torch.float64) -> Mixer:
    """The mixer with small settings; all of its parameters random, so that none hides behind a zero."""
    torch.manual_seed(0)
    made = MIXERS[name](WIDTH, **SETTINGS[name]).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return made.eval()


def inputs(b: int = 2, n: int = N, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def close(got: Tensor, want: Tensor) -> None:
    """Equal to rounding: in float64, to a millionth of what float32 would give."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def same_state(got: Carried, want: Carried) -> None:
    found: list[Tensor] = []
    got.map(lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    wanted: list[Tensor] = []
    want.map(lambda x: wanted.append(x) or x)  # type: ignore[func-returns-value]
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted):
        close(a, b)


def test_every_mixer_has_small_settings():
    assert set(SETTINGS) == set(MIXERS)


@every_mixer
def test_split_anywhere(name):
    mixer, x = built(name), inputs()
    whole, last = mixer(x)
    for borders in ([0, 1, N], [0, 30, 31, 64, N], list(range(N + 1))):
        state, parts = None, []
        for start, end in itertools.pairwise(borders):
            part, state = mixer(x[:, start:end], state)
            parts.append(part)
        close(torch.cat(parts, 1), whole)
        same_state(state, last)


@every_mixer
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 6), (3, 70), (66, 1)])
def test_padding_is_not_there(name, left, right):
    """Whatever it holds, on either side, and with a state from before."""
    mixer, x = built(name), inputs()
    _, before = mixer(inputs(n=9, seed=3))
    for state in (None, before):
        want, last = mixer(x, state)
        padded = torch.cat((inputs(n=left, seed=4) * 1e4, x, inputs(n=right, seed=5) * 1e4), 1)
        mask = torch.zeros(2, left + N + right, dtype=torch.bool)
        mask[:, left : left + N] = True
        got, after = mixer(padded, state, mask=mask)
        close(got[:, left : left + N], want)
        assert (got[~mask] == 0).all()
        same_state(after, last)


@every_mixer
def test_rows_padded_unlike(name):
    mixer, x = built(name), inputs()
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[0, :20] = mask[1, 40:] = False
    got, after = mixer(x, mask=mask)
    for row, tokens in ((0, slice(20, N)), (1, slice(0, 40))):
        want, last = mixer(x[row : row + 1, tokens])
        close(got[row : row + 1, tokens], want)
        same_state(after.select(torch.tensor([row])), last)


@every_mixer
def test_packed_sequences_do_not_see_each_other(name):
    mixer, x = built(name), inputs(b=1)
    offsets = torch.tensor([0, 0, 30, 31, N])
    got, after = mixer(x, cu_seqlens=offsets)
    for sequence, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        want, last = mixer(x[:, start:end])
        close(got[:, start:end], want)
        same_state(after.select(torch.tensor([sequence])), last)
    further, _ = mixer(x, after, cu_seqlens=offsets)
    for start, end in itertools.pairwise(offsets.tolist()):
        both, _ = mixer(torch.cat((x[:, start:end],) * 2, 1))
        close(further[:, start:end], both[:, end - start :])


@every_mixer
def test_nothing_comes_from_the_future(name):
    """Bit for bit."""
    mixer, x = built(name, torch.float32), inputs(dtype=torch.float32)
    want, _ = mixer(x)
    for t in (0, 20, 63, 64):
        other = x.clone()
        other[:, t + 1 :] += torch.randn(2, N - t - 1, WIDTH)
        assert torch.equal(mixer(other)[0][:, : t + 1], want[:, : t + 1])


@every_mixer
def test_earlier_tokens_matter(name):
    """The control of the tests above: it does mix."""
    mixer, x = built(name), inputs()
    other = x.clone()
    other[:, 0] += 1
    assert ((mixer(other)[0] - mixer(x)[0])[:, 1:].abs().amax(-1) > 1e-9).any()


@every_mixer
def test_every_parameter_and_the_first_state_learn(name):
    mixer, x = built(name), inputs().requires_grad_()
    _, before = mixer(inputs(n=5, seed=3))
    before = before.map(lambda part: part.detach().requires_grad_() if part.is_floating_point() else part)
    out, after = mixer(x, before)
    loss = out.square().sum()
    loss.backward()
    assert x.grad is not None and x.grad.isfinite().all()
    missing = [label for label, p in mixer.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing, f"no gradient reaches {missing}"
    grads: list[Tensor | None] = []
    before.map(lambda part: grads.append(part.grad) or part)  # type: ignore[func-returns-value]
    assert any(g is not None and g.any() for g in grads)
    after.detach()


@every_mixer
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 129])
def test_lengths(name, n):
    mixer = built(name, torch.float32)
    out, state = mixer(inputs(n=n, dtype=torch.float32))
    assert out.shape == (2, n, WIDTH) and out.isfinite().all()
    again, _ = mixer(inputs(n=3, dtype=torch.float32), state)
    assert again.isfinite().all() and state.bytes > 0


@every_mixer
def test_bfloat16(name):
    """As near to float64 as three times what rounding weights and inputs alone costs."""
    exact, low = built(name), built(name, torch.bfloat16)
    x = inputs(dtype=torch.bfloat16)
    rounded = built(name)
    rounded.load_state_dict(low.state_dict())
    want, by_weights = exact(x.double())[0], rounded(x.double())[0]
    got = low(x)[0]
    assert got.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert (got.double() - by_weights).norm() <= 3 * max((by_weights - want).norm(), eps * want.norm())


@every_mixer
def test_a_model_of_it_generates_as_it_reads(name):
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig(40, WIDTH, (name, name), {name: SETTINGS[name]})).double().eval()
    prompt = torch.randint(40, (2, 33))
    made = model.generate(prompt, 6)
    tokens = prompt
    for i in range(6):  # the whole sequence anew for each token
        logits, _ = model(tokens)
        assert torch.equal(logits[:, -1].argmax(-1), made[:, i])
        tokens = torch.cat((tokens, made[:, i : i + 1]), 1)
    drawn = [model.generate(prompt, 6, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_bad_configs_and_states():
    with pytest.raises(ValueError, match="layers must be of .*gla"):
        ModelConfig(10, 32, ("glaa",))
    with pytest.raises(ValueError, match="width must be an integer >= 1, got 0"):
        ModelConfig(10, 0, ("gla",))
    model = SequenceModel(ModelConfig(10, 32, ("gla",)))
    with pytest.raises(ValueError, match="one for each of 1 layers, got 2"):
        model(torch.zeros(1, 3, dtype=torch.int64), [None, None])
    with pytest.raises(ValueError, match="must be a multiple of heads, got 16 and 3"):
        MIXERS["gla"](32, heads=3)
    with pytest.raises(ValueError, match=r"reach must lie in \(0, 2\], got 3"):
        MIXERS["delta-net"](32, reach=3)
