"""Train the bundled video model: flow matching on clips of moving shapes, on one CPU thread.

    python training/train_video.py            # begins, or resumes; under 20 minutes of one core
    python training/train_video.py --measure  # measures the bundled weights again, without training

Nothing is downloaded: clips are generated (`tilewise.data.shapes`). Grids grow from 256 tokens to 2,048, by
cutting pieces out of whole clips; rotary positions carry over. Interrupt it at any time: it saves and can be
resumed. At the end it writes the averaged weights into the package and `video_results.json` beside this file: the
loss as it fell, held-out loss against guesses that do not look at the clip, and how concentrated the attention of
every head is.
"""

import argparse
import copy
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tilewise.attention import Layout, Mass, TrueMass
from tilewise.data.shapes import moving_shapes
from tilewise.models import bundled_model
from tilewise.models.video import VideoModel, capture_video, load_video, save_video
from tilewise.tiles import Everything, Tiling

HERE = Path(__file__).parent
WEIGHTS = bundled_model() / "video.safetensors"
WHOLE = (8, 32, 32)
TRAINING_SEEDS = 1 << 40  # clips of lower seeds are never trained on
HELD_OUT = 1 << 20  # first seed of the held-out clips
RATE, WEIGHT_DECAY, WARM, AVERAGE = 2e-3, 0.05, 100, 0.998
FALL = 0.4  # the part of all steps over which the rate falls to nothing


@dataclass(frozen=True)
class Stage:
    """So many steps of so many clips of this size, in frames and pixels."""

    steps: int
    clips: int
    size: tuple[int, int, int]


STAGES = (Stage(1200, 16, (4, 16, 16)), Stage(300, 8, (8, 16, 16)), Stage(1000, 2, WHOLE))
TOTAL = sum(stage.steps for stage in STAGES)


def stage_at(step: int) -> Stage:
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return STAGES[-1]


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clips, noise and times of a step.

    Times are the logistic of a normal number and lie mostly near noise, where a clip of many tokens is decided:
    what it will show can be told from all tokens together long before it can be told from one.
    """
    stage = stage_at(step)
    g = torch.Generator().manual_seed(step)
    whole = moving_shapes(stage.clips, TRAINING_SEEDS + 64 * step).pixels
    rows = []
    for clip in whole:
        at = [int(torch.randint(n - m + 1, (), generator=g)) for n, m in zip(WHOLE, stage.size)]
        rows.append(clip[tuple(slice(a, a + m) for a, m in zip(at, stage.size))])
    clips = torch.stack(rows)
    noise = torch.randn(clips.shape, generator=g)
    return clips, noise, (1.4 * torch.randn(stage.clips, generator=g) - 0.9).sigmoid()


def flow_loss(model, clips: Tensor, noise: Tensor, t: Tensor, attention=None) -> Tensor:
    """Mean square error of the velocity."""
    part = t.view(-1, 1, 1, 1, 1)
    found = model(part * clips + (1 - part) * noise, t, attention)
    return (found.float() - (clips - noise)).square().mean()


def optimizers_of(model: VideoModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and ".weight" in name and "blocks" in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(step: int) -> float:
    """Warm-up, constant, then a cosine to zero."""
    left = (TOTAL - step) / (FALL * TOTAL)
    return RATE * min(1.0, (step + 1) / WARM) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


@torch.no_grad()
def held_out(model: VideoModel, size: tuple[int, int, int] = WHOLE, count: int = 16, attention=None) -> float:
    """Loss on held-out clips at evenly spread times, one clip a time."""
    total = 0.0
    for number in range(count):
        clip = moving_shapes(1, HELD_OUT + number).pixels[:, : size[0], : size[1], : size[2]]
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(number))
        total += float(flow_loss(model, clip, noise, torch.tensor([(number + 0.5) / count]), attention))
    return total / count


def guesses(count: int = 16) -> dict[str, float]:
    """Held-out loss of guesses that know the mean and the variance of red, green and blue only."""
    known, clips = (
        moving_shapes(n, seed).pixels.flatten(0, 3) for n, seed in ((64, TRAINING_SEEDS), (count, HELD_OUT))
    )
    variance = (clips - known.mean(0)).square().mean(0)
    times = (torch.arange(count)[:, None] + 0.5) / count
    linear = variance / (times.square() * variance + (1 - times).square())
    return {"the mean": float(variance.mean()) + 1, "best linear in a pixel": float(linear.mean())}


@torch.no_grad()
def concentration(model: VideoModel, t: float = 0.5, count: int = 2) -> dict[str, list]:
    """How few of its keys a head needs for 90 % of its attention, by layer and head, over held-out clips.

    `tiles`: density of the fewest 64 x 64 tiles of each row of tiles that hold 90 % of its mass. `keys`: share of
    single keys that a query needs, on average.
    """
    tiles: list = []
    keys: list = []
    for number in range(count):
        clip = moving_shapes(1, HELD_OUT + 100 + number).pixels
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(number))
        for q, k, _ in capture_video(model, t * clip + (1 - t) * noise, t).values():
            layout = Layout(
                q, k, Everything().bind(q.shape[2], k.shape[2]), Tiling(64), Tiling(64), q.shape[3] ** -0.5
            )
            among = layout.kinds() != 0
            mass = TrueMass().score(layout, among)
            tiles.append(Mass(0.9).select(mass, among, among & False).float().mean((0, 2, 3)))
            ordered = (q * q.shape[3] ** -0.5 @ k.mT).softmax(-1).sort(-1, descending=True).values
            keys.append((ordered.cumsum(-1) - ordered < 0.9).float().mean((0, 2, 3)))

    def mean(found: list) -> list[list[float]]:
        by_layer = torch.stack(found).view(count, -1, len(found[0])).mean(0)
        return [[round(x, 4) for x in row] for row in by_layer.tolist()]

    return {"tiles": mean(tiles), "keys": mean(keys)}


def own_only(q: Tensor, k: Tensor, v: Tensor, moment) -> Tensor:
    """Attention taken away: every token sees itself alone."""
    return v


def uniform(q: Tensor, k: Tensor, v: Tensor, moment) -> Tensor:
    """Attention without choice: every token sees the mean of all."""
    return v.mean(2, keepdim=True).expand_as(v)


def measure(model: VideoModel) -> dict:
    """All that is said of the trained model, and the same of an untrained one."""
    torch.manual_seed(0)
    untrained = VideoModel(model.config).eval()
    loss = {"trained": held_out(model), "untrained": held_out(untrained), **guesses()}
    loss["trained, tokens see themselves only"] = held_out(model, attention=own_only)
    loss["trained, tokens see the mean of all"] = held_out(model, attention=uniform)
    return {
        "held_out_loss": {name: round(value, 4) for name, value in loss.items()},
        "needed_for_90_percent": {"trained": concentration(model), "untrained": concentration(untrained)},
    }


def write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def finish(averaged: VideoModel, state: dict, results: Path) -> None:
    """Write weights and what was found."""
    save_video(averaged, WEIGHTS)
    WEIGHTS.chmod(0o644)  # safetensors leaves files to their owner alone
    story = {
        "steps": state["step"],
        "minutes_of_one_core": round(state["seconds"] / 60, 1),
        "stages": [vars(stage) for stage in STAGES],
        "torch": torch.__version__,
        "training_loss_every_50_steps": state["curve"],
        "looks": state["looks"],
        **measure(load_video()),
    }
    write(results, json.dumps(story, indent=1) + "\n")
    print(json.dumps(story["held_out_loss"], indent=1), flush=True)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(1)
    model = VideoModel()
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = optimizers_of(model)
    state: dict = {"step": 0, "seconds": 0.0, "curve": [], "looks": [], "sum": 0.0}
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = options.work / "video.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        for optimizer, parts in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(parts)
        state = saved["state"]
        print("resumed at step", state["step"], flush=True)
    stopping: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: stopping.append(number))

    def save() -> None:
        parts = {"model": model.state_dict(), "averaged": averaged.state_dict(), "state": state}
        parts["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        torch.save(parts, checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)

    saved_at = time.monotonic()
    while state["step"] < min(TOTAL, options.until) and not stopping:
        begun = time.process_time()
        state["sum"] += advance(model, averaged, optimizers, state["step"])
        state["step"] += 1
        state["seconds"] += time.process_time() - begun
        step = state["step"]
        if step % 50 == 0:
            state["curve"].append(round(state["sum"] / 50, 4))
            state["sum"] = 0.0
            print(f"step {step}, {state['seconds'] / 60:.1f} min, loss {state['curve'][-1]}", flush=True)
        if step % 400 == 0:
            found = {"step": step, "minutes": round(state["seconds"] / 60, 1)}
            found |= {str(size): round(held_out(averaged, size), 4) for size in ((4, 16, 16), WHOLE)}
            state["looks"].append(found)
            print(found, flush=True)
        if time.monotonic() - saved_at > 90:
            save()
            saved_at = time.monotonic()
    save()
    if state["step"] >= TOTAL:
        finish(averaged, state, options.results)


def advance(model: VideoModel, averaged: VideoModel, optimizers: list, step: int) -> float:
    """One step; returns its loss."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
    with torch.autocast("cpu", torch.bfloat16):
        loss = flow_loss(model, *batch(step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    keep = min(AVERAGE, (1 + step) / (10 + step))
    with torch.no_grad():
        for old, new in zip(averaged.parameters(), model.parameters()):
            old.lerp_(new, 1 - keep)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--until", type=int, default=TOTAL, help="stop after this step")
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="where the checkpoint is kept")
    parser.add_argument("--results", type=Path, default=HERE / "video_results.json")
    parser.add_argument("--measure", action="store_true", help="only measure the bundled weights again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        story = json.loads(options.results.read_text(encoding="utf-8")) | measure(load_video())
        write(options.results, json.dumps(story, indent=1) + "\n")
    else:
        train(options)


if __name__ == "__main__":
    main()
