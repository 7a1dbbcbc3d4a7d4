"""Street scenes: equal for equal seeds, things apart, vehicles as the signal has it."""

from __future__ import annotations

import pytest
import torch

from tilewise.data.scenes import (
    ARMS,
    CLASSES,
    CLUTTER,
    ECHO,
    GOES,
    GROUND,
    HEIGHT,
    LOWERED,
    RAISED,
    WAITS,
    street_scenes,
)


def test_seed_decides_everything():
    one, again, other = street_scenes(2, 7), street_scenes(2, 7), street_scenes(2, 9)
    assert torch.equal(one.points, again.points) and torch.equal(one.label, again.label)
    assert one.points.shape != other.points.shape or not torch.equal(one.points, other.points)


def test_a_scene_is_the_same_alone_and_among_others():
    many = street_scenes(3, 20)
    start = 0
    for number in range(3):
        alone = street_scenes(1, 20 + number)
        mine = many.sample == number
        assert torch.equal(many.points[mine], alone.points) and torch.equal(many.label[mine], alone.label)
        shifted = torch.where(alone.vehicle >= 0, alone.vehicle + start, -1)
        assert torch.equal(many.vehicle[mine], shifted)
        start += len(alone.boxes)


def test_points_lie_where_they_belong():
    scenes = street_scenes(6, 3)
    points, echo, label = scenes.points[:, :3], scenes.points[:, 3], scenes.label
    assert (echo - torch.tensor(ECHO)[label]).abs().max() < 0.3
    assert points.min() >= 0 and points[:, :2].max() < 32 and points[:, 2].max() < HEIGHT
    assert label.unique().tolist() == list(range(len(CLASSES)))
    assert points[label == GROUND][:, 2].max() <= 0.1
    of = scenes.vehicle >= 0
    assert torch.equal(of, (label == WAITS) | (label == GOES))
    box = scenes.boxes[scenes.vehicle[of]]
    half = torch.where(box[:, 4:] == 1, box[:, [3, 2]], box[:, [2, 3]]) / 2
    assert ((points[of][:, :2] - box[:, :2]).abs() <= half + 1e-4).all()
    signal = (label == LOWERED) | (label == RAISED)
    away = (points[signal][:, :2] - scenes.signals[scenes.sample[signal]]).abs()
    assert away.max() <= 1.6
    assert (label == CLUTTER).any()


def test_vehicles_go_where_the_arm_is_raised():
    scenes = street_scenes(12, 0)
    seen = set()
    for number in range(12):
        mine = scenes.sample == number
        signal = mine & ((scenes.label == LOWERED) | (scenes.label == RAISED))
        points = scenes.points[signal]
        arm = points[(points[:, :2] - scenes.signals[number]).norm(dim=1) > 0.3]
        raised = bool(arm[:, 2].mean() > 2.5)
        assert arm[:, 2].min() >= ARMS[raised] - 1e-6 and arm[:, 2].max() <= ARMS[raised] + 0.3 + 1e-6
        assert (scenes.label[signal] == (RAISED if raised else LOWERED)).all()
        vehicles = mine & (scenes.vehicle >= 0)
        assert vehicles.any() and (scenes.label[vehicles] == (GOES if raised else WAITS)).all()
        seen.add(raised)
    assert seen == {True, False}


def test_middles_are_not_told_by_a_near_end_alone():
    """Lengths vary, so the distance from an end to the middle does."""
    boxes = street_scenes(20, 0).boxes
    assert boxes[:, 2].min() < 5 and boxes[:, 2].max() > 8.5


@pytest.mark.parametrize(
    "setting", [{"count": 0}, {"vehicles": 0}, {"clutter": 0}, {"ground": 0}, {"extent": 12}]
)
def test_smallest_settings(setting):
    scenes = street_scenes(**setting)
    assert torch.isfinite(scenes.points).all() and len(scenes.points) == len(scenes.label) == len(
        scenes.vehicle
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="count must be at least 0 and at most"):
        street_scenes(-1)
    with pytest.raises(TypeError, match="seed must be an integer, got 1.5"):
        street_scenes(1, 1.5)
    with pytest.raises(ValueError, match="extent must be >= 12"):
        street_scenes(1, extent=5)
