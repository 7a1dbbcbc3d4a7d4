"""Video models whose blocks mix tokens otherwise: what is kept, and softmax attention put back by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tilewise.models.video import VideoConfig, VideoModel
from tilewise.models.video_layers import Block
from tilewise.models.video_mixers import projections, with_mixers
from tilewise.recurrence.vision import rotations, turn

SMALL = VideoConfig(width=32, layers=3, heads=2)


def model() -> VideoModel:
    torch.manual_seed(0)
    made = VideoModel(SMALL).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


class Softmax(nn.Module):
    """A block's own attention, put together again from its projections."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(projections(block))
        self.q_scale, self.k_scale = nn.Parameter(block.q_scale.clone()), nn.Parameter(block.k_scale.clone())

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        q, k, v = (
            self.layers[name](x).unflatten(2, (2, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        q, k = (
            turn(nn.functional.rms_norm(part, (16,), eps=1e-6) * scale, rotations(grid, 16))
            for part, scale in ((q, self.q_scale), (k, self.k_scale))
        )
        return self.layers["out"]((q @ k.mT / 4).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def test_attention_put_back_gives_what_the_model_gave():
    teacher, x = model(), torch.randn(2, 2, 8, 8, 3)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    student = with_mixers(teacher, Softmax)
    torch.testing.assert_close(student(x, 0.3), teacher(x, 0.3), rtol=1e-4, atol=1e-5)
    student(x, 0.3).square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())


def test_some_layers():
    teacher, x = model(), torch.randn(1, 1, 8, 8, 3)
    student = with_mixers(teacher, lambda block: Nothing(), layers=[1])
    assert student.blocks[0].mixer is None and isinstance(student.blocks[1].mixer, Nothing)
    assert student(x, 0.3).shape == x.shape and not torch.equal(student(x, 0.3), teacher(x, 0.3))
    assert set(teacher.state_dict()) - set(student.state_dict()) == {
        f"blocks.1.{name}"
        for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "q_scale", "k_scale")
    }


class Nothing(nn.Module):
    def forward(self, x: Tensor, grid) -> Tensor:
        return torch.zeros_like(x)


def test_what_is_refused():
    with pytest.raises(ValueError, match="attention names layer 3; the model has layers 0 to 2"):
        with_mixers(model(), Softmax, layers=[3])
    with pytest.raises(TypeError, match=r"make must give a torch.nn.Module, got NoneType"):
        with_mixers(model(), lambda block: None)
