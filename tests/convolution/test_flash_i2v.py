"""FlashI2V: the shifted flow, high-frequency magnitudes, and what both do to small trained models."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from tests.convolution import photographs as p
from tests.convolution.image_models import size, trained
from tests.convolution.moving import FRAMES, SIDE, clips, grain, panned
from tilewise.convolution import FlashI2V, flow_loss, flow_sample, high_frequencies


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_high_frequencies_are_the_fastest_rings():
    x = draw(2, 7, 6, 3)
    torch.testing.assert_close(high_frequencies(x, 0, magnitude=False), x)
    assert high_frequencies(x, 1).abs().max() < 1e-12
    assert high_frequencies(x, 0.3).equal(high_frequencies(x, 0.3, magnitude=False).abs())
    # By loops: rings in order, dropped while those before hold less than the share.
    spectrum = torch.fft.fft2(x, dim=(1, 2))
    down, right = ([min(k, n - k) for k in range(n)] for n in (7, 6))
    radius = torch.tensor([[(i * i + j * j) ** 0.5 for j in right] for i in down])
    for share in (0.2, 0.5, 0.9):
        for sample in range(2):
            size_ = spectrum[sample].abs().mean(2)
            kept, held = spectrum[sample].clone(), 0.0
            for r in radius.unique().tolist():
                ring = radius == r
                if held < share * size_.sum():
                    kept[ring] = 0
                held += size_[ring].sum()
            want = torch.fft.ifft2(kept, dim=(0, 1))
            assert want.imag.abs().max() < 1e-12
            torch.testing.assert_close(high_frequencies(x, share, magnitude=False)[sample], want.real)
    each = high_frequencies(x, torch.tensor([0.2, 0.9]))
    assert each[0].equal(high_frequencies(x, 0.2)[0]) and each[1].equal(high_frequencies(x, 0.9)[1])


def test_magnitudes_do_not_tell_colour():
    x = p.held_out(16, 4).permute(0, 2, 3, 1)
    darker = x - torch.tensor([0.1, 0.2, -0.3])
    torch.testing.assert_close(
        high_frequencies(x, 0.0 + 1e-6), high_frequencies(darker, 1e-6), atol=1e-5, rtol=1e-4
    )


class Linear(torch.nn.Module):
    """A denoiser that shows what it was given."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen, self.t = x, t
        return x[..., :3] * t.view(-1, 1, 1, 1, 1)


@pytest.mark.evidence
def test_both_ends_are_shifted_and_the_velocity_is_not():
    clip, noise, t = draw(2, 4, 6, 6, 3), draw(2, 4, 6, 6, 3, seed=1), torch.tensor([0.25, 0.5]).double()
    model = FlashI2V(Linear()).double()
    with torch.no_grad():
        model.project.weight.normal_()
    shift = model.project(clip[:, 0].movedim(3, 1)).movedim(1, 3)[:, None]
    loss = model.loss(clip, noise, t, 0.3)
    at = t.view(-1, 1, 1, 1, 1)
    moved = at * (clip - shift) + (1 - at) * (noise - shift)  # the flow between the shifted ends
    torch.testing.assert_close(model.denoiser.seen[..., :3], moved)
    torch.testing.assert_close(model.denoiser.seen[:, 2, :, :, 3:], high_frequencies(clip[:, 0], 0.3))
    target = (clip - shift) - (noise - shift)
    torch.testing.assert_close(loss, (moved * at - target).square().mean())
    assert model.denoiser.t.equal(t)


def test_a_share_is_drawn_for_every_clip_in_training_and_can_be_given_afterwards():
    clip, noise, t = draw(8, 2, 6, 6, 3), draw(8, 2, 6, 6, 3, seed=1), torch.rand(8).double()
    model = FlashI2V(Linear(), drawn=(0.2, 0.6)).double()
    torch.manual_seed(0)
    model.loss(clip, noise, t)
    torch.manual_seed(0)
    shares = 0.2 + 0.4 * torch.rand(8)
    assert model.denoiser.seen[:, 1, :, :, 3:].equal(high_frequencies(clip[:, 0], shares))
    model.sample(clip[:, 0], noise, 1)
    assert model.denoiser.seen[:, 0, :, :, 3:].equal(high_frequencies(clip[:, 0], model.low))
    model.sample(clip[:, 0], noise, 1, low=0.8)
    assert model.denoiser.seen[:, 0, :, :, 3:].equal(high_frequencies(clip[:, 0], 0.8))


def test_it_starts_with_the_image_itself_as_shift():
    model, x, image = FlashI2V(Linear(), guide=False).double(), draw(1, 2, 5, 5, 3), draw(1, 5, 5, 3, seed=1)
    model(x, 0.5, image)
    torch.testing.assert_close(model.denoiser.seen, x - image[:, None])
    bare = FlashI2V(Linear(), shift=False, guide=False)
    bare(x, 0.5, image)
    assert bare.denoiser.seen.equal(x)


def test_sampling_follows_the_velocity():
    noise, target = draw(2, 3, 4, 4, 3), draw(2, 3, 4, 4, 3, seed=1)
    made = flow_sample(lambda x, t: (target - x) / (1 - t.view(-1, 1, 1, 1, 1)), noise, 7)
    torch.testing.assert_close(made, target)
    loss = flow_loss(lambda x, t: target - noise, target, noise, torch.tensor([0.1, 0.9]).double())
    assert loss < 1e-20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: high_frequencies(torch.ones(4, 4, 1), 1.5), "low must be a share from 0 to 1, got 1.5"),
        (lambda: high_frequencies(torch.ones(4, 4)), r"image must be \[..., H, W, C\], got shape \[4, 4\]"),
        (lambda: high_frequencies(torch.ones(2, 4, 4, 1), torch.ones(3)), r"low must be a number or \[2\]"),
        (lambda: FlashI2V(Linear(), low=-1), "low must be a share"),
        (lambda: FlashI2V(Linear(), drawn=(0.5, 0.1)), r"drawn must be two shares .* got \(0.5, 0.1\)"),
        (lambda: FlashI2V(Linear(), 0), "channels must be an integer >= 1, got 0"),
        (
            lambda: FlashI2V(Linear())(torch.ones(1, 2, 4, 4, 2), 0.5, torch.ones(1, 4, 4, 3)),
            r"x must be \[B, T, H, W, 3\]",
        ),
        (
            lambda: FlashI2V(Linear())(torch.ones(1, 2, 4, 4, 3), 0.5, torch.ones(1, 4, 5, 3)),
            r"image must be \[1, 4, 4, 3\], got \[1, 4, 5, 3\]",
        ),
        (lambda: flow_sample(lambda x, t: x, torch.ones(1), 0), "steps must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_clips_move():
    for made in (clips(2, 1), panned(2, 1), grain(2, 1)):
        assert made.shape == (2, FRAMES, SIDE, SIDE, 3) and made.abs().max() <= 1.6
        assert (made.diff(dim=1).abs().mean((1, 2, 3, 4)) > 1e-4).all()


def test_grain_cannot_be_told_from_its_ground_by_means():
    """Low frequencies of a clip of grain are those of its plain ground, but for what chance leaves."""
    clip = grain(64, 1)
    fine = clip - clip.mean((1, 2, 3), keepdim=True)
    coarse = torch.nn.functional.avg_pool2d(fine[:, 0].movedim(3, 1), 4)
    assert fine.square().mean() > 0.05 and coarse.square().mean() < 0.2 * fine.square().mean()


Clips = Callable[[int, int], Tensor]


@lru_cache
@torch.no_grad()
def error(name: str, make: Clips) -> float:
    """Of the velocity over all times, on clips not trained on."""
    model, total = trained(name), 0.0
    for seed in range(4):
        clip = make(64, seed)
        gen = torch.Generator().manual_seed(seed)
        noise, t = torch.randn(clip.shape, generator=gen), (torch.arange(64) + 0.5) / 64
        total += flow_loss(lambda x, at, image=clip[:, 0]: model(x, at, image), clip, noise, t).item() / 4
    return total


@torch.no_grad()
def generated(name: str, make: Clips, low: float | None = None) -> tuple[Tensor, Tensor]:
    """What a model makes of first frames of clips, and the clips."""
    model, clip = trained(name), make(64, 9)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(9))
    given = () if low is None else (low,)
    return flow_sample(lambda x, t: model(x, t, clip[:, 0], *given), noise, 12), clip


@pytest.mark.evidence
def test_it_errs_less_on_photographs_though_it_errs_more_where_it_was_trained():
    """Trained on 96 clips of moving shapes. Control: the image beside every frame, with as many parameters."""
    assert size("video-shifted") <= 1.002 * size("video-beside")
    at_home, outside = (
        error("video-shifted", make) / error("video-beside", make) for make in (clips, panned)
    )
    assert outside < 0.97, outside
    assert outside < 0.85 * at_home, (at_home, outside)


@pytest.mark.evidence
def test_clips_of_photographs_begin_with_the_photograph():
    """The image is seen through the shift alone (and sizes of its detail), and is kept better than by a model that
    has it beside every frame. Control of the measure: of another image nothing is left."""
    first = {}
    for name in ("video-shifted", "video-beside"):
        made, clip = generated(name, panned)
        first[name] = (made[:, 0] - clip[:, 0]).square().mean().item()
        assert (made[:, 0] - clip[:, 0].roll(1, 0)).square().mean().item() > 10 * first[name]
    assert first["video-shifted"] < 0.7 * first["video-beside"], first


@pytest.mark.evidence
def test_magnitudes_of_high_frequencies_make_it_learn_faster():
    """Grain that noise hides, after 300 steps. Control: zeros in their place, with as many parameters."""
    assert size("grain-guided") == size("grain-unguided")
    guided, unguided = (error(name, grain) for name in ("grain-guided", "grain-unguided"))
    assert guided < 0.97 * unguided, (guided, unguided)


@pytest.mark.evidence
def test_the_share_left_out_sets_how_much_detail_there_is():
    """Fine detail of generated clips over that of true ones. Control: without the guide no share changes it."""
    detail = []
    for low in (0.05, 0.5, 0.95):
        fine, true = (
            high_frequencies(x, 0.3).square().mean().item() for x in generated("grain-guided", grain, low)
        )
        detail.append(fine / true)
    assert detail[0] > 1.1 * detail[1] > 1.21 * detail[2], detail
    one, other = (generated("grain-unguided", grain, low)[0] for low in (0.05, 0.95))
    assert one.equal(other)
