"""FlashI2V: the shifted flow and high-frequency magnitudes. What they do to a trained model is not shown."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.convolution import photographs as p
from tests.convolution.moving import FRAMES, SIDE, clips, panned
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


def test_both_ends_are_shifted_and_the_velocity_is_not():
    clip, noise, t = draw(2, 4, 6, 6, 3), draw(2, 4, 6, 6, 3, seed=1), torch.tensor([0.25, 0.5]).double()
    model = FlashI2V(Linear()).double()
    with torch.no_grad():
        model.project.weight.normal_()
    shift = model.project(clip[:, 0].movedim(3, 1)).movedim(1, 3)[:, None]
    loss = model.loss(clip, noise, t)
    at = t.view(-1, 1, 1, 1, 1)
    moved = at * (clip - shift) + (1 - at) * (noise - shift)  # the flow between the shifted ends
    torch.testing.assert_close(model.denoiser.seen[..., :3], moved)
    torch.testing.assert_close(model.denoiser.seen[:, 2, :, :, 3:], high_frequencies(clip[:, 0]))
    target = (clip - shift) - (noise - shift)
    torch.testing.assert_close(loss, (moved * at - target).square().mean())
    assert model.denoiser.t.equal(t)


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
        (lambda: FlashI2V(Linear(), low=-1), "low must be a share"),
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
    for made in (clips(2, 1), panned(2, 1)):
        assert made.shape == (2, FRAMES, SIDE, SIDE, 3) and made.abs().max() <= 1.05
        assert (made.diff(dim=1).abs().mean((1, 2, 3, 4)) > 1e-4).all()
