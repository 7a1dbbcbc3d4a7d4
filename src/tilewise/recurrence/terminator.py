"""Terminator: hyper-kernels times hidden activations, which then act on activations; no residual
connections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.hyper_kernels import ContextKernel, HyperKernel

BRANCHES = 10  # parts that a block joins
REACHES = ("all", "plain", "fixed", "own")


class HyperZZW(nn.Module):
    """The global HyperZ.Z.W operator (Zhang, 2024, arXiv 2401.17948).

    A slow network makes a hyper-kernel W as large as the image; times the activations x, place by place, it
    becomes weights of this image, `x * W`. These act on activations z: `(x * W) @ z`, a product of matrices
    for each channel, by which every place sees a whole row of x and a whole column of z.

    Args:
        channels, size: of square images. reach: "all" is the operator; for controls, "plain" keeps W at 1,
            "fixed" takes W alone for weights, whatever the image shows, and "own" multiplies place by place,
            `x * W * z`, so that no place sees another. settings: of the `HyperKernel`.

    `forward` takes x and z `[B, C, size, size]` and gives the same shape.

    Raises ValueError for other reaches.
    """

    def __init__(self, channels: int, size: int, reach: str = "all", **settings) -> None:
        super().__init__()
        if reach not in REACHES:
            raise ValueError(f"reach must be one of {', '.join(map(repr, REACHES))}, got {reach!r}")
        self.reach = reach
        self.kernel = None if reach == "plain" else HyperKernel(channels, size, 2, **settings)

    def weights(self, x: Tensor) -> Tensor:
        """`x * W`."""
        if self.kernel is None:
            return x
        return self.kernel().expand_as(x) if self.reach == "fixed" else x * self.kernel()

    def act(self, weights: Tensor, z: Tensor) -> Tensor:
        """What weights make of z."""
        return weights * z if self.reach == "own" else weights @ z

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.act(self.weights(x), z)


class LocalHyperZZW(nn.Module):
    """The local HyperZ.Z.W operator: a depthwise convolution by a kernel made of another view of the image.

    `forward(x, z)` convolves z by the kernel that `ContextKernel` makes of x, mixes channels, standardises,
    and applies GELU; all `[B, C, H, W]`.
    """

    def __init__(self, channels: int, kernel: int, hidden: int = 16) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel!r}")
        self.slow = ContextKernel(channels, kernel, hidden)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.standard = nn.BatchNorm2d(channels, affine=False)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        kernel = self.slow(x)
        b, c, size, _ = kernel.shape
        made = F.conv2d(
            z.flatten(0, 1).unsqueeze(0), kernel.flatten(0, 1).unsqueeze(1), padding=size // 2, groups=b * c
        )
        return F.gelu(self.standard(self.mix(made[0].unflatten(0, (b, c))))) + self.bias


class RecursiveGate(nn.Module):
    """Recursive gated unit: `W_y (gelu(std(k * W_q v)) + b)`, k and v linear in x, b a number for each
    place."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.key, self.value, self.query, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.places = nn.Parameter(torch.zeros(1, 1, size, size))

    def forward(self, x: Tensor) -> Tensor:
        gated = F.instance_norm(self.key(x) * self.query(self.value(x)))
        return self.out(F.gelu(gated) + self.places)


class HyperChannels(nn.Module):
    """Hyper-channel interaction: `x * sigmoid(y * W * y)`, y the mean of each channel, W a hyper-kernel over
    channels."""

    def __init__(self, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.kernel = HyperKernel(1, channels, 1, hidden)

    def score(self, x: Tensor) -> Tensor:
        """`y * W * y`, `[B, C, 1, 1]`."""
        mean = x.mean((2, 3))
        return (mean * self.kernel()[0] * mean)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.score(x).sigmoid()


class HyperInteraction(nn.Module):
    """Hyper interaction: x times a sigmoid of what y scores by its channels and by its places."""

    def __init__(self, channels: int, size: int, hidden: int = 16) -> None:
        super().__init__()
        self.channels = HyperChannels(channels, hidden)
        self.kernel = HyperKernel(1, size, 2, hidden)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        mean = y.mean(1, keepdim=True)
        return x * (self.channels.score(y) * (mean * self.kernel() * mean)).sigmoid()


class MixedStandard(nn.Module):
    """Group-based standardisation: groups of channels in turn by batch and by image, without scales."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"channels must be a multiple of groups, got {channels} and {groups}")
        self.groups = groups
        self.batch = nn.ModuleList(
            nn.BatchNorm2d(channels // groups, affine=False) for _ in range(0, groups, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(self.groups, 1))
        for i, part in enumerate(parts):
            parts[i] = F.instance_norm(part) if i % 2 else self.batch[i // 2](part)
        return torch.cat(parts, 1)


class SFNEBlock(nn.Module):
    """Slow-fast neural encoding: ten branches over one image, joined and squeezed by a bottleneck; nothing is
    added to the input.

    Args:
        channels: of the input. size: of the square image. factor: channels of the output for each of the
            input.
        kernels: sizes of the four local branches. groups: of `MixedStandard`. reach: of the
            `HyperZZW`.

    `forward` takes `[B, channels, size, size]` and gives `[B, channels * factor, size, size]`.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        factor: int = 2,
        kernels: Sequence[int] = (3, 9, 5, 7),
        groups: int = 4,
        reach: str = "all",
    ) -> None:
        super().__init__()
        self.hyper = HyperZZW(channels, size, reach)
        self.fast, self.slow = RecursiveGate(channels, size), RecursiveGate(channels, size)
        self.mixer, self.channels = nn.Conv2d(channels, channels, 1), HyperChannels(channels)
        self.interaction = HyperInteraction(channels, size)
        self.locals = nn.ModuleList(LocalHyperZZW(channels, kernel) for kernel in kernels)
        self.bottleneck = nn.Conv2d(BRANCHES * channels, factor * channels, 1)
        self.standard, self.bias = MixedStandard(factor * channels, groups), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.hyper.weights(x)
        fast = F.instance_norm(self.slow(weights) + self.fast(x))
        mixed, channels = F.instance_norm(self.mixer(x)), F.instance_norm(self.channels(x))
        seen = self.hyper.act(weights, fast)
        far = [seen, seen.sigmoid() * seen, *(self.hyper.act(weights, z) for z in (mixed, channels))]
        pairs = ((x, channels), (channels, x), (mixed, x), (x, mixed))
        near = [local(told, z) for local, (told, z) in zip(self.locals, pairs)]
        parts = [fast, self.interaction(seen, x), *far, *near]
        return F.gelu(self.standard(self.bottleneck(torch.cat(parts, 1)))) + self.bias


class Terminator(nn.Module):
    """A few very wide blocks and a linear reading of the mean over places (Zhang, 2024, arXiv 2401.17948).

    Args:
        channels: of the images. size: their height and width. classes: to tell apart.
        factors: of the blocks; channels grow by each. settings: of each `SFNEBlock`.

    `forward` takes images `[B, size, size, channels]` and gives logits `[B, classes]`; `slow_loss` is the
    local error that the slow networks are trained by besides.

    Differs from the authors' code: running averages stand for batches' own statistics when it is not trained,
    earlier blocks' inputs are not joined to the branches of later ones, and there is no dropout.
    """

    def __init__(
        self, channels: int, size: int, classes: int, factors: Sequence[int] = (4, 2), **settings
    ) -> None:
        super().__init__()
        self.factors = tuple(factors)
        self.blocks = nn.ModuleList()
        for factor in self.factors:
            self.blocks.append(SFNEBlock(channels, size, factor, **settings))
            channels *= factor
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.movedim(3, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))

    def slow_loss(self) -> Tensor:
        """How far the blocks' global hyper-kernels are apart: mean squares of each pair's differences, the
        shallower repeated to the deeper's channels."""
        slow = [block.hyper.kernel for block in self.blocks]  # type: ignore[union-attr]
        kernels = [kernel() for kernel in slow if isinstance(kernel, HyperKernel)]
        total = self.head.weight.new_zeros(())
        for i, deep in enumerate(kernels):
            for shallow in kernels[:i]:
                total = total + (shallow.repeat(len(deep) // len(shallow), 1, 1) - deep).square().mean()
        return total
