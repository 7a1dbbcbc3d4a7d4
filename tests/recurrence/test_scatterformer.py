"""ScatterFormer: all windows at once are each window alone; cost is linear; what crosses windows is
needed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.recurrence.streets import Marks, streets, trained
from tests.recurrence.test_voxels import some
from tilewise.recurrence import (
    CrossWindow,
    ScatteredLinearAttention,
    ScatterFormer,
    Voxels,
    scattered_attention,
    windows,
)

LENGTHS = (1, 0, 200, 3, 31, 32, 33, 0, 64, 7)


def inputs(lengths=LENGTHS, heads: int = 2, d: int = 6, e: int = 5, dtype=torch.float64):
    total = sum(lengths)
    q, k = torch.randn(2, total, heads, d, dtype=torch.float64).relu().to(dtype)
    v = torch.randn(total, heads, e, dtype=torch.float64).to(dtype)
    return q, k, v, torch.tensor([0, *itertools.accumulate(lengths)])


def looped(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Window by window, all pairs of voxels."""
    parts = []
    for start, end in itertools.pairwise(offsets.tolist()):
        weights = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end])
        below = weights.sum(2, keepdim=True)
        weights = torch.where(below == 0, 0.0, weights / torch.where(below == 0, 1.0, below))
        parts.append(torch.einsum("hij,jhe->ihe", weights, v[start:end]))
    return torch.cat(parts)


def padded(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """All windows padded to the longest, the usual way."""
    parts = [x.split((offsets[1:] - offsets[:-1]).tolist()) for x in (q, k, v)]
    q, k, v = (
        torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True).transpose(1, 2) for part in parts
    )
    below = q @ k.sum(2, keepdim=True).mT
    out = q @ (k.mT @ v) / below.masked_fill(below == 0, 1)
    lengths = offsets[1:] - offsets[:-1]
    return out.transpose(1, 2)[torch.arange(q.shape[2]) < lengths.unsqueeze(1)]


@pytest.mark.evidence
@pytest.mark.parametrize("chunk", [1, 7, 32, 500])
def test_all_windows_at_once_are_each_window_alone(chunk):
    """Float64, values and gradients; windows empty, of one voxel, and ending with a chunk or behind it."""
    q, k, v, offsets = inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got, want = scattered_attention(q, k, v, offsets, chunk=chunk), looped(q, k, v, offsets)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    back = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, back), torch.autograd.grad(want, leaves, back)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    joined = offsets[[0, 1, 2, 4, 5, 6, 7, 8, 9, 10]]  # two windows taken for one: another result
    assert (scattered_attention(q, k, v, joined, chunk=chunk) - want).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_the_plain_formula(dtype):
    q, k, v, offsets = inputs(dtype=dtype)
    want = looped(q.double(), k.double(), v.double(), offsets)
    got = scattered_attention(q, k, v, offsets)
    assert got.dtype == dtype
    mine, plain = ((x.double() - want).abs().max() for x in (got, looped(q, k, v, offsets)))
    assert mine <= 2 * plain


def test_layer_is_its_formula():
    torch.manual_seed(0)
    voxels = some(200, 8)
    layer = ScatteredLinearAttention(8, heads=2, chunk=4).double()
    size = (5, 3, 4)
    got = layer(voxels.features, windows(voxels, size))
    q, k, v = (voxels.features @ layer.parts.weight.T).unflatten(1, (3, 2, 4)).unbind(1)
    window = voxels.coords // torch.tensor([1, *size])
    want = torch.empty_like(got)
    for cell in window.unique(dim=0):
        mine = (window == cell).all(1)
        alone = looped(q[mine].relu(), k[mine].relu(), v[mine], torch.tensor([0, int(mine.sum())]))
        want[mine] = layer.out(alone.flatten(1))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def unlike(windows: int) -> list[int]:
    """Voxels of windows as scenes have them: most hold few, one in fifty several hundred."""
    g = torch.Generator().manual_seed(0)
    counts = (12 * torch.rand(windows, generator=g) + 1).long()
    counts[::50] = 600
    return counts.tolist()


def products(run, lengths) -> int:
    q, k, v, offsets = inputs(lengths, d=16, e=16, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        run(q, k, v, offsets)
    return counter.get_total_flops()


@pytest.mark.evidence
def test_cost_is_linear_in_voxels_whatever_the_windows():
    """Counted products. Padding to the longest costs as many times more as the longest is longer than the
    mean."""
    small, large = unlike(200), unlike(800)
    assert 3.9 < sum(large) / sum(small) < 4.1
    grown = products(scattered_attention, large) / products(scattered_attention, small)
    assert 3.9 < grown < 4.1
    assert products(padded, small) > 12 * products(scattered_attention, small)
    # One long window more: padding pays it for all windows, chunks pay it once.
    longer = [*small, 6000]
    voxels = sum(longer) / sum(small)
    assert products(scattered_attention, longer) / products(scattered_attention, small) < 1.05 * voxels
    assert products(padded, longer) / products(padded, small) > 3 * voxels
    q, k, v, offsets = inputs(small)
    torch.testing.assert_close(padded(q, k, v, offsets), looped(q, k, v, offsets), rtol=1e-9, atol=1e-10)


def test_windows_meet_only_where_they_are_crossed():
    """A voxel moves others of its own window; those of the next only through the crossing; bit for bit."""
    torch.manual_seed(0)
    voxels = some(300, 8, shape=(1, 2, 16, 16))
    voxels = voxels.with_features(voxels.features.float())
    window = voxels.coords[:, 2:] // 4
    chosen = int(((voxels.coords[:, 2:] // 4 == 1).all(1)).nonzero()[0])
    other = voxels.features.clone()
    other[chosen] += torch.randn(8)
    own = (window == window[chosen]).all(1)
    beside = (window - window[chosen]).abs().sum(1) == 1
    for across in (True, False):
        net = ScatterFormer(8, layers=1, heads=2, window=(2, 4, 4), across=across)
        moved = (net(voxels).features != net(voxels.with_features(other)).features).any(1)
        assert moved[own].float().mean() > 0.9
        assert moved[beside].any() == across and moved[~own].any() == across


def test_a_crossing_is_three_convolutions_and_what_is_left():
    torch.manual_seed(0)
    voxels = some(200, 8)
    layer = CrossWindow(8, (5, 4, 6)).double()
    assert [conv.kernel for conv in layer.convs] == [(3, 3, 3), (1, 1, 7), (1, 5, 1)]
    x = layer.norm(voxels.features)
    made = []
    for conv, part in zip(layer.convs, x.split(2, 1)):
        out = torch.zeros(200, 2, dtype=torch.float64) + conv.bias
        reach = torch.tensor(conv.kernel) // 2
        for i, cell in enumerate(voxels.coords):
            away = voxels.coords - cell
            near = (away[:, 0] == 0) & (away[:, 1:].abs() <= reach).all(1)
            steps = away[near, 1:] + reach
            place = (steps[:, 0] * conv.kernel[1] + steps[:, 1]) * conv.kernel[2] + steps[:, 2]
            out[i] += (conv.weight[place] * part[near]).sum(0)
        made.append(out)
    x = x + torch.cat((*made, x[:, 6:]), 1)
    want = x + layer.mlp(layer.mlp_norm(x))
    torch.testing.assert_close(layer(voxels).features, want, rtol=1e-10, atol=1e-11)


@pytest.mark.evidence
def test_what_crosses_windows_is_needed():
    """Street scenes of 4 x 4 windows: every voxel says how the signal stands, in the next windows too;
    vehicles, which lie across borders, say where their middles are.

    Trained alike, the control has no convolution that crosses windows. What lies windows away hardly arrives
    after four layers (`far`), here as there.
    """
    scenes = streets(96, 20_000)
    with torch.no_grad():
        found = {kind: Marks.of(trained(kind), scenes) for kind in ("scatter", "scatter-apart")}
    assert found["scatter"].near > found["scatter-apart"].near + 0.1, found
    assert found["scatter"].way < 0.85 * found["scatter-apart"].way, found


def test_bad_arguments():
    q, k, v, offsets = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        scattered_attention(q, k[:, :, :3], v, offsets)
    with pytest.raises(TypeError, match="one floating dtype"):
        scattered_attention(q, k, v.float(), offsets)
    with pytest.raises(ValueError, match="must rise from 0 to the 371 tokens"):
        scattered_attention(q, k, v, offsets + 1)
    with pytest.raises(ValueError, match="chunk must be an integer >= 1, got 0"):
        scattered_attention(q, k, v, offsets, chunk=0)
    with pytest.raises(TypeError, match="offsets must be an integer tensor"):
        scattered_attention(q, k, v, None)
    with pytest.raises(ValueError, match="must be a multiple of heads"):
        ScatteredLinearAttention(10, heads=4)
    with pytest.raises(ValueError, match="must be a multiple"):
        CrossWindow(10, (1, 3, 3))


def test_every_parameter_learns():
    torch.manual_seed(0)
    voxels: Voxels = some(200, 8)
    net = ScatterFormer(8, layers=2, heads=2, window=(5, 4, 4)).double()
    net(voxels).features.square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
