"""LION: groups at once are each group alone, for any mixer; what new voxels, long groups, neighbours add."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.recurrence.mixers import SETTINGS
from tests.recurrence.streets import Marks, streets, trained
from tests.recurrence.test_voxels import some
from tilewise.recurrence import (
    LION,
    LinearGroupRNN,
    LIONBlock,
    SpatialDescriptor,
    SubmanifoldConv3d,
    Voxels,
    foreground,
    generate,
    groups,
    merge,
)

WINDOW = (5, 4, 4)


def layer(mixer: str, width: int = 32, group: int = 48, **settings) -> LinearGroupRNN:
    torch.manual_seed(0)
    made = LinearGroupRNN(width, mixer, WINDOW, group, options=SETTINGS[mixer], **settings).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return made


@pytest.mark.evidence
@pytest.mark.parametrize(
    "mixer", ["gla", "linear", "delta-net", "gated-delta-net", "mlstm", "kda", "lact", "rat"]
)
@pytest.mark.parametrize("both_ways", [False, True])
def test_groups_at_once_are_each_group_alone(mixer, both_ways):
    """Float64, along x and then y, values and gradients; cut elsewhere, the groups give something else."""
    net, voxels = layer(mixer, both_ways=both_ways), some(220, 32)
    features = voxels.features.requires_grad_()
    got = net(voxels.with_features(features)).features
    x = features
    for axis, norm, mixers in zip(("x", "y"), net.norms, net.mixers):
        lineup, read = groups(voxels, WINDOW, 48, axis=axis), torch.zeros_like(x)
        for piece in lineup.order.split(lineup.lengths.tolist()):
            own = norm(x[piece]).unsqueeze(0)
            made = mixers[0](own)[0][0]
            if both_ways:
                made = made + mixers[1](own.flip(1))[0][0].flip(0)
            read = read.index_copy(0, piece, made)
        x = x + read
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-10)
    back = torch.randn_like(x)
    a, b = (torch.autograd.grad(y, features, back)[0] for y in (got, x))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    net.group = 24
    assert (net(voxels).features - got).abs().max() > 1e-4


def test_groups_reach_over_windows_and_end_where_they_end():
    """A voxel moves its group along x, and whatever shares a group along y with that; nothing else."""
    net, voxels = layer("gla", group=6), some(220, 32)
    before, piece = net(voxels).features, {}
    for axis in ("x", "y"):
        lineup = groups(voxels, WINDOW, 6, axis=axis)
        number = torch.arange(len(lineup.lengths)).repeat_interleave(lineup.lengths)
        piece[axis] = torch.empty(220, dtype=torch.int64).index_copy(0, lineup.order, number)
    window = (voxels.coords // torch.tensor([1, *WINDOW])).unique(dim=0, return_inverse=True)[1]
    assert sum(len(window[piece["x"] == group].unique()) > 1 for group in range(36)) > 5
    for chosen in range(0, 220, 20):
        other = voxels.features.clone()
        other[chosen] = -other[chosen]
        moved = (net(voxels.with_features(other)).features - before).abs().amax(1) > 1e-12
        own = piece["x"] == piece["x"][chosen]
        assert torch.equal(moved, torch.isin(piece["y"], piece["y"][own])) and moved.sum() < 40


def test_a_descriptor_is_convolution_norm_and_gelu():
    torch.manual_seed(0)
    voxels, net = some(200, 8), SpatialDescriptor(8).double()
    conv = SubmanifoldConv3d(8, 8, bias=False).double()
    conv.load_state_dict(net.conv.state_dict())
    x = conv(voxels).features
    want = nn.functional.gelu(
        (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    )
    torch.testing.assert_close(net(voxels).features, want, rtol=1e-9, atol=1e-10)


@pytest.mark.evidence
def test_voxels_are_generated_around_those_that_answer_most():
    """A fifth of each sample, by the mean of features; at the four diagonals of the layer, empty, none
    twice."""
    voxels = some(180, 8)
    made = generate(voxels, 0.2)
    chosen = set()
    for sample in (0, 1):
        mine = (voxels.coords[:, 0] == sample).nonzero()[:, 0].tolist()
        mine.sort(key=lambda i: -float(voxels.features[i].mean()))
        chosen |= set(mine[: int(0.2 * len(mine))])
    assert set(foreground(voxels, 0.2).tolist()) == chosen
    old, want = set(map(tuple, voxels.coords.tolist())), set()
    for b, z, y, x in voxels.coords[sorted(chosen)].tolist():
        for dy, dx in ((1, -1), (1, 1), (-1, -1), (-1, 1)):
            want.add((b, z, min(max(y + dy, 0), 6), min(max(x + dx, 0), 8)))
    fresh = made.coords[180:].tolist()
    assert {tuple(cell) for cell in fresh} == want - old and len(fresh) == len(want - old) > 40
    assert torch.equal(made.features[:180], voxels.features) and not made.features[180:].any()
    assert len(generate(voxels, 0.0)) == 180
    everything = generate(voxels, 1.0)
    assert len(everything) > len(made) and set(foreground(voxels, 1.0).tolist()) == set(range(180))


@pytest.mark.evidence
def test_the_recurrence_fills_generated_voxels():
    """What is known about their neighbours arrives; in groups of one voxel all new ones stay alike."""
    voxels = some(180, 32)
    fresh = slice(180, None)
    for group, arrives in ((64, True), (1, False)):
        net = layer("gla", group=group)
        filled = net(generate(voxels, 0.2)).features[fresh]
        louder = voxels.with_features(voxels.features + 3 * torch.randn(1, 32, dtype=torch.float64))
        more = generate(louder, 0.2)
        assert ((filled - filled[0]).abs().max() > 1e-3) == arrives
        assert ((net(more).features[fresh] - filled[0]).abs().max() > 1e-3) == arrives


def test_a_block_goes_down_and_up_again():
    torch.manual_seed(0)
    voxels = some(200, 16)
    voxels = voxels.with_features(voxels.features.float())
    options = {"heads": 2, "rank": 4}
    block = LIONBlock(16, ((1, 2, 2), (2, 2, 2)), window=WINDOW, group=32, options=options)
    made = block(voxels)
    assert torch.equal(made.coords, voxels.coords) and made.features.shape == (200, 16)
    assert block.down[0].shift is False and block.down[1].shift is True
    made.features.square().sum().backward()
    # The decoder's last norm makes the sum of squares near constant, but no gradient is exactly none.
    assert not [name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_backbone_is_its_parts_and_learns():
    torch.manual_seed(0)
    voxels = some(200, 16)
    net = LION(
        16, blocks=2, scales=((2, 2, 2),), window=WINDOW, group=32, options={"heads": 2, "rank": 4}
    ).double()
    x = voxels
    for i in range(2):
        x = generate(net.descriptors[i](net.blocks[i](x)), 0.2)
        x = merge(x, (2, 1, 1))[0]
        x = x.with_features(net.norms[i](x.features))
    x, got = net.last(x), net(voxels)
    assert torch.equal(x.features, got.features) and torch.equal(x.coords, got.coords)
    assert got.shape == (2, 2, 7, 9) and len(got) > len(merge(voxels, (4, 1, 1))[0])
    (got.features * torch.randn_like(got.features)).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.fixture(scope="module")
def found() -> dict[str, Marks]:
    scenes = streets(96, 20_000)
    with torch.no_grad():
        return {kind: Marks.of(trained(kind), scenes) for kind in ("lion", "lion-apart", "lion-flat")}


@pytest.mark.evidence
def test_recurrences_over_groups_see_what_is_far(found):
    """Street scenes: every voxel says how a signal more than 6 m off stands; vehicles where their middles
    are.

    The control, trained alike, has networks of each voxel alone where the recurrences stand, and guesses.
    """
    assert found["lion"].far > 0.95 and found["lion-apart"].far < 0.6, found
    assert found["lion"].way < 0.9 * found["lion-apart"].way, found


@pytest.mark.evidence
def test_descriptors_add_what_a_row_does_not_show(found):
    """Trained alike, the control's descriptors see no neighbours: its vehicles know less of where they end,
    though recurrences alone carry the signal as far."""
    assert found["lion"].way < 0.75 * found["lion-flat"].way, found
    assert found["lion"].named > found["lion-flat"].named, found
    assert found["lion-flat"].far > 0.95, found


@pytest.mark.evidence
def test_generated_voxels_are_of_the_foreground():
    """In the trained network vehicles make more new voxels than their share; chosen at random they do not."""
    scene = streets(32, 30_000)
    net = trained("lion")
    with torch.no_grad():
        block = net.body.descriptors[0](net.body.blocks[0](net.first(scene.voxels)))
    chosen = scene.vehicle[foreground(block, 0.2)].float().mean().item()
    share = scene.vehicle.float().mean().item()
    mixed: Voxels = block.with_features(block.features[torch.randperm(len(block))])
    by_chance = scene.vehicle[foreground(mixed, 0.2)].float().mean().item()
    assert chosen > 1.5 * share and abs(by_chance - share) < 0.2 * share, (chosen, by_chance, share)


def test_bad_arguments():
    with pytest.raises(ValueError, match="mixer must be one of .*gla.*, got 'rnn'"):
        LinearGroupRNN(32, "rnn")
    with pytest.raises(ValueError, match=r"window must be three integers >= 1 \(z, y, x\)"):
        LinearGroupRNN(32, window=(3, 3))
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 1.5"):
        generate(some(5, 3), 1.5)
    with pytest.raises(ValueError, match="group must be an integer >= 1, got 0"):
        LinearGroupRNN(8, window=WINDOW, group=0, options={"heads": 2})(some(5, 8))
