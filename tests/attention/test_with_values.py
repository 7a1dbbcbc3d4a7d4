"""Methods whose choice looks at values: they get those of the call, whoever makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import tilewise
from tests.conformance.common import qkv
from tilewise.attention import (
    PISA,
    SVG2,
    SVGEAR,
    Layout,
    MeanPool,
    Method,
    MoBA,
    MomentPool,
    Own,
    Plan,
    Skip,
    Tiles,
    TopK,
    attend,
    plan,
)
from tilewise.attention.flash_block import Every, FlashBlock
from tilewise.models import load_model
from tilewise.models.video import VideoConfig, VideoModel
from tilewise.tune import Sample, measure

CLUSTERS = SVG2(5, 7, threshold=0.2, least=0.1, tile=(16, 16), iterations=3)
SEEING = {
    "pisa": PISA(0.3, tile=16, aware=True),
    "svg-ear": SVGEAR(CLUSTERS),
    "tiles": Tiles(MomentPool(), TopK(2), (16, 16), always=(Own(),)),
}
each = pytest.mark.parametrize("method", SEEING.values(), ids=SEEING)


def chosen(made: Plan) -> Tensor:
    """The tiles that a plan computes exactly."""
    tiles = made.tile_maps[0]
    assert tiles is not None
    return tiles.keep


@each
def test_attend_plans_with_the_values_of_the_call(method):
    """The answer is that of the plan made with these values. Control: other values choose and answer otherwise."""
    q, k, v = qkv(1, 4, 2, 130)
    other = v.roll(16, 2) * torch.linspace(0.1, 4, 130).view(-1, 1)
    mine, theirs = (plan(method, q, k, v=x) for x in (v, other))
    assert torch.equal(attend(q, k, v, method), attend(q, k, v, mine))
    assert not torch.equal(chosen(mine), chosen(theirs))
    assert not torch.equal(attend(q, k, v, method), attend(q, k, v, theirs))


@each
def test_without_values_there_is_no_plan(method):
    q, k, v = qkv(1, 4, 2, 130)
    with pytest.raises(ValueError, match=r"looks at values: plan\(..., v=v\)"):
        plan(method, q, k)
    with pytest.raises(ValueError, match=r"k and v must be \[1, H_kv, N_k, \*\] alike"):
        plan(method, q, k, v=v[:, :, 1:])
    for blind in (MoBA(16, 2), PISA(), Tiles(MeanPool(), TopK(2))):
        assert blind.with_values(v) is blind


@each
def test_a_call_leaves_no_values_behind(method):
    """The method itself is as it was: it may serve the next layer."""
    q, k, v = qkv(1, 4, 2, 130)
    attend(q, k, v, method)
    with pytest.raises(ValueError, match="looks at values"):
        plan(method, q, k)


def test_a_patched_model_gives_each_layer_its_own_values():
    """Plans that an observer sees are those of the layer's values. Control: not those of another layer's."""
    model, _ = load_model()
    tokens = torch.tensor([list(b"A choice that looks at values, layer by layer. " * 8)])
    method, events = PISA(0.3, tile=32, aware=True), []
    with tilewise.patch(model, method, observer=events.append), torch.no_grad():
        watched = model(tokens).logits
    with tilewise.patch(model, method), torch.no_grad():
        assert torch.equal(model(tokens).logits, watched)
    assert len(events) == 6
    differ = 0
    for event, after in zip(events, [*events[1:], events[0]]):
        again, wrong = (
            plan(method, event.q, event.k, mask=event.mask, scale=event.scale, v=v)
            for v in (event.v, after.v)
        )
        assert torch.equal(chosen(event.plan), chosen(again))
        differ += not torch.equal(chosen(event.plan), chosen(wrong))
    assert differ >= 4


def test_a_video_model_and_its_observer():
    model = VideoModel(VideoConfig(width=32, layers=1, heads=2))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0), std=0.3)
    x, events = torch.randn(1, 2, 16, 16, 3, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        seen = model(x, 0.5, SEEING["svg-ear"], observer=events.append)
        assert torch.equal(seen, model(x, 0.5, SEEING["svg-ear"]))
    (event,) = events
    assert torch.equal(chosen(event.plan), chosen(plan(SEEING["svg-ear"], event.q, event.k, v=event.v)))


def test_measuring_gives_values():
    found = measure(SEEING["pisa"], Sample.of(*qkv(1, 2, 2, 130, dtype=torch.float32)))
    assert 0 < found.error < 1


@dataclass(frozen=True)
class LargeValues(MeanPool):
    """A score that looks at nothing but values."""

    values: Tensor | None = None

    def with_values(self, v: Tensor) -> LargeValues:
        return replace(self, values=v)

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        size = layout.k_tiling.split(self.values, 0).square().sum((3, 4)).float()
        return size.unsqueeze(2).expand(-1, -1, layout.q_tiling.count(layout.q.shape[2]), -1)


def test_the_sparse_part_of_a_cached_block_sees_the_values_outside():
    q, k, v = qkv(1, 2, 2, 32)
    k_out, v_out = qkv(1, 2, 2, 128, seed=1)[1:]
    v_out[:, :, 48:64] *= 10
    sparse: Method = Tiles(LargeValues(), TopK(1), (16, 16), rest=Skip())
    step = FlashBlock(Every(10), sparse).attend(q, k, v, (k_out, v_out))
    assert step.state.chosen is not None
    assert torch.equal(step.state.chosen.keep, (torch.arange(8) == 3).expand(1, 2, 2, 8))
