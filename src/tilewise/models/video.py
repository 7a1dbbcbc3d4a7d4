"""A small diffusion transformer for video, whose attention goes through `tilewise.attend`, layer by layer.

It is what methods for video are shown on: plain blocks as in DiT (arXiv 2212.09748), one token per patch of a
`[T, H, W]` grid, rotary positions along the three axes, and the flow-matching objective (arXiv 2210.02747):
`x_t = t * clip + (1 - t) * noise`, and the model predicts the velocity `clip - noise`. The trained weights
that come with the package know clips of moving shapes (`tilewise.data.shapes`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tilewise.errors import UserError
from tilewise.models.video_attention import Attention, Moment, Observer, Setting, VideoEvent, by_layer
from tilewise.models.video_layers import Block, cut, norm, prior, uncut, waves
from tilewise.recurrence.vision import rotations

__all__ = [
    "Moment",
    "VideoConfig",
    "VideoEvent",
    "VideoModel",
    "capture_video",
    "load_video",
    "sample",
    "save_video",
]


@dataclass(frozen=True)
class VideoConfig:
    """Sizes of a `VideoModel`.

    Args:
        channels: of a pixel. patch: pixels of a token along time, height and width.
        width: of the residual stream. layers: blocks. heads: of attention; width / heads is a multiple of 8.
        power: mean square of the data's values: the model adds to the best guess that knows only this.
    """

    channels: int = 3
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 128
    layers: int = 4
    heads: int = 4
    power: float = 0.5

    def __post_init__(self) -> None:
        sizes = {"channels": self.channels, "width": self.width, "layers": self.layers, "heads": self.heads}
        for name, value in (*sizes.items(), *(("patch", side) for side in self.patch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be made of integers >= 1, got {getattr(self, name)!r}")
        if len(self.patch) != 3:
            raise ValueError(f"patch must be (time, height, width), got {self.patch!r}")
        if self.width % (8 * self.heads):
            raise ValueError(
                f"width must be a multiple of 8 * heads = {8 * self.heads}, got {self.width}: every head turns"
                " pairs along three axes"
            )
        if not 0 < self.power < math.inf:
            raise ValueError(f"power must be a number > 0, got {self.power!r}")


class VideoModel(nn.Module):
    """Velocity of a flow from noise to clips. Weights are random until trained; see `load_video`."""

    def __init__(self, config: VideoConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VideoConfig()
        inside = math.prod(config.patch) * config.channels
        self.embed = nn.Linear(inside, config.width)
        self.clock = nn.Sequential(
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, 8 * config.width)
        )
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.unembed = nn.Linear(config.width, inside)
        nn.init.zeros_(self.unembed.weight)
        nn.init.zeros_(self.unembed.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        attention: Setting = None,
        *,
        observer: Observer | None = None,
        engine: str = "auto",
        step: tuple[int, int] | None = None,
    ) -> Tensor:
        """The velocity at `x` and flow time `t`.

        Args:
            x: `[B, T, H, W, channels]`, floating; T, H and W multiples of `config.patch`.
            t: a number in [0, 1], or `[B]`.
            attention: who computes attention: None (dense), a method, its name or a plan; a function
                `f(q, k, v, moment)` that gives the output or one of these; or a mapping of layers to any of these,
                the others being dense.
            observer: called with a `VideoEvent` after every attention call. engine: as in `tilewise.attend`.
            step: (which, of how many), passed on in `Moment`.

        Returns `[B, T, H, W, channels]` in x's dtype. Raises ValueError or TypeError for shapes that do not fit,
        layers that do not exist, and as `attend` does.
        """
        grid = self._grid(x)
        chosen = by_layer(attention, len(self.blocks))
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device)
        if t.shape not in ((), (x.shape[0],)):
            raise ValueError(f"t must be a number or [{x.shape[0]}], got {list(t.shape)}")
        t = t.expand(x.shape[0])
        spread = (t.square() * self.config.power + (1 - t).square()).view(-1, 1, 1, 1, 1)
        clock = self.clock(waves(1000 * t, self.config.width).to(self.embed.weight.dtype))
        clock = clock.unflatten(-1, (8, -1))
        turns = rotations(grid, self.config.width // self.config.heads, x.device)
        hidden = self.embed(cut(x / spread.sqrt().to(x.dtype), self.config.patch).to(self.embed.weight.dtype))
        first = float(t[0]) if len(t) else 0.0
        for number, block in enumerate(self.blocks):
            moment = Moment(number, first, grid, *(step or (None, None)))
            run = Attention(chosen.get(number), moment, observer, engine)
            hidden = block(hidden, clock[:, :6], turns, run, grid)
        shift, scale = clock[:, 6:].unsqueeze(2).unbind(1)
        found = self.unembed(norm(hidden) * (1 + scale) + shift)
        own = uncut(found, grid, self.config.patch) * (self.config.power / spread).sqrt()
        return (prior(t.view(-1, 1, 1, 1, 1), self.config.power) * x + own).to(x.dtype)

    def _grid(self, x: Tensor) -> tuple[int, int, int]:
        if not isinstance(x, Tensor) or x.ndim != 5 or x.shape[4] != self.config.channels:
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be [B, T, H, W, {self.config.channels}], got {given}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating, got {x.dtype}")
        (_, t, h, w, _), (a, b, c) = x.shape, self.config.patch
        if t % a or h % b or w % c:
            raise ValueError(
                f"x must have frames, height and width in multiples of the patch {self.config.patch}, got"
                f" {(t, h, w)}"
            )
        return t // a, h // b, w // c


@torch.no_grad()
def sample(
    model: VideoModel,
    steps: int = 16,
    seed: int = 0,
    attention: Setting = None,
    observer: Observer | None = None,
    *,
    count: int = 1,
    size: tuple[int, int, int] = (8, 32, 32),
    engine: str = "auto",
) -> Tensor:
    """Clips made from noise, by `steps` equal Euler steps along the model's velocity from time 0 to 1.

    Args:
        model: as trained. steps: at least 1. seed: of the noise; clip i starts from the noise of `seed + i`.
        attention, observer, engine: as for the model; the `Moment` of a call names the step.
        count: clips. size: frames, height and width in pixels, multiples of the patch.

    Returns float32 `[count, T, H, W, channels]`, on the model's device, not clipped to [-1, 1]. Raises as the model
    does, and ValueError when `steps` or `count` is out of range.
    """
    for name, value, least in (("steps", steps, 1), ("count", count, 0), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    weights = model.embed.weight
    shape = (*size, model.config.channels)
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    x = torch.stack(starts) if starts else torch.zeros(0, *shape)
    x = x.to(weights.device)
    for step in range(steps):
        velocity = model(x, step / steps, attention, observer=observer, engine=engine, step=(step, steps))
        x = x + velocity / steps
    return x


@torch.no_grad()
def capture_video(
    model: VideoModel, x: Tensor, t: Tensor | float, layers: Iterable[int] | None = None
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Run the model densely on `x` at time `t` and return the (q, k, v) of each layer's attention, after rotation.

    Args: x, t: as for the model. layers: indices of layers to keep; all when None.

    Returns three `[B, heads, N, head_dim]` by layer, in the dtype of the model's weights; the N tokens stand in the
    order of the grid, time slowest. Raises as the model does, and ValueError for layers that do not exist.
    """
    wanted = set(range(len(model.blocks)) if layers is None else layers)
    by_layer(dict.fromkeys(wanted, "dense"), len(model.blocks))  # refuses layers that do not exist
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(event: VideoEvent) -> None:
        if event.moment.layer in wanted:
            seen[event.moment.layer] = (event.q.clone(), event.k.clone(), event.v.clone())

    model(x, t, observer=keep)
    return seen


def load_video(path: str | Path | None = None, *, device: str = "cpu") -> VideoModel:
    """A trained model in evaluation mode, float32; without a path, the one that comes with the package.

    Args:
        path: a safetensors file as `save_video` writes it. device: where to hold it.

    Raises UserError when the file is missing, is no safetensors, or does not hold a model of this kind.
    """
    from safetensors import SafetensorError, safe_open

    from tilewise.models.load import bundled_model, check_device

    place = check_device(device)
    path = bundled_model() / "video.safetensors" if path is None else Path(path)
    if not path.is_file():
        raise UserError(f"video weights {str(path)!r} do not exist")
    try:
        with safe_open(path, framework="pt") as stored:
            settings = json.loads((stored.metadata() or {})["config"])
            weights = {name: stored.get_tensor(name).float() for name in stored.keys()}
        model = VideoModel(VideoConfig(**settings | {"patch": tuple(settings["patch"])}))
        model.load_state_dict(weights)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{str(path)!r} does not hold a video model: {error}") from error
    return model.to(place).eval()


def save_video(model: VideoModel, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the weights, rounded to `dtype`, and the sizes as one safetensors file that `load_video` reads."""
    from safetensors.torch import save_file

    weights = {
        name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, path, {"config": json.dumps(dataclasses.asdict(model.config))})
