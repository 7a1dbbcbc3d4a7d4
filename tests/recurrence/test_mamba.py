"""The selective scan as a function, and what choosing by content is worth: selective copying and induction."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.recurrence.recalled import marks, said, trained
from tilewise.data.selection_tasks import induction, selective_copying
from tilewise.recurrence import Mamba, SelectiveState, explain_selective, selective_scan


def drawn(
    b: int = 2, n: int = 50, channels: int = 12, states: int = 4, groups: int | None = None
) -> dict[str, Tensor]:
    """Arguments in float64."""
    gen = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    between = () if groups is None else (groups,)
    return {
        "x": random(b, n, channels),
        "delta": random(b, n, channels).exp() / 4,
        "A": -random(channels, states).exp(),
        "B": random(b, *between, n, states),
        "C": random(b, *between, n, states),
        "D": random(channels),
    }


def parallel(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The scan by Hillis and Steele's doubling over pairs (factor, sum), in the paper's shapes `[B, N, C, S]`."""
    factor = (delta.unsqueeze(3) * A).exp()
    total = (delta * x).unsqueeze(3) * B.unsqueeze(2)
    shift = 1
    while shift < x.shape[1]:
        before = torch.cat((torch.zeros_like(total[:, :shift]), total[:, :-shift]), 1)
        decayed = torch.cat((torch.ones_like(factor[:, :shift]), factor[:, :-shift]), 1)
        total, factor, shift = total + factor * before, factor * decayed, 2 * shift
    return (total * C.unsqueeze(2)).sum(3) + D * x


@pytest.mark.parametrize("engine", ["definition", "torch", "auto"])
def test_masks_states_and_packed_sequences(engine):
    """With a mask, in packs and in parts: what each sequence gives alone."""
    given = drawn()
    run = functools.partial(selective_scan, engine=engine, return_state=True)
    whole, last = run(**given)
    padded = {}
    for name, part in given.items():
        padded[name] = part if part.ndim < 3 else torch.cat((torch.full_like(part[:, :3], 1e4), part), 1)
    mask = torch.arange(53).expand(2, -1) >= 3
    got, after = run(**padded, mask=mask)
    assert (got[:, :3] == 0).all()
    torch.testing.assert_close(got[:, 3:], whole)
    torch.testing.assert_close(after.channels, last.channels)
    one = {name: part if part.ndim < 3 else part[:1] for name, part in given.items()}
    got, after = run(**one, cu_seqlens=torch.tensor([0, 20, 20, 50]))
    first = {name: part if part.ndim < 3 else part[:1, :20] for name, part in given.items()}
    want, before = run(**first)
    torch.testing.assert_close(got[:, :20], want)
    torch.testing.assert_close(after.channels[:1], before.channels)
    second = {name: part if part.ndim < 3 else part[:1, 20:] for name, part in given.items()}
    torch.testing.assert_close(run(**second, state=before)[0], whole[:1, 20:])


def test_groups_of_channels_read_their_own():
    given = drawn(groups=3)
    whole = selective_scan(**given)
    for group in range(3):
        own = slice(4 * group, 4 * group + 4)
        part = {name: given[name][..., own] for name in ("x", "delta", "D")}
        alone = selective_scan(**part, A=given["A"][own], B=given["B"][:, group], C=given["C"][:, group])
        torch.testing.assert_close(whole[..., own], alone)


def test_shared_steps_inputs_and_outputs_are_expanded():
    given = drawn()
    for name in ("delta", "B", "C"):
        given[name] = given[name][:1]
    want = selective_scan(**given | {name: given[name].expand(2, -1, -1) for name in ("delta", "B", "C")})
    torch.testing.assert_close(selective_scan(**given), want)


@pytest.mark.parametrize("n", [0, 1])
def test_no_token_and_one(n):
    out, state = selective_scan(**drawn(n=n), return_state=True)
    assert out.shape == (2, n, 12) and state.channels.shape == (2, 12, 4) and state.bytes == 2 * 12 * 4 * 8


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"A": torch.ones(12, 4)}, ValueError, "A are rates of decay, so none is above 0; got values up to 1"),
        ({"delta": -torch.ones(2, 50, 12)}, ValueError, "delta are step sizes, .* got values from -1"),
        ({"delta": torch.full((2, 50, 12), torch.nan)}, ValueError, "delta are step sizes"),
        ({"delta": torch.ones(2, 49, 12)}, ValueError, r"delta must be \[2\|1, 50, 12\], got shape \(2, 49, 12\)"),
        ({"A": -torch.ones(11, 4)}, ValueError, r"A must be \[12, S\], got shape \(11, 4\)"),
        ({"B": torch.ones(2, 50, 5)}, ValueError, r"B must be \[2\|1, 50, 4\] or .*, got shape \(2, 50, 5\)"),
        ({"C": torch.ones(2, 5, 50, 4)}, ValueError, "groups of C must divide the 12 channels, got 5"),
        ({"C": torch.ones(2, 3, 50, 4)}, ValueError, "B and C must have the same groups, got 1 and 3"),
        ({"D": torch.ones(3)}, ValueError, r"D must be \[12\], got shape \(3,\)"),
        ({"D": torch.ones(12, dtype=torch.int64)}, TypeError, "D must be a floating tensor, got torch.int64"),
        ({"x": torch.ones(2, 50)}, ValueError, r"x must be \[batch, N, channels\], got shape \(2, 50\)"),
        ({"x": [1.0]}, TypeError, "x must be a floating tensor, got list"),
        ({"B": None}, TypeError, "B must be a floating tensor, got NoneType"),
        ({"state": torch.ones(2, 12, 4)}, TypeError, "state must be None or the SelectiveState of an earlier call"),
        ({"state": SelectiveState(torch.ones(2, 12, 5))}, ValueError, r"the state must be \[2, 12, 4\], got"),
        ({"mask": torch.ones(2, 49, dtype=torch.bool)}, ValueError, r"mask must be \[2, 50\]"),
        ({"cu_seqlens": torch.tensor([0, 50])}, ValueError, "a batch of one, got 2"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(changes, error, match):
    with pytest.raises(error, match=match):
        selective_scan(**drawn() | changes)


def test_explains_what_runs():
    assert explain_selective(*list(drawn().values())[:5], D=drawn()["D"]).engine == "torch"
    with pytest.raises(TypeError, match="takes the arguments of selective_scan, got chunk"):
        explain_selective(*list(drawn().values())[:5], chunk=3)


def test_sizes_of_the_mixer():
    with pytest.raises(ValueError, match="states must be an integer >= 1, got 0"):
        Mamba(8, states=0)
    with pytest.raises(ValueError, match=r"steps must rise from above 0, got \(0.1, 0.01\)"):
        Mamba(8, steps=(0.1, 0.01))
    steps = torch.nn.functional.softplus(Mamba(64, steps=(0.01, 0.2)).step_bias)
    assert 0.0099 < steps.min() < 0.02 and 0.1 < steps.max() < 0.201


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["definition", "torch", "native"])
def test_parallel_form_is_the_recurrence(engine):
    """Doubling over all tokens at once, written out, against the engines: outputs and gradients."""
    given = {name: part.float() for name, part in drawn(n=70).items()}
    if engine != "native":
        given = {name: part.double() for name, part in given.items()}
    made = []
    for form in (functools.partial(selective_scan, engine=engine), parallel):
        leaves = {name: part.clone().requires_grad_() for name, part in given.items()}
        out = form(**leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        made.append((out.detach(), *torch.autograd.grad(out, list(leaves.values()), weights.to(out.dtype))))
    bound = 1e-12 if engine != "native" else 1e-5
    for name, got, want in zip(("out", *given), *made):
        assert (got - want).norm() < bound * want.norm(), name


def test_a_fixed_system_is_a_convolution_and_a_chosen_one_is_not():
    """`selective=False` is time-invariant: shifting the input shifts the output. Selection is what ends that."""
    x = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    late = torch.cat((torch.zeros(1, 10, 16, dtype=torch.float64), x), 1)
    for selective in (False, True):
        torch.manual_seed(0)
        made = Mamba(16, selective=selective).double()
        torch.testing.assert_close(made(late)[0][:, 10:], made(x)[0])
        # The scan of a sum is the sum of scans only where nothing is chosen by what is read.
        inner = torch.randn(2, 40, 32, dtype=torch.float64)
        whole, parts = (
            [selective_scan(i, *_given(made, i)) for i in each]
            for each in ((inner[:1] + inner[1:],), (inner[:1], inner[1:]))
        )
        linear = torch.allclose(whole[0], parts[0] + parts[1])
        assert linear is not selective


def _given(mamba: Mamba, inner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    delta, to_state, to_out = mamba._chosen(inner)
    return delta, -mamba.log_rate.exp(), to_state, to_out


def copying(seed: int) -> tuple[Tensor, Tensor]:
    return selective_copying(100, 48, 8, seed=seed)


@pytest.mark.evidence
def test_selective_copying_needs_selection():
    """Eight tokens among noise at random places: two layers solve it, the same layers made time-invariant do not.

    Both have the same recipe of training, widths and states.
    """
    chosen, fixed = (marks(trained(name), copying) for name in ("mamba-copying", "invariant-copying"))
    found = said(chosen=chosen, fixed=fixed)
    assert chosen.min() > 0.9, found
    assert 1 - fixed.max() > 3 * (1 - chosen.min()), found


@pytest.mark.evidence
def test_induction_holds_far_beyond_the_lengths_of_training():
    """What followed the special token: learned on up to 512 tokens, asked for after 4,096.

    The time-invariant layers, with gates and convolutions all the same, learn it too, and lose it beyond.
    """
    found = {
        (name, length): marks(trained(f"{name}-induction"), functools.partial(_induction, length), draws=2)
        for name in ("mamba", "invariant")
        for length in (512, 4096)
    }
    shown = said(**{f"{name} {length}": x for (name, length), x in found.items()})
    assert min(found[name, 512].min() for name in ("mamba", "invariant")) > 0.95, shown
    assert found["mamba", 4096].mean() > 0.8 and found["invariant", 4096].mean() < 0.4, shown


def _induction(length: int, seed: int) -> tuple[Tensor, Tensor]:
    return induction(32, length, seed=seed)


@pytest.mark.evidence
def test_the_choice_is_what_copies():
    """The trained model with every step made its mean: what it has learned is of no use without the choice."""
    model = trained("mamba-copying")
    whole = marks(model, copying, draws=1)
    for block in model.blocks:
        block.mixer.step.weight.data.zero_()
    assert marks(model, copying, draws=1).max() < 0.7 * whole.min()
