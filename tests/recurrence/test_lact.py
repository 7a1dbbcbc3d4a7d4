"""LaCT: its formula, its update against autograd's, and what larger chunks, Muon and the memory do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tests.clock import least_times
from tests.recurrence import decays, memory_models
from tests.recurrence.memories import Memory, pairs, recalled
from tilewise.recurrence import FastWeights, LaCT, orthogonal, read_chunk

WEIGHTS = Path(__file__).parent / "weights/lact.safetensors"


def weights(hidden: int = 7, dim: int = 5) -> FastWeights:
    torch.manual_seed(0)
    shapes = ((2, 3, hidden, dim), (2, 3, hidden, dim), (2, 3, dim, hidden))
    return FastWeights(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))


def tokens(count: int = 11, dim: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.randn(2, 2, 3, count, dim, dtype=torch.float64)
    return k, v, torch.rand(2, 3, count, 3, dtype=torch.float64)


@pytest.mark.evidence
@pytest.mark.parametrize("loss", ["dot", "square"])
def test_the_update_is_the_gradient_of_the_stated_loss(loss):
    """Float64, against autograd, each weight with its own rates; the other loss's gradient is another one."""
    memory, (k, v, rates) = weights(), tokens()
    parts = [w.clone().requires_grad_() for w in (memory.gate, memory.up, memory.down)]
    found = torch.einsum(
        "bhdj,bhtj->bhtd",
        parts[2],
        F.silu(torch.einsum("bhjd,bhtd->bhtj", parts[0], k)) * torch.einsum("bhjd,bhtd->bhtj", parts[1], k),
    )
    losses = -(found * v).sum(-1) if loss == "dot" else ((found - v) ** 2).sum(-1) / 2
    got = memory.descent(k, v, rates, loss)
    other = memory.descent(k, v, rates, "square" if loss == "dot" else "dot")
    for i, name in enumerate(("gate", "up", "down")):
        (grad,) = torch.autograd.grad((losses * rates[..., i]).sum(), parts[i], retain_graph=True)
        step = getattr(got, name)
        assert (step + grad).norm() < 1e3 * torch.finfo(torch.float64).eps * grad.norm()
        assert (getattr(other, name) + grad).norm() > 0.1 * grad.norm()


@pytest.mark.evidence
def test_muon_brings_singular_values_near_one_and_keeps_their_directions():
    """Over five decades of scale; the raw gradient's are spread, and three of the five steps do not
    suffice."""
    torch.manual_seed(0)
    for shape in ((16, 16), (8, 32), (32, 8)):
        x = torch.randn(4, *shape, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        assert (s.amax(-1) / s.amin(-1)).min() > 2
        for scale in (1e-3, 1.0, 1e2):
            got = orthogonal(scale * x)
            inside = u.mT @ got @ vh.mT
            diagonal = inside.diagonal(dim1=-2, dim2=-1)
            assert 0.5 < diagonal.min() and diagonal.max() < 1.25
            assert (inside - diagonal.diag_embed()).norm() < 1e-9 * inside.norm()


@pytest.mark.evidence
def test_rows_keep_their_length():
    memory, (k, v, rates) = weights(), tokens()
    after = read_chunk(memory, k, v, rates, lengths=memory.lengths)
    free = read_chunk(memory, k, v, rates)
    for name in ("gate", "up", "down"):
        want = getattr(memory.lengths, name)
        torch.testing.assert_close(getattr(after.lengths, name), want, rtol=2e-5, atol=0)
        assert (getattr(free.lengths, name) / want - 1).abs().max() > 0.1
        assert (getattr(after, name) - getattr(memory, name)).norm() > 0.1 * getattr(memory, name).norm()


@pytest.mark.evidence
@pytest.mark.parametrize("muon", [False, True])
def test_the_layer_updates_once_a_chunk_and_applies_first(muon):
    """The memory behind 3 full chunks and a begun one equals three updates by hand."""
    torch.manual_seed(0)
    mixer = LaCT(16, heads=2, chunk=8, rate=0.3, muon=muon).double()
    x = torch.randn(2, 29, 16, dtype=torch.float64)
    memory = mixer(x[:, :0])[1].memory.weights
    state, lengths = None, memory.lengths
    for chunk in range(3):
        part = x[:, 8 * chunk : 8 * chunk + 8]
        _, open_ = mixer(part[:, :7], state)  # seven tokens lie open: nothing is learned yet
        before = memory if state is None else state.memory.weights
        assert all(
            torch.equal(getattr(open_.memory.weights, n), getattr(before, n)) for n in ("gate", "up", "down")
        )
        _, state = mixer(part[:, 7:], open_)
        told = _told(mixer, part, 8 * chunk)
        memory = read_chunk(memory, *told, lengths=lengths, muon=muon)
        torch.testing.assert_close(state.memory.weights.gate, memory.gate, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state.memory.weights.down, memory.down, rtol=1e-9, atol=1e-12)
    whole = mixer(x)[1].memory
    torch.testing.assert_close(whole.weights.up, memory.up, rtol=1e-9, atol=1e-12)


def _told(mixer: LaCT, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and rates that a chunk tells the memory, by their formulas."""
    k = turned(_fast(mixer, mixer.key_norm(x @ mixer.key.weight.T), 1), start)
    v, rates = F.silu(x @ mixer.value.weight.T), F.softplus(mixer.rate(x))
    return k.unsqueeze(1), v.unsqueeze(1), rates.unsqueeze(1)


def _fast(mixer: LaCT, x: Tensor, which: int) -> Tensor:
    x = F.silu(x * mixer.scale[which] + mixer.shift[which])
    return x / (x.norm(dim=-1, keepdim=True) + 1e-5)


def turned(x: Tensor, start: int) -> Tensor:
    """Rotary positions of two heads of 8, as multiplication by complex numbers."""
    x = x.unflatten(2, (2, 8))
    place = torch.arange(start, start + x.shape[1]).double()[:, None, None]
    angles = place * torch.tensor([500000.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    spun = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((spun.real, spun.imag), -1).flatten(2)


def by_formula(mixer: LaCT, x: Tensor) -> Tensor:
    """One memory, two heads of attention, a loop over tokens and over chunks; gradients by autograd."""
    q, k = (
        norm(x @ w.weight.T) for norm, w in ((mixer.query_norm, mixer.query), (mixer.key_norm, mixer.key))
    )
    ask, (fast, told, rates) = turned(_fast(mixer, q, 0), 0), (y[:, 0] for y in _told(mixer, x, 0))
    q, k, v, near = turned(q, 0), turned(k, 0), x @ mixer.value.weight.T, torch.zeros_like(x)
    for t in range(x.shape[1]):
        seen = slice(max(0, t - mixer.window + 1), t + 1)
        for own in (slice(0, 8), slice(8, 16)):
            weights = (k[:, seen, own] @ q[:, t, own].unsqueeze(2) / 8**0.5).softmax(1)
            near[:, t, own] = (weights * v[:, seen, own]).sum(1)
    first = [w[0].expand(len(x), -1, -1).detach() for w in (mixer.gate, mixer.up, mixer.down)]
    parts, far = first, []
    for start in range(0, x.shape[1], mixer.chunk):
        own = slice(start, start + mixer.chunk)
        far.append(read(parts, ask[:, own]))
        parts = [w.detach().requires_grad_() for w in parts]
        losses = -(read(parts, fast[:, own]) * told[:, own]).sum(-1)
        made = []
        for i, (w, begun) in enumerate(zip(parts, first)):
            (step,) = torch.autograd.grad((losses * rates[:, own, i].detach()).sum(), w, retain_graph=True)
            step = orthogonal(-step) if mixer.muon else -step
            length = (w + step).norm(dim=-1, keepdim=True) + 1e-5
            made.append((w + step) / length * begun.norm(dim=-1, keepdim=True))
        parts = made
    out = torch.cat(far, 1)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight[0]
    return (near + out * F.silu(mixer.share(x))) @ mixer.out.weight.T


def read(parts: list[Tensor], x: Tensor) -> Tensor:
    gate, up, down = parts
    return (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT


@pytest.mark.evidence
@pytest.mark.parametrize("muon", [False, True])
def test_the_layer_is_its_formula(muon):
    """Windows that slide over the chunks' borders. The controls: another chunk or window is another
    function."""

    def layer(chunk: int, window: int) -> LaCT:
        torch.manual_seed(0)
        return LaCT(16, heads=2, chunk=chunk, window=window, rate=0.3, muon=muon).double()

    x = torch.randn(2, 29, 16, dtype=torch.float64)
    want = by_formula(layer(8, 5), x).detach()
    torch.testing.assert_close(layer(8, 5)(x)[0], want, rtol=1e-9, atol=1e-10)
    for other in (layer(4, 5), layer(8, 4)):
        assert (other(x)[0] - want).norm() > 1e-3 * want.norm()


@pytest.mark.evidence
def test_a_token_reads_its_window_and_all_chunks_before_its_own():
    """Gradients of the last output by the inputs, chunks of 8: a window of 5 leaves a gap in the open chunk,
    one as long as the chunk none; without the memory only the window is left."""
    torch.manual_seed(0)
    x = torch.randn(1, 39, 16, dtype=torch.float64).requires_grad_()
    for window, silent, dark in ((5, False, range(32, 34)), (8, False, ()), (5, True, range(34))):
        mixer = LaCT(16, heads=2, chunk=8, window=window, rate=0.3).double()
        if silent:
            mixer.share.weight.detach().zero_(), mixer.share.bias.detach().zero_()
        (grad,) = torch.autograd.grad(mixer(x)[0][0, -1].sum(), x)
        unseen = [t for t in range(39) if not grad[0, t].any()]
        assert unseen == list(dark), (window, silent)


@pytest.mark.evidence
@pytest.mark.timed
def test_larger_chunks_take_less_time():
    """The layer, forward and backward; the window, and with it attention, is the same for all chunks."""
    x = torch.randn(1, 2048, 64)
    mixers = {chunk: LaCT(64, heads=4, chunk=chunk, window=16) for chunk in (8, 64, 512)}
    found = least_times(
        {chunk: lambda mixer=mixer: mixer(x)[0].sum().backward() for chunk, mixer in mixers.items()}, rounds=2
    )
    assert found[8] > 2 * found[64] > 2 * found[512] and found[8] > 4 * found[512], found


@pytest.mark.evidence
def test_a_trained_model_models_text_better_for_its_memory():
    """The sweep in a model: chunks of 16, 64 and 256 beside one window of 16. Of two controls one was trained
    without a memory, the other has its memory silenced."""
    found = {
        chunk: decays.bits_per_byte(memory_models.load(f"lact-{chunk}"))
        for chunk in ("16", "64", "256", "none")
    }
    found["silenced"] = decays.bits_per_byte(memory_models.silenced(memory_models.load("lact-64")))
    assert max(found[chunk] for chunk in ("16", "64", "256")) < found["none"] - 0.04, found
    assert found["silenced"] > found["none"], found


def trained(kind: str, chunk: int) -> Memory:
    memory, prefix = Memory(kind), f"{kind}-{chunk}."
    found = load_file(WEIGHTS)
    memory.load_state_dict({n[len(prefix) :]: p.float() for n, p in found.items() if n.startswith(prefix)})
    return memory


def share(kind: str, chunk: int) -> float:
    k, v = pairs(64, 64, seed=5)
    with torch.no_grad():
        return recalled(trained(kind, chunk)(k, v, chunk))


@pytest.mark.evidence
def test_muon_recalls_more_than_plain_descent():
    """Trained alike, at both chunk sizes."""
    assert share("muon", 16) > share("swiglu", 16) + 0.015
    assert share("muon", 64) > share("swiglu", 64) + 0.03


def test_a_matrix_over_features_recalls_more_still():
    """Not the paper's hope: at 64 pairs a delta-rule matrix over 96 learned features does better."""
    assert share("linear", 4) > share("swiglu", 4) + 0.05 and share("linear", 64) > share("muon", 64) + 0.05


def test_bad_arguments():
    with pytest.raises(ValueError, match="loss must be one of 'dot', 'square', got 'l1'"):
        weights().descent(*tokens(), loss="l1")
    with pytest.raises(ValueError, match="rate must be above 0, got 0"):
        LaCT(16, rate=0)
    for name in ("chunk", "window"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            LaCT(16, **{name: 0})


@pytest.mark.evidence
def test_larger_chunks_read_the_weights_less_and_recall_somewhat_less():
    """The sweep: 64 pairs in a state of 3 x 32 x 32 numbers, first weights and rates trained for each chunk.

    Of 16 times as large chunks only a few points of recall are the price, and updates (which read and write
    all weights) fall 16-fold. Without updates nothing is recalled.
    """
    k, v = pairs(64, 64, seed=5)
    found = {}
    with torch.no_grad():
        for chunk in (4, 16, 64):
            found[chunk] = recalled(trained("swiglu", chunk)(k, v, chunk))
        still = trained("swiglu", 16)
        still.rates.fill_(-100.0)
        nothing = recalled(still(k, v, 16))
    assert nothing < 0.05
    assert found[4] > found[16] > found[64] > found[4] - 0.1 and found[64] > 0.6
