"""Small pictures and a small transformer for them, with any mixer: what the evidence on vision layers is made
of.

A picture of 16 x 16 pixels shows one of ten glyphs twice, at two places, in one contrast, on a ground with a
slope. What it is can be told from neighbouring patches together, and what one copy hides the other shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence import VisionMixer
from tilewise.recurrence.mixer import from_heads

WEIGHTS = Path(__file__).parent / "weights"
SIDE, GLYPH, CLASSES, PATCH = 16, 5, 10, 2
GRID = (SIDE // PATCH, SIDE // PATCH)
GLYPHS = torch.randint(2, (CLASSES, GLYPH, GLYPH), generator=torch.Generator().manual_seed(6)) * 2.0 - 1
STEPS = 100  # of diffusion
BETAS = torch.linspace(1e-3, 0.2, STEPS)
KEPT = (1 - BETAS).cumprod(0)  # of the picture's power after each step
BEFORE = torch.cat((torch.ones(1), KEPT[:-1]))
POSTERIOR = BETAS * (1 - BEFORE) / (1 - KEPT)
SPREAD = torch.log(torch.stack((POSTERIOR.clamp(min=POSTERIOR[1]), BETAS)))  # least and largest log variance


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`[count, 16, 16, 1]`, about within [-1, 1], and which glyph each shows, int64 `[count]`."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=gen)
    slope = torch.rand(count, 3, 1, 1, generator=gen) - 0.5
    line = torch.linspace(-1, 1, SIDE)
    ground = 0.5 * (slope[:, 0] + slope[:, 1] * line + slope[:, 2] * line.unsqueeze(1))
    contrast = (0.5 + 0.5 * torch.rand(count, 1, 1, generator=gen)) * (
        torch.randint(2, (count, 1, 1), generator=gen) * 2 - 1
    )
    drawn = contrast * GLYPHS[labels]
    room = SIDE // 2 - GLYPH + 1
    places = (
        torch.randint(room, (count, 2), generator=gen),
        torch.randint(SIDE - GLYPH + 1, (count, 2), generator=gen),
    )
    rows, index = torch.arange(GLYPH), torch.arange(count).view(-1, 1, 1)
    for half in (0, 1):  # one copy in the upper half, one in the lower
        y = places[0][:, half].view(-1, 1, 1) + SIDE // 2 * half + rows.view(1, -1, 1)
        x = places[1][:, half].view(-1, 1, 1) + rows.view(1, 1, -1)
        ground[index, y, x] = drawn
    return ground.unsqueeze(3), labels


class Softmax(VisionMixer):
    """The attention that is to be replaced."""

    def forward(self, x: Tensor, grid=None, *, mask=None) -> Tensor:
        return self.out(from_heads(F.scaled_dot_product_attention(*self.parts(x))))


class Part(nn.Module):
    """Mixer and perceptron, each behind a norm; what is told of the time shifts and scales both (adaLN)."""

    def __init__(self, mixer: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        self.mixer, self.up, self.down = mixer, nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, told: Tensor | float) -> Tensor:
        a, b, c, d, e, f = (told + self.table).unsqueeze(-2).unbind(-3)
        x = x + (1 + c) * self.mixer(F.layer_norm(x, x.shape[-1:]) * (1 + b) + a, GRID)
        return x + (1 + f) * self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]) * (1 + e) + d)))


class Transformer(nn.Module):
    """A vision transformer, `forward(pixels, time=None)`: logits `[B, CLASSES]`, or of each pixel `channels`
    numbers.

    make: of the mixers. hidden: of the perceptrons. channels: None to classify.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        width: int = 32,
        layers: int = 2,
        hidden: int = 64,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.embed = nn.Linear(PATCH**2, width)
        self.blocks = nn.ModuleList(Part(make(), width, hidden) for _ in range(layers))
        self.clock = (
            nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 6 * width)) if channels else None
        )
        self.head = nn.Linear(width, PATCH**2 * channels if channels else CLASSES)
        rates = torch.exp(-torch.arange(width // 4) * (math.log(100.0) / (width // 4)))
        line = torch.arange(GRID[0]).unsqueeze(1) * rates
        line = torch.cat((line.sin(), line.cos()), 1)
        place = torch.cat(
            (line.repeat_interleave(GRID[1], 0), line.repeat(GRID[0], 1)), 1
        )  # as DiT has it, sines added once
        self.register_buffer("place", 0.3 * place, persistent=False)

    def forward(self, pixels: Tensor, time: Tensor | None = None) -> Tensor:
        b = pixels.shape[0]
        cut = pixels.view(b, GRID[0], PATCH, GRID[1], PATCH).transpose(2, 3).reshape(b, -1, PATCH**2)
        x, told = self.embed(cut) + self.place, 0.0
        if self.clock is not None:
            rates = torch.exp(-torch.arange(16) * (math.log(1e3) / 16))
            angles = (time.float() / STEPS).view(-1, 1) * 100 * rates
            told = self.clock(torch.cat((angles.sin(), angles.cos()), 1)).unflatten(1, (6, -1))
        for block in self.blocks:
            x = block(x, told)
        x = F.layer_norm(x, x.shape[-1:])
        if self.channels is None:
            return self.head(x.mean(1))
        found = self.head(x).view(b, *GRID, PATCH, PATCH, self.channels).transpose(2, 3)
        return found.reshape(b, SIDE, SIDE, self.channels)


def noisy(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures after a random step of diffusion, the steps, the clean pictures and the noise."""
    clean, _ = pictures(count, seed)
    gen = torch.Generator().manual_seed(seed)
    noise, time = torch.randn(clean.shape, generator=gen), torch.randint(STEPS, (count,), generator=gen)
    kept = KEPT[time].view(-1, 1, 1, 1)
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise, time, clean, noise


def noise_error(out: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean square error of the noise, the first channel."""
    return F.mse_loss(out[..., :1], batch[3])


def log_variance(out: Tensor, time: Tensor) -> Tensor:
    """Of one step back: between the least and the largest that can be right, as the second channel says."""
    least, largest = SPREAD[:, time].view(2, -1, 1, 1, 1)
    share = (out[..., 1:] + 1) / 2
    return share * largest + (1 - share) * least


def hybrid_error(out: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Improved DDPM's loss (arXiv 2102.09672): error of the noise, and for the variance alone the divergence
    of one step back from the true one."""
    seen, time, clean, _ = batch
    beta, kept, before = (x[time].view(-1, 1, 1, 1) for x in (BETAS, KEPT, BEFORE))

    def mean(picture: Tensor) -> Tensor:
        return (before.sqrt() * beta * picture + (1 - beta).sqrt() * (1 - before) * seen) / (1 - kept)

    guess = (seen - (1 - kept).sqrt() * out[..., :1].detach()) / kept.sqrt()
    true, found = SPREAD[0][time].view(-1, 1, 1, 1), log_variance(out, time)
    distance = (mean(clean) - mean(guess)).square()
    divergence = 0.5 * (found - true + torch.exp(true - found) + distance * torch.exp(-found) - 1)
    return noise_error(out, batch) + 0.1 * divergence.mean()


def loaded(model: nn.Module, name: str) -> nn.Module:
    """The model with trained weights, from `weights/vision-NAME.safetensors`."""
    found = load_file(WEIGHTS / f"vision-{name}.safetensors")
    model.load_state_dict({key: x.float() for key, x in found.items()})
    return model.eval().requires_grad_(False)


def blurred(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures under noise, and their labels: what is classified."""
    clean, labels = pictures(count, seed)
    return clean + 0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)), labels


@torch.no_grad()
def right(model: nn.Module, count: int = 2000) -> float:
    """Share of fresh pictures that a classifier names."""
    found = []
    for seed in range(1, 1 + count // 250):
        seen, labels = blurred(250, seed)
        found.append(model(seen).argmax(1) == labels)
    return float(torch.cat(found).float().mean())


@torch.no_grad()
def held_out(model: nn.Module, count: int = 2000) -> float:
    """Mean square error of the noise of fresh pictures, where 1 is no guess at all."""
    batches = [noisy(250, seed) for seed in range(1, 1 + count // 250)]
    return sum(float(noise_error(model(b[0], b[1]), b)) for b in batches) / len(batches)
