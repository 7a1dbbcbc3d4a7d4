"""The video model: what it computes, who may compute its attention, and that the bundled weights know video."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.attention.video_like import KINDS, near, places, video_qkv
from tilewise.attention import Dense, Layout, Mass, MeanPool, Tiles, TopK, TrueMass, attend, plan
from tilewise.data.shapes import moving_shapes
from tilewise.errors import UserError
from tilewise.models import bundled_model
from tilewise.models.video import VideoConfig, VideoModel, capture_video, load_video, sample, save_video
from tilewise.models.video_layers import cut, uncut
from tilewise.recurrence.vision import rotations, turn
from tilewise.tiles import Everything, Tiling

SMALL = VideoConfig(width=32, layers=3, heads=2)
SPARSE = Tiles(score=MeanPool(), select=TopK(2), tile=(16, 16))
FULL = Tiles(score=MeanPool(), select=Mass(1.0), tile=(16, 16))


def small(seed: int = 0, config: VideoConfig = SMALL) -> VideoModel:
    """A model with random weights everywhere, also where training starts from zero."""
    torch.manual_seed(seed)
    model = VideoModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def clip_of(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, 3, generator=torch.Generator().manual_seed(seed))


def velocity_by_definition(model: VideoModel, x: torch.Tensor, t: float) -> torch.Tensor:
    """The model for one clip `[T, H, W, 3]` in float64, written out: softmax over all pairs, complex rotations."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    config, x = model.config, x.double()
    heads, dim, power = config.heads, config.width // config.heads, config.power
    spread = t * t * power + (1 - t) ** 2

    def linear(name, y):
        return y @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(y):
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    rates = 10000 ** -(torch.arange(config.width // 2).double() / (config.width // 2))
    clock = torch.cat(((1000 * t * rates).cos(), (1000 * t * rates).sin()))
    clock = linear("clock.2", nn.functional.silu(linear("clock.0", clock))).view(8, -1)
    (_, ph, pw), (frames, height, width, _) = config.patch, x.shape
    spots = [(f, h, w) for f in range(frames) for h in range(0, height, ph) for w in range(0, width, pw)]
    y = torch.stack([x[f, h : h + ph, w : w + pw].flatten() for f, h, w in spots])
    y = linear("embed", y / math.sqrt(spread))
    half = dim // 2
    pairs = (half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8)
    turns = torch.tensor(
        [
            [
                place * 0.02 ** (i / max(1, count - 1))
                for place, count in zip((f, h // ph, w // pw), pairs)
                for i in range(count)
            ]
            for f, h, w in spots
        ],
        dtype=torch.float64,
    )
    phases = torch.polar(torch.ones_like(turns), turns)

    def rotated(part, scale):
        part = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
        spun = torch.complex(part[:, :half], part[:, half:]) * phases
        return torch.cat((spun.real, spun.imag), 1)

    for number in range(config.layers):
        at = f"blocks.{number}"
        shift, scale, gate, shift_up, scale_up, gate_up = clock[:6] + weights[f"{at}.table"]
        q, k, v = linear(f"{at}.qkv", norm(y) * (1 + scale) + shift).chunk(3, 1)
        seen = []
        for head in range(heads):
            own = slice(head * dim, (head + 1) * dim)
            qh = rotated(q[:, own], weights[f"{at}.q_scale"][head])
            kh = rotated(k[:, own], weights[f"{at}.k_scale"][head])
            seen.append((qh @ kh.T / math.sqrt(dim)).softmax(-1) @ v[:, own])
        y = y + (1 + gate) * linear(f"{at}.proj", torch.cat(seen, 1))
        inner = nn.functional.gelu(
            linear(f"{at}.up", norm(y) * (1 + scale_up) + shift_up), approximate="tanh"
        )
        y = y + (1 + gate_up) * linear(f"{at}.down", inner)
    y = linear("unembed", norm(y) * (1 + clock[7]) + clock[6])
    own = torch.empty_like(x)
    for token, (f, h, w) in zip(y, spots):
        own[f, h : h + ph, w : w + pw] = token.view(ph, pw, -1)
    return (t * power - (1 - t)) / spread * x + math.sqrt(power / spread) * own


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_model_is_its_definition(t):
    model, x = small(), clip_of(2, 3, 8, 12)
    found = model(x, torch.tensor([t, 0.77]))
    wanted = torch.stack([velocity_by_definition(model, x[0], t), velocity_by_definition(model, x[1], 0.77)])
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=1e-4)
    wrong = velocity_by_definition(model, x[0].flip(0), t)
    assert (found[0] - wrong).abs().max() > 0.01, "the comparison would not notice frames in another order"


def test_patches_are_cut_and_put_back():
    x = clip_of(2, 4, 6, 10)
    tokens = cut(x, (2, 3, 5))
    assert tokens.shape == (2, 2 * 2 * 2, 2 * 3 * 5 * 3)
    assert torch.equal(tokens[1, 5], x[1, 2:4, 0:3, 5:10].flatten())
    assert torch.equal(uncut(tokens, (2, 2, 2), (2, 3, 5)), x)


def test_rotated_products_depend_on_distances_alone():
    """Moving query and key by the same steps along any axis leaves their product; moving one of them does not."""
    q, k = torch.randn(2, 16, dtype=torch.float64).float()
    grid = (3, 4, 5)
    turns = rotations(grid, 16)
    q, k = (turn(x.expand(1, 1, 60, -1), turns)[0, 0] for x in (q, k))
    product = q @ k.T
    at = torch.arange(60).view(grid)
    for axis in range(3):
        here, there = (
            at.narrow(axis, 0, grid[axis] - 1).flatten(),
            at.narrow(axis, 1, grid[axis] - 1).flatten(),
        )
        same = product[here][:, here]
        torch.testing.assert_close(product[there][:, there], same, atol=1e-4, rtol=0)
        assert (product[here][:, there] - same).abs().max() > 0.1


@pytest.mark.parametrize("size", [(1, 2, 2), (1, 2, 6), (5, 2, 2), (2, 10, 4)])
def test_any_grid(size):
    assert small()(clip_of(2, *size), 0.5).shape == (2, *size, 3)


def test_no_clips():
    assert small()(clip_of(0, 2, 4, 4), 0.5).shape == (0, 2, 4, 4, 3)
    assert sample(small(), 2, count=0, size=(2, 4, 4)).shape == (0, 2, 4, 4, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_close(dtype):
    model, x = small(), clip_of(1, 2, 8, 8)
    with torch.no_grad():
        wanted = model(x, 0.5)
        found = small().to(dtype)(x.to(dtype), 0.5)
    assert found.dtype == dtype
    assert (found.float() - wanted).norm() / wanted.norm() < 2 * torch.finfo(dtype).eps


def test_gradients_reach_every_parameter():
    model = small()
    model(clip_of(2, 2, 8, 8), torch.tensor([0.2, 0.6])).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_capture_gives_what_attention_sees():
    model, x = small(), clip_of(2, 3, 8, 8)
    seen = capture_video(model, x, 0.4)
    assert list(seen) == [0, 1, 2]
    assert all(part.shape == (2, 2, 48, 16) for parts in seen.values() for part in parts)
    assert list(capture_video(model, x, 0.4, layers=[2])) == [2]
    events = []
    model(x, 0.4, observer=events.append)
    for event in events:
        q, k, v = seen[event.moment.layer]
        assert torch.equal(event.q, q) and torch.equal(event.k, k) and torch.equal(event.v, v)
        torch.testing.assert_close(event.out, attend(q, k, v))
        assert event.moment.grid == (3, 4, 4) and event.moment.step is None
        assert event.moment.time == pytest.approx(0.4) and isinstance(event.method, Dense)


def test_a_method_for_each_layer():
    model, x = small(), clip_of(1, 3, 8, 8)
    events = []
    with torch.no_grad():
        found = model(x, 0.5, {1: SPARSE, 2: "dense"}, observer=events.append)
        dense = model(x, 0.5)
        by_hand = model(x, 0.5, {1: plan(SPARSE, events[1].q, events[1].k)}, engine="torch")
    assert [event.plan.density for event in events] == [1.0, pytest.approx(2 / 3), 1.0]
    assert [event.method for event in events] == [Dense(), SPARSE, Dense()]
    assert (found - dense).abs().max() > 1e-3
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(model(x, 0.5, SPARSE), model(x, 0.5, dict.fromkeys(range(3), SPARSE)))


def test_full_density_is_dense():
    model, x = small(), clip_of(1, 3, 8, 8)
    torch.testing.assert_close(model(x, 0.5, FULL), model(x, 0.5), atol=1e-5, rtol=1e-4)


def test_a_function_may_attend_or_choose():
    """By moment: a schedule over steps; or the output itself, kept from one step to the next."""
    model = small()
    moments, kept = [], {}

    def rule(q, k, v, moment):
        moments.append((moment.step, moment.steps, moment.layer, moment.time))
        if moment.layer == 0:
            return SPARSE if moment.step else "dense"
        if moment.layer == 1:
            return kept.setdefault(1, attend(q, k, v))
        return plan(FULL, q, k)

    events = []
    sample(model, 2, 3, rule, events.append, size=(3, 8, 8))
    assert moments == [(step, 2, layer, step / 2) for step in range(2) for layer in range(3)]
    densities = [event.plan and event.plan.density for event in events]
    assert densities == [1.0, None, 1.0, pytest.approx(2 / 3), None, 1.0]
    assert torch.equal(events[1].out, events[4].out) and events[1].method is None


def test_sampler_is_euler_from_noise():
    model = small()
    x = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(5))[None]
    with torch.no_grad():
        for t in (0.0, 0.25, 0.5, 0.75):
            x = x + model(x, t) / 4
    torch.testing.assert_close(sample(model, 4, 5, size=(2, 4, 4)), x)
    both = sample(model, 4, 4, count=2, size=(2, 4, 4))
    torch.testing.assert_close(both[1:], x, atol=1e-5, rtol=1e-5)
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(2, 4, 4, 3), 0.5), ValueError, r"x must be \[B, T, H, W, 3\]"),
        (lambda m: m(torch.zeros(1, 2, 4, 4, 1), 0.5), ValueError, r"x must be \[B, T, H, W, 3\]"),
        (lambda m: m(torch.zeros(1, 2, 5, 4, 3), 0.5), ValueError, r"multiples of the patch \(1, 2, 2\)"),
        (lambda m: m(torch.zeros(1, 2, 4, 4, 3).long(), 0.5), TypeError, "x must be floating"),
        (lambda m: m(clip_of(1, 2, 4, 4), torch.zeros(3)), ValueError, r"t must be a number or \[1\]"),
        (
            lambda m: m(clip_of(1, 2, 4, 4), 0.5, {3: "dense"}),
            ValueError,
            "layer 3; the model has layers 0 to 2",
        ),
        (lambda m: m(clip_of(1, 2, 4, 4), 0.5, {"0": "dense"}), ValueError, "layer '0'"),
        (lambda m: m(clip_of(1, 2, 4, 4), 0.5, "dens"), ValueError, "unknown attention method 'dens'"),
        (lambda m: m(clip_of(1, 2, 4, 4), 0.5, 3), TypeError, "method must be None, a name or"),
        (
            lambda m: m(clip_of(1, 2, 4, 4), 0.5, lambda q, k, v, at: v[:, :1]),
            ValueError,
            "attention must give",
        ),
        (lambda m: capture_video(m, clip_of(1, 2, 4, 4), 0.5, [5]), ValueError, "layer 5"),
        (lambda m: sample(m, 0), ValueError, "steps must be an integer >= 1, got 0"),
        (lambda m: sample(m, 1, -1), ValueError, "seed must be an integer >= 0"),
        (lambda m: sample(m, 1, count=-1), ValueError, "count must be an integer >= 0"),
        (lambda m: sample(m, 1, size=(1, 3, 2)), ValueError, "multiples of the patch"),
        (lambda m: VideoConfig(width=100), ValueError, "width must be a multiple of 8"),
        (lambda m: VideoConfig(layers=0), ValueError, "layers must be"),
        (lambda m: VideoConfig(patch=(2, 2)), ValueError, "patch must be"),
        (lambda m: VideoConfig(patch=(1, 0, 2)), ValueError, "patch must be"),
        (lambda m: VideoConfig(power=0.0), ValueError, "power must be"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(small())


def test_weights_come_back_rounded_once(tmp_path):
    model = small()
    save_video(model, tmp_path / "model.safetensors")
    again = load_video(tmp_path / "model.safetensors")
    assert again.config == SMALL and not again.training
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].half().float()), name
    save_video(model, tmp_path / "model.safetensors", dtype=torch.float32)
    again = load_video(str(tmp_path / "model.safetensors"), device="cpu")
    assert torch.equal(again(clip_of(1, 2, 4, 4), 0.5), model(clip_of(1, 2, 4, 4), 0.5))


def test_files_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        load_video(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no weights")
    save_file({"a": torch.zeros(1)}, tmp_path / "no_config")
    config = {"config": json.dumps({"width": 32, "layers": 3, "heads": 2, "patch": [1, 2, 2]})}
    save_file({"a": torch.zeros(1)}, tmp_path / "other_weights", config)
    save_file({"a": torch.zeros(1)}, tmp_path / "other_config", {"config": json.dumps({"patch": 3})})
    for name in ("text", "no_config", "other_weights", "other_config"):
        with pytest.raises(UserError, match="does not hold a video model"):
            load_video(tmp_path / name)
    with pytest.raises(UserError, match="device must be like cpu"):
        load_video(device="nowhere")


@pytest.fixture(scope="module")
def bundled():
    return load_video()


def flow_loss(model, attention=None, clips: int = 4) -> float:
    """Mean square error of the velocity on clips that were not trained on, at evenly spread times."""
    total = 0.0
    with torch.no_grad():
        for number in range(clips):
            clip = moving_shapes(1, number).pixels
            noise, t = clip_of(*clip.shape[:-1], seed=number), (number + 0.5) / clips
            found = model(t * clip + (1 - t) * noise, t, attention)
            total += float((found - (clip - noise)).square().mean())
    return total / clips


def test_bundled_weights_are_small():
    assert (bundled_model() / "video.safetensors").stat().st_size <= 3e6


def test_bundled_weights_know_held_out_clips(bundled):
    """Against the mean, against the best guess from each pixel alone, and against an untrained model (controls)."""
    clips = moving_shapes(4, 0).pixels
    times = (torch.arange(4) + 0.5) / 4
    pixel = float((bundled.config.power / (times**2 * bundled.config.power + (1 - times) ** 2)).mean())
    trained, untrained = flow_loss(bundled), flow_loss(VideoModel(bundled.config).eval())
    assert untrained == pytest.approx(pixel, rel=0.2), "it begins as the best guess from a pixel"
    assert trained < untrained / 2 < float(clips.square().mean() + 1) / 2


def test_attention_matters_to_the_bundled_model(bundled):
    """Without attention, or with attention that cannot choose, most of what was learned is gone."""
    dense = flow_loss(bundled, clips=2)
    alone = flow_loss(bundled, lambda q, k, v, at: v, clips=2)
    mean = flow_loss(bundled, lambda q, k, v, at: v.mean(2, keepdim=True).expand_as(v), clips=2)
    assert min(alone, mean) > 1.5 * dense


def test_bundled_attention_is_concentrated(bundled):
    """Fewer tiles of 64 hold 90 % of the attention than in an untrained model (control)."""
    torch.manual_seed(0)
    trained, untrained = needed(bundled), needed(VideoModel(bundled.config).eval())
    assert trained.mean() < 0.75 * untrained.mean()
    assert trained.min() < 0.3, "some head is very sparse"


def needed(model) -> torch.Tensor:
    """Density of the fewest 64 x 64 tiles of each row that hold 90 % of its attention: `[layers, heads]`."""
    clip, noise = moving_shapes(1, 100).pixels, clip_of(1, 8, 32, 32, seed=100)
    found = []
    for q, k, _ in capture_video(model, 0.5 * clip + 0.5 * noise, 0.5).values():
        view = Everything().bind(q.shape[2], k.shape[2])
        layout = Layout(q, k, view, Tiling(64), Tiling(64), q.shape[3] ** -0.5)
        among = layout.kinds() != 0
        kept = Mass(0.9).select(TrueMass().score(layout, among), among, among & False)
        found.append(kept.float().mean((0, 2, 3)))
    return torch.stack(found)


def test_sampling_at_full_density_is_dense_sampling(bundled):
    """And at low density it is not (control)."""
    size = (4, 16, 16)
    dense = sample(bundled, 6, 1, size=size)
    full = Tiles(score=MeanPool(), select=Mass(1.0), tile=(64, 64))
    least = Tiles(score=MeanPool(), select=TopK(1), tile=(64, 64))
    torch.testing.assert_close(sample(bundled, 6, 1, full, size=size), dense, atol=1e-3, rtol=1e-3)
    assert (sample(bundled, 6, 1, least, size=size) - dense).abs().max() > 0.05


def test_samples_look_like_clips(bundled):
    """In range, of the clips' variance, smooth within a frame as clips are and noise is not (control)."""
    made = sample(bundled, 12, 2)
    clips, noise = moving_shapes(8, 0).pixels, clip_of(1, 8, 32, 32)

    def roughness(x):
        return float(x.diff(dim=3).square().mean() / x.var())

    assert made.abs().quantile(0.99) < 1.5
    assert 0.05 < made.var() < 0.6
    assert roughness(made) < 2 * roughness(clips) < roughness(noise)


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_heads_have_the_scores_they_name(kind):
    """q k^T without noise is the definition; with noise it differs by the stated standard deviation."""
    grid, head = (4, 8, 8), KINDS.index(kind)
    exact, noisy = video_qkv(grid, seed=1, noise=0.0), video_qkv(grid, seed=1, noise=0.2)
    assert exact.kinds == KINDS and exact.q.shape == exact.v.shape == (1, 3, 256, 32)
    wanted = exact.clean_scores(head)
    torch.testing.assert_close(exact.q[0, head] @ exact.k[0, head].T / 32**0.5, wanted, atol=1e-4, rtol=0)
    off = noisy.q[0, head] @ noisy.k[0, head].T / 32**0.5 - noisy.clean_scores(head)
    own = 20.0 if kind == "spatial" else 10.0
    assert float(off.std()) == pytest.approx(0.2 * math.sqrt(2 * own / 32**0.5 + 0.04), rel=0.1)


def test_synthetic_heads_attend_where_they_say():
    made = video_qkv(seed=2)
    t, h, w = places(made.grid)
    weights = [(made.q[0, i] @ made.k[0, i].T / 32**0.5).softmax(-1) for i in range(3)]
    frame, close = t[:, None] == t, ((h[:, None] - h).abs() <= 1) & ((w[:, None] - w).abs() <= 1)
    same = made.clusters[2][:, None] == made.clusters[2]
    inside = [[float((p * pairs).sum(-1).mean()) for pairs in (frame, close, same)] for p in weights]
    (spatial, temporal, semantic) = inside
    assert spatial[0] > 0.99 and temporal[0] < 0.2 and semantic[0] < 0.2
    assert temporal[1] > 0.85 and semantic[1] < 0.1
    assert semantic[2] > 0.99 and (made.clusters[:2] == -1).all()
    counts = made.clusters[2].bincount()
    assert len(counts) == 8 and counts.max() > 5 * counts.min()
    one = made.clusters[2].view(-1, 64)
    assert max(len(tile.unique()) for tile in one) == 8 and min(len(tile.unique()) for tile in one) > 4


def test_synthetic_clusters_are_found_by_k_means():
    """A few rounds from tokens far apart find them; features of a spatial head have no such clusters (control)."""
    made = video_qkv(seed=3)
    purity = []
    for head in (2, 0):
        x = made.k[0, head]
        centres = x[:1]
        for _ in range(7):
            centres = torch.cat((centres, x[torch.cdist(x, centres).amin(1).argmax()][None]))
        for _ in range(5):
            own = torch.cdist(x, centres).argmin(1)
            centres = torch.stack([x[own == i].mean(0) for i in range(8)])
        pairs = torch.zeros(8, 8).index_put_((own, made.clusters[2]), torch.ones(len(x)), accumulate=True)
        purity.append(float(pairs.amax(1).sum() / len(x)))
    assert purity[0] > 0.99 and purity[1] < 0.4


def test_synthetic_settings():
    assert torch.equal(video_qkv(seed=4).q, video_qkv(seed=4).q)
    assert not torch.equal(video_qkv(seed=4).q, video_qkv(seed=5).q)
    weak = video_qkv((2, 4, 4), heads=4, dim=64, clusters=3, strength=2.0, noise=0.0)
    assert weak.kinds[3] == "spatial" and weak.clusters.max() == 2 and weak.clean_scores(0).max() == 4.0
    assert float(near(torch.zeros(1), (0.3, 0.7))) == 1.0
    with pytest.raises(ValueError, match="dim must be at least 24 here"):
        video_qkv(dim=16)
    with pytest.raises(ValueError, match="grid must be at most 16"):
        video_qkv((2, 32, 8))
