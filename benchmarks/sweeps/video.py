"""Methods for video: every layer of the bundled video model half way through a clip, without a mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sweeps.common import SHARES, Case, Layers, Measured, Setting, by_layer, everywhere, over, tiles
from tilewise.attention import (
    LLSA,
    PISA,
    PSA,
    SLA,
    SVG2,
    SVGEAR,
    AdaSpa,
    Boxes,
    FPSAttention,
    Mass,
    MeanPool,
    Method,
    NeighborhoodAttention,
    Plan,
    Pooled,
    RandomTiles,
    Share,
    Tiles,
    TrueMass,
    VMoBA,
)
from tilewise.attention.flash_block import BlockStep, Every, FlashBlock
from tilewise.data.shapes import moving_shapes
from tilewise.machine import clock
from tilewise.models.video import capture_video, load_video
from tilewise.tune import Sample

GRID, BOX = (8, 16, 16), (2, 4, 8)  # of the video's tokens, and of a tile of 64 of them
BOXES = Boxes(GRID, BOX)
TIME, STEP = 0.5, 1 / 16  # where in the sampling is measured, and how far apart its steps are
FRAME = GRID[1] * GRID[2]
KEPT = 4  # steps that what a cached block keeps serves, in the sweep of its sparse part


def methods() -> dict[str, list[Setting]]:
    """The settings of every method for video, by its name, from little to much."""
    clusters = {
        share: SVG2(queries=32, keys=64, threshold=share, least=0.03) for share in (0.2, 0.4, 0.6, 0.8, 0.9)
    }
    windows = ((1, 1, 1), (2, 2, 1), (3, 3, 1), (3, 2, 2), (3, 3, 2))
    near = ((3, 5, 5), (3, 7, 7), (5, 7, 7), (5, 11, 11), (7, 13, 13))
    return {
        "oracle": tiles(TrueMass(), order=BOXES),
        "random": tiles(RandomTiles(), order=BOXES),
        "mean-pool": tiles(MeanPool(), order=BOXES),
        "mean-pool + pooled rest": tiles(MeanPool(), Pooled(), order=BOXES),
        "pisa": over(lambda share: PISA(share, order=BOXES), "density", SHARES),
        "psa": over(_psa, "mass", (0.1, 0.2, 0.4, 0.6)),
        "llsa": over(lambda k: LLSA(16, k, order=Boxes(GRID, (1, 4, 4))), "top_k", (2, 4, 8, 16, 32)),
        "sla": [_sla(share) for share in SHARES],
        "svg2": [everywhere(f"threshold={share}", method) for share, method in clusters.items()],
        "svg-ear": [everywhere(f"threshold={share}", SVGEAR(method)) for share, method in clusters.items()],
        "ada-spa": [_adaptive(share) for share in SHARES],
        "vmoba": [_vmoba(part) for part in (0.1, 0.2, 0.3, 0.45, 0.6)],
        "fps-attention": over(lambda window: FPSAttention(GRID, BOX, window), "window", windows),
        "neighborhood": over(lambda window: NeighborhoodAttention(GRID, window), "window", near),
        "flash-block": [_cached(steps, None) for steps in (16, 8, 4, 3, 2)],
        "flash-block, sparse": [_cached(KEPT, share) for share in (0.05, 0.1, 0.2, 0.35)],
    }


def samples(time: float = TIME, clip: int = 0) -> dict[int, Sample]:
    """Every layer of the video model, at flow time `time` of a clip that was not trained on."""
    return {layer: Sample.of(*qkv, mask=None) for layer, qkv in _captured(time, clip).items()}


@cache
def _captured(time: float, clip: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    pixels = moving_shapes(1, seed=clip).pixels
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(clip))
    return capture_video(_model(), time * pixels + (1 - time) * noise, time)


@cache
def _model() -> Any:
    return load_video()


def _psa(mass: float) -> PSA:
    return PSA(((1, mass), (2, mass + 0.1), (4, mass + 0.2), (8, mass + 0.3)), order=BOXES)


def _vmoba(part: float) -> Setting:
    return by_layer(f"mass={part}", lambda layer, _: VMoBA(GRID, layer, select=Mass(part, over="head")))


def _sla(critical: float) -> Setting:
    """Sparse and linear attention; the projection is solved for, layer by layer, on other clips."""

    def make(layer: int, sample: Sample) -> Method:
        module = SLA(sample.v.shape[3], critical=critical, order=BOXES)
        module.fit([_captured(TIME, clip)[layer] for clip in (1, 2, 3)])
        return module.method()

    return by_layer(f"critical={critical}", make)


def _adaptive(share: float) -> Setting:
    """AdaSpa's tiles, searched in the step before this one: nothing is left to choose."""

    def make(layer: int, sample: Sample) -> Plan:
        before = _earlier(1)[layer]
        return AdaSpa(share, search=(0,), order=BOXES).find(before.q, before.k, before.lse)

    return by_layer(f"share={share}", make)


@cache
def _earlier(steps: int) -> dict[int, Sample]:
    """The same clip so many steps before."""
    return samples(TIME - steps * STEP)


def _cached(steps: int, share: float | None) -> Setting:
    """What frames get from other frames computed every so many steps, and kept in between: a mean over these steps.

    A step that reuses computes attention within every frame, and with a share also the tiles outside it that the
    last computation chose; what it keeps is what was outside them, at the time of that computation.
    """
    sparse = None if share is None else Tiles(MeanPool(), Share(share), (64, 64))
    label = f"every {steps} steps" + ("" if share is None else f", share={share}")

    def prepare(layers: Layers) -> Case:
        def case(layer: int, sample: Sample) -> Measured:
            ages = min(steps, 8)  # the clip begins 8 steps before; older ones count as that old
            found = [_step(sparse, sample, None if age == 0 else _earlier(age)[layer]) for age in range(ages)]
            weights = [1.0] * (ages - 1) + [1.0 + steps - ages]
            means = [sum(w * x for w, x in zip(weights, column)) / steps for column in zip(*found)]
            density, kept, error, spent = means
            return Measured(density, kept, error, 0.0, spent, sample.seconds)

        return case

    return Setting(label, prepare)


def _step(sparse: Method | None, now: Sample, before: Sample | None) -> tuple[float, float, float, float]:
    """Density, share of the mass that is read, error and seconds of one step of all frames; `before` is when what
    is reused was computed, None computes it now."""
    method, outs, scores, kept, spent = FlashBlock(Every(10**6), sparse), [], 0, 0.0, 0.0
    for frame in range(GRID[0]):
        state = None if before is None else _frame(method, before, frame, None)[0].state
        took = [_frame(method, now, frame, state) for _ in range(2)]
        step = took[0][0]
        spent += min(seconds for _, seconds in took)
        outs.append(step.out)
        scores += step.scores
        kept += 1.0 if before is None else _mass(step, now, frame)
    out = torch.cat(outs, 2)
    visible = now.q.shape[0] * now.q.shape[1] * now.q.shape[2] ** 2
    error = float((out - now.out).norm() / now.out.norm())
    return scores / visible, kept / GRID[0], error, spent


def _parts(
    sample: Sample, frame: int
) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    own = torch.arange(frame * FRAME, (frame + 1) * FRAME)
    others = torch.cat([torch.arange(frame * FRAME), torch.arange((frame + 1) * FRAME, sample.q.shape[2])])
    return own, lambda x: x[:, :, own], lambda x: x[:, :, others]


def _frame(method: FlashBlock, sample: Sample, frame: int, state: Any) -> tuple[BlockStep, float]:
    _, inside, outside = _parts(sample, frame)
    q, k, v = (inside(x) for x in (sample.q, sample.k, sample.v))
    rest = outside(sample.k), outside(sample.v)
    start = clock(sample.q.device)
    step = method.attend(q, k, v, rest, state)
    return step, clock(sample.q.device) - start


def _mass(step: BlockStep, sample: Sample, frame: int) -> float:
    """The share of the attention mass of a frame's queries that the step reads."""
    own, inside, outside = _parts(sample, frame)
    q, scale = inside(sample.q), sample.q.shape[3] ** -0.5
    read = 0.0
    for passes, take in ((step.inside, inside), (step.outside, outside)):
        for one in passes:
            part = Plan((one,), one.view).run(q, take(sample.k), take(sample.v), scale=scale)
            read += float((part.lse - sample.lse[:, :, own]).exp().mean())
    return read
