"""LiT: few heads, a convolution, inherited weights, and distillation of noise and variance."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.recurrence import pictures as p
from tests.recurrence.vision_models import WIDTH, denoiser
from tilewise.recurrence import LiT, Pair, distil, hybrid_loss

STEPS = 140


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_layer_is_its_formula():
    torch.manual_seed(0)
    layer, x = LiT(8, 2, conv=3).double(), draw(2, 12, 8)
    q, k, v = (made(x).unflatten(2, (2, 4)).transpose(1, 2) for made in (layer.query, layer.key, layer.value))
    scores = F.relu(q) @ F.relu(k).mT
    read = scores / 12 / (scores.mean(3, keepdim=True) + 1e-6) @ v
    near = layer.conv.conv(layer.value(x).mT.unflatten(2, (3, 4))).flatten(2).mT
    torch.testing.assert_close(layer(x, (3, 4)), layer.out(read.transpose(1, 2).flatten(2) + near))


def test_the_loss_is_its_formula():
    told, found = draw(2, 3, 4, seed=1), draw(2, 3, 4, seed=2)
    loss = hybrid_loss(lambda out, batch: out.sum() * batch, noise=0.3, variance=0.2)(
        {"": Pair(told, found)}, 7.0
    )
    distance = (told - found).square()
    want = 7 * found.sum() + 0.3 * distance[..., :2].mean() + 0.2 * distance[..., 2:].mean()
    torch.testing.assert_close(loss, want)
    alone = hybrid_loss(lambda out, batch: 0 * out.sum(), noise=0.3, variance=None)(
        {"": Pair(told, found)}, None
    )
    torch.testing.assert_close(alone, 0.3 * distance.mean())
    with pytest.raises(ValueError, match=r"outputs must end in noise and variance, halves, got \[2, 3\]"):
        hybrid_loss(lambda out, batch: out.sum())({"": Pair(told[..., 0], found[..., 0])}, None)


@lru_cache
def teacher() -> nn.Module:
    return p.loaded(denoiser("teacher"), "teacher")


def student(heads: int = 2, inherits: bool = True) -> nn.Module:
    """The teacher with LiT in attention's place; all but attention inherited."""
    torch.manual_seed(0)
    made = denoiser("teacher", lambda: LiT(WIDTH, heads))
    if inherits:
        kept = {name: x for name, x in teacher().state_dict().items() if "mixer" not in name}
        missing, unexpected = made.load_state_dict(kept, strict=False)
        assert not unexpected and all("mixer" in name for name in missing)
    return made


@lru_cache
def distilled(
    heads: int = 2, inherits: bool = True, noise: float = 0.5, variance: float = 0.05
) -> tuple[float, float, float]:
    """After STEPS steps, on fresh pictures: distances from the teacher's noise and log variance, and noise
    error."""
    made = student(heads, inherits)
    batches = [p.noisy(32, (1 << 20) + i) for i in range(STEPS)]
    loss = hybrid_loss(p.hybrid_error, noise, variance)
    distil(teacher(), made, batches, loss, inputs=lambda batch: batch[:2], rate=3e-3)
    return measured(made)


@torch.no_grad()
def measured(made: nn.Module) -> tuple[float, float, float]:
    made.eval()
    rows = []
    for seed in range(1, 5):
        batch = p.noisy(250, seed)
        told, found = (model(batch[0], batch[1]) for model in (teacher(), made))
        noise = (told - found)[..., 0].square().mean()
        variance = (p.log_variance(told, batch[1]) - p.log_variance(found, batch[1])).square().mean()
        rows.append(torch.stack((noise, variance, p.noise_error(found, batch))))
    return tuple(torch.stack(rows).mean(0).tolist())


@pytest.mark.evidence
def test_inheriting_and_distilling_bring_a_student_near_its_teacher():
    """A linear student of a softmax diffusion transformer with learned variances, 140 steps each, distance
    from the teacher's noise on fresh pictures. Controls: nothing inherited, and the student before any
    step."""
    full, fresh = distilled(), measured(student())
    nothing = distilled(inherits=False)
    assert full[0] < 0.2 * fresh[0], (full, fresh)
    assert full[0] < 0.5 * nothing[0] and full[2] < 0.9 * nothing[2], (full, nothing)


@pytest.mark.evidence
def test_the_hybrid_loss_teaches_the_variance():
    """Distance from the teacher's log variance: with the variance's term it is smaller than with the noise's
    alone and than without a teacher, all else alike."""
    full, noise_only, alone = distilled(), distilled(variance=0.0), distilled(noise=0.0, variance=0.0)
    assert full[1] < 0.5 * min(noise_only[1], alone[1]), (full, noise_only, alone)


@pytest.mark.evidence
def test_few_heads_are_better_than_many():
    """As many parameters either way, two heads against sixteen, distilled alike."""
    few, many = distilled(), distilled(heads=16)
    sizes = {sum(x.numel() for x in student(heads).parameters()) for heads in (2, 16)}
    assert len(sizes) == 1
    assert few[0] < 0.9 * many[0] and few[2] < many[2], (few, many)
