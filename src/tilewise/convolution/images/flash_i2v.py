"""FlashI2V: a flow from noise to video that never sees the image it starts from, only what is missing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from tilewise.recurrence.mixer import check_width

Velocity = Callable[[Tensor, Tensor], Tensor]


def high_frequencies(image: Tensor, low: Tensor | float = 0.5, magnitude: bool = True) -> Tensor:
    """What remains of images without their low frequencies.

    Frequencies are dropped from the slowest on, whole rings at a time, while those before them hold less than a
    share `low` of the sum of magnitudes (mean over channels), for every image by itself.

    Args: image: `[..., H, W, C]`, float32 or float64. low: from 0, which drops nothing, to 1; a number, or one for
    each image, `[...]`. magnitude: give the absolute value, as the paper's features, rather than the signed
    picture.

    Returns the shape and dtype of `image`. Raises ValueError for a share outside of these and images without
    pixels.
    """
    if image.ndim < 3 or not image.shape[-2] * image.shape[-3]:
        raise ValueError(f"image must be [..., H, W, C], got shape {list(image.shape)}")
    low = _shares(low, image.shape[:-3], image)
    height, width = image.shape[-3:-1]
    spectrum = torch.fft.fft2(image, dim=(-3, -2))
    down, right = (torch.arange(n, device=image.device) for n in (height, width))
    down, right = (torch.minimum(k, len(k) - k).square() for k in (down, right))
    radius = (down.unsqueeze(1) + right).flatten()  # squared, [h * w]
    rings, ring = radius.unique(return_inverse=True)
    sizes = spectrum.abs().mean(-1).flatten(-2)  # [..., h * w]
    held = sizes.new_zeros(*sizes.shape[:-1], len(rings)).index_add(-1, ring, sizes)
    before = held.cumsum(-1) - held
    dropped = (before < low.unsqueeze(-1) * held.sum(-1, keepdim=True))[..., ring]
    kept = spectrum.masked_fill(dropped.unflatten(-1, (height, width)).unsqueeze(-1), 0)
    made = torch.fft.ifft2(kept, dim=(-3, -2)).real
    return made.abs() if magnitude else made


def _shares(low: Tensor | float, shape: torch.Size, like: Tensor) -> Tensor:
    """`low` for images of a leading shape; ValueError outside of 0 to 1 and for another shape."""
    made = torch.as_tensor(low, dtype=like.dtype, device=like.device)
    if made.ndim and made.shape != shape:
        raise ValueError(f"low must be a number or {list(shape)}, one for each image, got {list(made.shape)}")
    if not ((made >= 0) & (made <= 1)).all():
        raise ValueError(f"low must be a share from 0 to 1, got {low!r}")
    return made.expand(shape)


class FlashI2V(nn.Module):
    """Image to video with an implicit condition (Ge et al., 2025, arXiv 2509.25187).

    Models that get the image beside the noisy clip learn to copy it. Here both ends of the flow are shifted by a
    learned projection of the image, so what the denoiser sees is `x_t - project(image)` and the velocity it owes
    is as before; beside it stand only the image's high-frequency magnitudes, which tell detail but no colour. In
    training their lower bound is drawn anew for every clip, so that afterwards it sets how much detail there is.

    Time runs from noise (0) to clip (1), `x_t = t clip + (1 - t) noise`, as in `tilewise.models.video`.

    Args:
        denoiser: `f(x [B, T, H, W, 2 * channels], t [B])`, or `[..., channels]` without `guide`, to a velocity
            `[B, T, H, W, channels]`.
        channels: of clips. low: as of `high_frequencies`, where none is given. drawn: least and largest share
            that `loss` draws. shift, guide: False leaves that part out; without both the image is not seen.

    Differs from the paper's code: time runs the other way, clips are pixels where it has latents of a
    variational autoencoder, and the projection is a 3 x 3 convolution that starts as the identity.
    """

    def __init__(
        self,
        denoiser: Velocity,
        channels: int = 3,
        *,
        low: float = 0.1,
        drawn: tuple[float, float] = (0.05, 0.95),
        shift: bool = True,
        guide: bool = True,
    ) -> None:
        super().__init__()
        check_width(channels, 1, "channels")
        high_frequencies(torch.zeros(1, 1, 1), low)  # refuses other shares
        if not 0 <= drawn[0] <= drawn[1] <= 1:
            raise ValueError(f"drawn must be two shares that rise from 0 to 1, got {drawn!r}")
        self.denoiser, self.channels, self.low, self.drawn, self.guide = denoiser, channels, low, drawn, guide
        self.project = (
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate") if shift else None
        )
        if self.project is not None:
            nn.init.dirac_(self.project.weight)
            nn.init.zeros_(cast(Tensor, self.project.bias))

    def forward(
        self, x: Tensor, t: Tensor | float, image: Tensor, low: Tensor | float | None = None
    ) -> Tensor:
        """The velocity at `x [B, T, H, W, channels]`, not shifted, and time `t`, a number or `[B]`, of clips that
        start with `image [B, H, W, channels]`, whose frequencies above the share `low` (or `[B]`) are shown."""
        if x.ndim != 5 or x.shape[4] != self.channels:
            raise ValueError(f"x must be [B, T, H, W, {self.channels}], got shape {list(x.shape)}")
        if image.shape != (x.shape[0], *x.shape[2:]):
            raise ValueError(f"image must be {[x.shape[0], *x.shape[2:]]}, got {list(image.shape)}")
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])
        seen = [x if self.project is None else x - self._shift(image)]
        if self.guide:
            shown = high_frequencies(image, self.low if low is None else low)
            seen.append(shown.unsqueeze(1).expand_as(x))
        return self.denoiser(torch.cat(seen, 4), t)

    def _shift(self, image: Tensor) -> Tensor:
        """Of every frame, `[B, 1, H, W, channels]`."""
        return self.project(image.movedim(3, 1)).movedim(1, 3).unsqueeze(1)  # type: ignore[misc]

    def loss(self, clip: Tensor, noise: Tensor, t: Tensor, low: Tensor | float | None = None) -> Tensor:
        """Mean squared error of the velocity at times `t [B]` of a clip `[B, T, H, W, channels]`, whose first frame
        is the image, and noise of its shape. Without `low` a share is drawn for each clip."""
        if low is None:
            least, most = self.drawn
            low = least + (most - least) * torch.rand(len(clip), device=clip.device)
        return flow_loss(lambda x, at: self(x, at, clip[:, 0], low), clip, noise, t)

    @torch.no_grad()
    def sample(self, image: Tensor, noise: Tensor, steps: int = 16, low: float | None = None) -> Tensor:
        """A clip that starts with `image`, made of `noise [B, T, H, W, channels]` by equal Euler steps. The less
        is left out (`low`), the more detail of the image it is told."""
        return flow_sample(lambda x, at: self(x, at, image, low), noise, steps)


def flow_loss(velocity: Velocity, clip: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of a velocity on the straight line from noise to clip, at times `t [B]`."""
    at = t.view(-1, 1, 1, 1, 1)
    return (velocity(at * clip + (1 - at) * noise, t) - (clip - noise)).square().mean()


def flow_sample(velocity: Velocity, noise: Tensor, steps: int = 16) -> Tensor:
    """What `noise` becomes in `steps` equal Euler steps from time 0 to 1; ValueError for none."""
    check_width(steps, 1, "steps")
    x = noise
    for step in range(steps):
        x = x + velocity(x, x.new_full((len(x),), step / steps)) / steps
    return x
