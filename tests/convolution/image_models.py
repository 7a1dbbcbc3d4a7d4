"""The small models that training/train_images.py trains, by the names of their weights, and their losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.convolution import blocks, blurs
from tests.convolution import photographs as p
from tests.convolution.moving import clips, grain
from tilewise.convolution import (
    HCFSS,
    VONSS,
    DeepRFT,
    FlashI2V,
    WaLLoC,
    deblur_loss,
    flow_loss,
    rate_distortion,
)
from tilewise.convolution.images.vonss import DIRECTIONS

RATE = 0.01  # the weight of the squared error in a codec's loss


@dataclass(frozen=True)
class Training:
    """How a model is made and trained: `loss(model, seed)` on the crops of a seed."""

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]
    steps: int
    rate: float = 2e-3


def walloc_loss(codec: nn.Module, seed: int) -> Tensor:
    x = p.crops(16, 96, seed)
    return F.mse_loss(codec(x), x)


def codec_loss(codec: nn.Module, seed: int) -> Tensor:
    x = p.crops(8, 64, seed)
    return rate_distortion(codec(x), x, RATE)


class NearOnly(nn.Module):
    """Convolutions in the place of a `VFSS`, with as many parameters: `[B, H, W, width]` to its shape."""

    def __init__(self, width: int, hidden: int, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, width, 3, padding=1)
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(3, 1)
        for block in self.blocks:
            x = x + block(x)
        return x.movedim(1, 3)


class SpatialHead(nn.Module):
    """Residual convolutions in the place of a kernel estimator, with as many parameters."""

    def __init__(self, width: int, out: int, hidden: int, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = NearOnly(width, hidden, blocks)
        self.out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(x.movedim(1, 3)).movedim(3, 1))


def deblurring_loss(reblur: float = 0.3) -> Callable[[nn.Module, int], Tensor]:
    def loss(model: nn.Module, seed: int) -> Tensor:
        sharp = blurs.crops(4, 64, seed)
        seen = blurs.blurred(sharp, blurs.lines(len(sharp), seed)[0], seed)
        return deblur_loss(model(seen), sharp, seen, reblur, margin=0)

    return loss


class Denoiser(nn.Module):
    """A velocity by convolutions in space and in time, in turn, on patches of 2 x 2 pixels."""

    def __init__(self, seen: int, channels: int = 3, width: int = 36, blocks: int = 4) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Conv2d(4 * seen, width, 1), nn.Conv2d(width, 4 * channels, 1)
        self.space = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.time = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(blocks))
        self.clock = nn.Linear(32, blocks * 2 * width)
        nn.init.zeros_(self.unembed.weight)
        nn.init.zeros_(self.unembed.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        count, frames = x.shape[:2]
        angles = t.unsqueeze(1) * (2 * math.pi * 2 ** torch.linspace(-2, 3, 16))
        clock = self.clock(torch.cat((angles.sin(), angles.cos()), 1)).unflatten(1, (len(self.space), 2, -1))
        hidden = self.embed(F.pixel_unshuffle(x.flatten(0, 1).movedim(3, 1), 2))  # [b * t, c, h, w]
        for number, (space, time) in enumerate(zip(self.space, self.time)):
            scale, shift = clock[:, number].repeat_interleave(frames, 0)[..., None, None].unbind(1)
            normal = F.group_norm(hidden, 1) * (1 + scale) + shift
            near = F.gelu(space(normal)).unflatten(0, (count, frames))  # [b, t, c, h, w]
            rows = near.permute(0, 3, 4, 2, 1)  # [b, h, w, c, t]
            made = time(rows.flatten(0, 2)).unflatten(0, rows.shape[:3]).permute(0, 4, 3, 1, 2)
            hidden = hidden + made.flatten(0, 1)
        return F.pixel_shuffle(self.unembed(hidden), 2).movedim(1, 3).unflatten(0, (count, frames))


class Concatenated(nn.Module):
    """The usual way from an image to a video: the denoiser gets the image beside every frame. The control."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser(6)

    def forward(self, x: Tensor, t: Tensor | float, image: Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return self.denoiser(torch.cat((x, image.unsqueeze(1).expand_as(x)), 4), t)


class Unguided(nn.Module):
    """A denoiser that sees zeros in the place of high frequencies, so that it is as large."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser(6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.denoiser(torch.cat((x, torch.zeros_like(x)), 4), t)


@lru_cache
def few_shapes() -> Tensor:
    """All clips of moving shapes that some models see in training."""
    return clips(96, 1 << 22)


def shapes_loss(model: nn.Module, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return video_loss(model, few_shapes()[torch.randint(96, (24,), generator=gen)], seed)


def grain_loss(model: nn.Module, seed: int) -> Tensor:
    return video_loss(model, grain(24, seed), seed)


def video_loss(model: nn.Module, clip: Tensor, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    noise, t, share = torch.randn(clip.shape, generator=gen), *torch.rand(2, len(clip), generator=gen)
    if isinstance(model, FlashI2V):
        least, most = model.drawn
        return model.loss(clip, noise, t, least + (most - least) * share)
    return flow_loss(lambda x, at: model(x, at, clip[:, 0]), clip, noise, t)


def follower(*directions: str) -> Callable[[], nn.Module]:
    return lambda: blocks.Follower(VONSS(blocks.WIDTH, states=4, directions=directions))


TRAININGS = {
    "walloc": Training(WaLLoC, walloc_loss, 3000),
    "walloc-patches": Training(lambda: WaLLoC(transform="patches"), walloc_loss, 3000),
    "walloc-no-noise": Training(lambda: WaLLoC(noise=False), walloc_loss, 3000),
    "hcfss": Training(lambda: HCFSS(states=4), codec_loss, 1152),
    "hcfss-rows": Training(lambda: HCFSS(states=4, directions=("rows",) * 4), codec_loss, 1152),
    "hcfss-near": Training(lambda: HCFSS(far=lambda width: NearOnly(width, 20)), codec_loss, 1152),
    "lines": Training(follower(*DIRECTIONS), blocks.lines_loss, 600, 5e-3),
    "lines-rows": Training(follower(*("rows",) * 4), blocks.lines_loss, 600, 5e-3),
    "lines-cross": Training(follower(*("rows", "columns") * 2), blocks.lines_loss, 600, 5e-3),
    "lines-near": Training(lambda: blocks.Follower(NearOnly(blocks.WIDTH, 11)), blocks.lines_loss, 600, 5e-3),
    "bands": Training(blocks.weigher, blocks.bands_loss, 600, 1e-2),
    "bands-fixed": Training(lambda: blocks.weigher(adaptive=False), blocks.bands_loss, 600, 1e-2),
    "bands-others": Training(lambda: blocks.weigher(blocks.ByOthers), blocks.bands_loss, 600, 1e-2),
    "bands-place": Training(lambda: blocks.weigher(places=True), blocks.bands_loss, 600, 1e-2),
    "deblur": Training(lambda: DeepRFT(channels=1, keeps=True), deblurring_loss(), 1400, 6e-3),
    "deblur-free": Training(lambda: DeepRFT(channels=1, keeps=True), deblurring_loss(0.0), 1400, 6e-3),
    "deblur-spatial": Training(
        lambda: DeepRFT(channels=1, keeps=True, head=lambda width, out: SpatialHead(width, out, 22)),
        deblurring_loss(),
        1400,
        6e-3,
    ),
    "video-shifted": Training(lambda: FlashI2V(Denoiser(6)), shapes_loss, 900),
    "video-beside": Training(Concatenated, shapes_loss, 900),
    "grain-guided": Training(lambda: FlashI2V(Denoiser(6)), grain_loss, 300),
    "grain-unguided": Training(lambda: FlashI2V(Unguided(), guide=False), grain_loss, 300),
}


@lru_cache
def trained(name: str) -> nn.Module:
    """A model with its weights, ready to be tested."""
    torch.manual_seed(0)
    model = TRAININGS[name].make()
    model.load_state_dict(load_file(p.WEIGHTS / f"{name}.safetensors"))
    return model.eval()


def size(name: str) -> int:
    return sum(part.numel() for part in TRAININGS[name].make().parameters())
