"""Clips of moving shapes: equal for equal seeds, moving as told, nearer before farther, materials shared."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import grid_sample, max_pool3d

from tilewise.data.shapes import PATTERNS, SPEED, WAVELENGTHS, _draw, moving_shapes


def test_seed_decides_everything():
    one, again, other = moving_shapes(2, 7), moving_shapes(2, 7), moving_shapes(2, 9)
    assert torch.equal(one.pixels, again.pixels) and torch.equal(one.owner, again.owner)
    assert (one.pixels - other.pixels).abs().mean() > 0.2


def test_a_clip_is_the_same_alone_and_among_others():
    many = moving_shapes(4, 20)
    for number in range(4):
        alone = moving_shapes(1, 20 + number)
        torch.testing.assert_close(alone.pixels[0], many.pixels[number])
        assert torch.equal(alone.material[0], many.material[number])


def test_clips_stay_the_same_between_versions():
    """Trained weights and stored figures are only meaningful while equal seeds give equal clips."""
    clips = moving_shapes(3, 5)
    torch.testing.assert_close(
        clips.pixels.mean((1, 2, 3, 4)), torch.tensor([-0.374542, -0.438112, -0.275107]), atol=1e-5, rtol=0
    )
    assert clips.owner.flatten().bincount(minlength=6).tolist() == [15247, 1546, 814, 1968, 2239, 2762]


def test_shapes_and_bounds():
    clips = moving_shapes(6, 0, frames=3, height=20, width=28)
    assert clips.pixels.shape == (6, 3, 20, 28, 3) and clips.pixels.dtype == torch.float32
    assert clips.owner.shape == clips.material.shape == (6, 3, 20, 28)
    assert -1 <= clips.pixels.min() and clips.pixels.max() <= 1 and clips.pixels.std() > 0.3
    assert set(clips.material.unique().tolist()) == {0, 1, 2}
    assert set(clips.owner.unique().tolist()) == set(range(6))


@pytest.mark.parametrize(
    "setting",
    [{"count": 0}, {"frames": 1}, {"height": 1, "width": 1}, {"shapes": 0}, {"materials": 1}, {"speed": 0.0}],
)
def test_smallest_settings(setting):
    clips = moving_shapes(**setting)
    assert torch.isfinite(clips.pixels).all()
    assert clips.pixels.shape[0] == clips.owner.shape[0] == setting.get("count", 1)
    if setting.get("shapes") == 0:
        assert not clips.owner.any() and not clips.material.any()
    if "materials" in setting:
        assert clips.material.max() == 1


def test_a_nearer_shape_covers_a_farther_one():
    """Later shapes only cover: where none of them is, the clip is the one without them."""
    few, many = moving_shapes(8, 3, shapes=3), moving_shapes(8, 3, shapes=5)
    covered = many.owner > 3
    assert torch.equal(few.owner[~covered], many.owner[~covered])
    assert (covered & (few.owner > 0)).any(), "no shape covers another here"
    assert torch.equal(few.material[~covered], many.material[~covered])
    near = max_pool3d(covered.float(), (1, 3, 3), 1, (0, 1, 1)).bool()
    torch.testing.assert_close(few.pixels[~near], many.pixels[~near])


def test_every_shape_has_one_material_and_some_share_it():
    clips = moving_shapes(8, 0)
    shared = 0
    for owner, material in zip(clips.owner, clips.material):
        of = {i: set(material[owner == i].tolist()) for i in owner.unique().tolist()}
        assert all(len(found) == 1 for found in of.values()) and of.get(0) in ({0}, None)
        shapes = [min(found) for i, found in of.items() if i]
        shared += len(shapes) - len(set(shapes))
    assert shared > 8


def test_a_material_mixes_two_colours():
    """Away from edges, pixels of one material within a clip lie on one line of colours; of two they do not."""
    alone, both = [], []
    clips = moving_shapes(8, 0)
    for pixels, owner, material in zip(clips.pixels, clips.owner, clips.material):
        low, high = (max_pool3d((sign * owner).float()[None], (1, 3, 3), 1, (0, 1, 1))[0] for sign in (-1, 1))
        for kinds, found in (((0,), alone), ((1,), alone), ((0, 1), both)):
            some = pixels[(high == -low) & torch.isin(material, torch.tensor(kinds))]
            if len(some) > 30:
                found.append(_off_the_line(some))
    assert max(alone) < 0.02, "a few are soft tips of shapes that cover less than half of a pixel"
    assert sorted(both)[len(both) // 2] > 0.3


def _off_the_line(colours: torch.Tensor) -> float:
    """Share of colours `[n, 3]` farther than 0.02 from the line that fits them best."""
    centred = colours - colours.mean(0)
    line = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    rest = centred - (centred @ line)[:, None] * line
    return float((rest.norm(dim=1) > 0.02).float().mean())


def test_the_background_moves_at_its_speed():
    """Frame 2 is frame 0 moved by two frames' way; moved the other way it is not (control)."""
    clips = moving_shapes(12, 0, shapes=0, height=48, width=48)
    velocity = (2 * _draw(12, 0, 0, 2)[1][:, 0, 2:4] - 1) * SPEED / 2
    right, wrong = (_moved(clips.pixels, sign * 2 * velocity) for sign in (1, -1))
    inside = (slice(None), slice(4, -4), slice(4, -4))
    errors = [(moved[inside] - clips.pixels[:, 2][inside]).square().mean() for moved in (right, wrong)]
    assert errors[0] < errors[1] / 20


def _moved(pixels: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
    """The first frame moved by `way [B, (x, y)]` pixels, read between pixels."""
    size = pixels.shape[2]
    place = torch.arange(size) + 0.5
    y, x = torch.meshgrid(place, place, indexing="ij")
    at = (torch.stack((x, y), -1) - way[:, None, None]) / size * 2 - 1
    frame = pixels[:, 0].permute(0, 3, 1, 2)
    return grid_sample(frame, at, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def test_without_speed_only_shapes_turn():
    clips = moving_shapes(4, 1, speed=0.0)
    still = moving_shapes(4, 1, speed=0.0, shapes=0).pixels
    assert torch.equal(still, still[:, :1].expand_as(still))
    assert not torch.equal(clips.pixels[:, 0], clips.pixels[:, 7])


def test_shapes_move_by_at_most_their_speed_and_stay_in_sight():
    """The centre of mass of a lone shape, while it is whole: no jump beyond the speed and a pixel of rounding."""
    clips = moving_shapes(16, 0, shapes=1, height=64, width=64, frames=12)
    grid = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))
    moved = []
    for owner in clips.owner:
        border = owner.clone()
        border[:, 2:-2, 2:-2] = 0
        assert owner.flatten(1).any(1).all(), "out of sight"
        if border.any():
            continue
        weight = (owner == 1).float()
        centre = torch.einsum("thw,dhw->td", weight, grid) / weight.sum((1, 2))[:, None]
        moved.append(centre.diff(dim=0).abs().max().item())
    assert len(moved) > 2 and 0.2 < max(moved) < SPEED + 1


def test_periods_lie_within_their_bounds():
    assert 2 * 2 <= WAVELENGTHS[0] < WAVELENGTHS[1] and len(PATTERNS) == 3, "a patch of 2 must resolve them"


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"count": -1}, ValueError, "count must be at least 0"),
        ({"count": 1.0}, TypeError, "count must be an integer, got 1.0"),
        ({"seed": -3}, ValueError, "seed must be at least 0"),
        ({"seed": 2**63}, ValueError, "seed must be"),
        ({"frames": 0}, ValueError, "frames must be at least 1"),
        ({"height": True}, TypeError, "height must be an integer, got True"),
        ({"width": "8"}, TypeError, "width must be an integer, got '8'"),
        ({"shapes": -1}, ValueError, "shapes must be at least 0"),
        ({"materials": 0}, ValueError, "materials must be at least 1"),
        ({"speed": -1.0}, ValueError, "speed must be a number >= 0"),
        ({"speed": float("nan")}, ValueError, "speed must be a number >= 0"),
    ],
)
def test_wrong_settings_are_named(setting, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        moving_shapes(**setting)
