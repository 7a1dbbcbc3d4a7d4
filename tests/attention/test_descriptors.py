"""Descriptor attention: against sums written out, chunk by chunk against at once, its cost, and what it loses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tilewise
from tilewise.attention.descriptors import (
    ChunkMemory,
    Compression,
    DescriptorAttention,
    cluster_frames,
    layer,
    rotate,
)

GRID = (6, 7)
BARE = {"special": 0, "reference": False, "every": None}


@pytest.fixture(autouse=True)
def one_thread():
    """Small products gain nothing from threads, and wait for them where other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(
    compression: Compression, dim: int = 32, heads: int = 4, dtype=torch.float64, *,
    kv_heads: int | None = None, qk_norm: bool = True, rope: float | None = 100.0, engine: str = "auto",
) -> DescriptorAttention:  # fmt: skip
    torch.manual_seed(3)
    return DescriptorAttention(
        dim=dim,
        heads=heads,
        compression=compression,
        kv_heads=kv_heads,
        qk_norm=qk_norm,
        rope=rope,
        engine=engine,
    ).to(dtype)


def frames(
    s: int, compression: Compression, grid=GRID, dim: int = 32, b: int = 2, dtype=torch.float64
) -> Tensor:
    g = torch.Generator().manual_seed(s)
    size = (b, s, compression.special + grid[0] * grid[1], dim)
    return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)


def steps(attention, x: Tensor, grid, lengths, **options) -> Tensor:
    out, state = [], None
    for part in x.split(lengths, 1):
        y, state = attention.step(part, grid, state, **options)
        out.append(y)
    return torch.cat(out, 1)


def by_hand(attention, x: Tensor, grid, chunk: int, whole=(0,)) -> Tensor:
    """One query at a time: its keys listed by what the paper says of them, a plain softmax over them."""
    c, (rows, columns) = attention.compression, grid
    small = (rows // c.ratio, columns // c.ratio)
    b, s, _, dim = x.shape
    weight, bias = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)

    def part(number: int, token: Tensor, place: tuple[int, int]) -> Tensor:
        y = (weight[number] @ token + bias[number]).view(attention.heads, -1)
        if number == 2:
            return y
        y = (attention.q_norm, attention.k_norm)[number](y)
        return turned(y, place, attention.rope)

    def place(index: int, width: int) -> tuple[int, int]:
        at = index - c.special
        return (0, 0) if at < 0 else (at // width + 1, at % width + 1)

    out = torch.empty_like(x)
    for entry in range(b):
        keys = []  # frame, stays, token, place
        for frame in range(s):
            patches = x[entry, frame, c.special :].view(rows, columns, dim)
            image = patches.permute(2, 0, 1).unsqueeze(0)
            kind = {"mode": c.kind, **({"align_corners": False} if c.kind == "bilinear" else {})}
            coarse = F.interpolate(image, small, **kind)[0].permute(1, 2, 0)
            stays = frame % c.retain == 0
            keys += [(frame, stays, x[entry, frame, i], (0, 0)) for i in range(c.special)]
            for i in range(small[0]):
                for j in range(small[1]):
                    at = (i * rows // small[0] + 1, j * columns // small[1] + 1)
                    keys.append((frame, stays, coarse[i, j], at))
            if frame in whole:
                for i in range(rows):
                    keys += [(frame, True, patches[i, j], (i + 1, j + 1)) for j in range(columns)]
        k = [part(1, token, at) for _, _, token, at in keys]
        v = [part(2, token, at) for _, _, token, at in keys]
        for frame in range(s):
            now = frame // chunk
            seen = [
                n
                for n, (f, stays, _, _) in enumerate(keys)
                if f // chunk == now or (f // chunk < now and stays)
            ]
            for index in range(x.shape[2]):
                q = part(0, x[entry, frame, index], place(index, columns))
                scores = torch.stack([(q * k[n]).sum(-1) for n in seen]) / math.sqrt(q.shape[-1])
                mixed = (scores.softmax(0).unsqueeze(-1) * torch.stack([v[n] for n in seen])).sum(0)
                out[entry, frame, index] = attention.proj(mixed.flatten())
    return out


def turned(y: Tensor, place: tuple[int, int], base: float | None) -> Tensor:
    """Rotation by complex numbers: `y [H, D]`."""
    if base is None:
        return y
    quarter = y.shape[1] // 4
    speed = base ** (-torch.arange(quarter, dtype=y.dtype) / quarter)
    halves = []
    for half, at in zip(y.chunk(2, 1), place):
        turn = torch.polar(torch.ones_like(speed), at * speed)
        z = torch.complex(*half.chunk(2, 1)) * turn
        halves.append(torch.cat([z.real, z.imag], 1))
    return torch.cat(halves, 1)


@pytest.mark.evidence
@pytest.mark.parametrize(("kind", "ratio"), [("bilinear", 2), ("bilinear", 3), ("nearest", 2)])
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_keys_are_the_papers(kind, ratio, chunk):
    """Resampled patches, special tokens and the whole first frame, of the own chunk and of memory; in 4 frames.

    Controls: a list without the first frame, or a layer that retains every frame, gives something else.
    """
    c = Compression(special=2, ratio=ratio, kind=kind, every=None, retain=2)
    attention, x = made(c, 16, 2), frames(4, c, (5, 4), 16, b=1)
    with torch.no_grad():
        got = attention(x, (5, 4), chunk=chunk)
        # Sums over 16 numbers, five in a row, each rounded to 2^-53, in values of order 1.
        assert (got - by_hand(attention, x, (5, 4), chunk)).abs().max() < 5 * 16 * 2.0**-53 * 10
        assert (got - by_hand(attention, x, (5, 4), chunk, whole=())).abs().max() > 1e-3
        if chunk < 4:
            attention.compression = Compression(special=2, ratio=ratio, kind=kind, every=None, retain=1)
            more = attention(x, (5, 4), chunk=chunk)
            assert (got - more).abs().max() > 1e-3


@pytest.mark.evidence
def test_bilinear_descriptors():
    """At ratio 4 the mean of the four patches in the middle of a cell: interpolation without antialiasing."""
    c = Compression(special=0, ratio=4)
    x = torch.randn(3, 8 * 12, 5, dtype=torch.float64)
    cells = x.view(3, 2, 4, 3, 4, 5)
    want = cells[:, :, 1:3, :, 1:3].mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(c.resample(x, (8, 12)), want, rtol=1e-12, atol=1e-12)
    mean = Compression(special=0, ratio=4, kind="mean").resample(x, (8, 12))
    torch.testing.assert_close(mean, cells.mean((2, 4)).flatten(1, 2), rtol=1e-12, atol=1e-12)
    assert (mean - want).abs().max() > 0.1


@pytest.mark.evidence
@pytest.mark.parametrize(("retain", "kv_heads"), [(1, 4), (2, 1), (3, 2)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 9])
def test_online_equals_offline(chunk, retain, kv_heads):
    """Chunk by chunk with a cache, and at once under the mask: the same, gradients too.

    Controls: without the mask, and with memory kept otherwise, results differ.
    """
    c = Compression(special=2, ratio=2, retain=retain, every=None)
    attention, x = made(c, kv_heads=kv_heads), frames(7, c)
    results = []
    for run in (lambda y: attention(y, GRID, chunk=chunk), lambda y: steps(attention, y, GRID, chunk)):
        attention.zero_grad()
        y = x.clone().requires_grad_()
        out = run(y)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), y.grad, *(p.grad.clone() for p in attention.parameters())])
    tokens = x[..., 0].numel()
    for a, b in zip(*results, strict=True):
        # Gradients of parameters are sums over all tokens, of terms up to 3; each addition rounds to 2^-53.
        assert (a - b).abs().max() <= tokens * 2.0**-53 * tokens * 3
    with torch.no_grad():
        apart = (attention(x, GRID) - results[0][0]).abs().max()
        assert apart > 1e-3 if chunk < 7 else apart < 1e-12
        attention.compression = Compression(special=2, ratio=2, retain=retain + 4, every=None)
        if chunk <= 3:  # then memory has lost a frame that a later chunk saw
            assert (attention(x, GRID, chunk=chunk) - results[0][0]).abs().max() > 1e-3


def counted(monkeypatch, run) -> int:
    """Scores per head that the calls to `attend` in `run` compute, by their masks token by token."""
    total = 0
    attend = layer.attend

    def count(q, k, v, *, mask=None, **options):
        nonlocal total
        total += int(
            tilewise.tiles.as_mask(mask)
            .bind(q.shape[2], k.shape[2])
            .tokens()
            .expand(-1, -1, q.shape[2], -1)
            .sum()
        )
        return attend(q, k, v, mask=mask, **options)

    with monkeypatch.context() as patched:
        patched.setattr(layer, "attend", count)
        with torch.no_grad():
            run()
    return total


@pytest.mark.evidence
def test_scores_fall_by_the_square_of_the_ratio(monkeypatch):
    """Counted where attention is called. Special tokens and whole frames are the only part that does not shrink."""
    grid, s, dim = (8, 8), 6, 8
    full = (s * 64) ** 2
    for ratio in (1, 2, 4, 8):
        c = Compression(ratio=ratio, **BARE)
        attention, x = made(c, dim, 2), frames(s, c, grid, dim, b=1)
        got = counted(monkeypatch, lambda a=attention, x=x: a(x, grid))
        assert got == full // ratio**2 == c.scores(s, grid)
    for special, reference, keyframes in [(5, False, None), (5, True, None), (1, True, torch.tensor([2, 4]))]:
        c = Compression(special=special, ratio=4, reference=reference, every=None)
        attention, x = made(c, dim, 2), frames(s, c, grid, dim, b=1)
        got = counted(monkeypatch, lambda a=attention, x=x, k=keyframes: a(x, grid, keyframes=k))
        more = reference + (0 if keyframes is None else len(keyframes))
        assert got == s * (special + 64) * (s * (special + 4) + more * 64)
        assert got == c.scores(s, grid, whole=more - reference)


@pytest.mark.evidence
def test_memory_and_scores_of_chunks(monkeypatch):
    """The cache grows by the descriptors of every `retain`-th frame: 5 * 4^2 less than all keys by default.

    Control: full attention over the same chunks, which caches every token.
    """
    grid, dim = (8, 8), 8
    for ratio, retain, chunk in [(4, 5, 5), (4, 5, 4), (2, 3, 6), (1, 1, 5)]:
        c = Compression(ratio=ratio, retain=retain, **BARE)
        attention, x = made(c, dim, 2), frames(20, c, grid, dim, b=1)
        state, lengths = None, []
        with torch.no_grad():
            for part in x.split(chunk, 1):
                _, state = attention.step(part, grid, state)
                lengths.append(state.length)
        per = 64 // ratio**2
        assert lengths == [per * math.ceil(min(n, 20) / retain) for n in range(chunk, 20 + chunk, chunk)]
        assert state.bytes == lengths[-1] * (2 * dim * 8 + 4)
        online = counted(monkeypatch, lambda a=attention, x=x, n=chunk: steps(a, x, grid, n))
        at_once = counted(monkeypatch, lambda a=attention, x=x, n=chunk: a(x, grid, chunk=n))
        assert online == at_once == c.scores(20, grid, chunk=chunk)
        everything = Compression(ratio=1, retain=1, **BARE).scores(20, grid, chunk=chunk)
        assert (online < everything / ratio**2) == (retain > 1)
    c = Compression(**BARE)
    assert 20 * 64 == c.retain * c.ratio**2 * c.retained(20) * c.per_frame(grid)


class Drawn(Compression):
    """The control: as many patches of each frame, drawn at random."""

    def resample(self, patches: Tensor, grid) -> Tensor:
        rows, columns = self.coarse(grid)
        g = torch.Generator().manual_seed(3)
        drawn = torch.rand(patches.shape[:-1], generator=g).argsort(-1)[..., : rows * columns, None]
        return patches.gather(-2, drawn.expand(*drawn.shape[:-1], patches.shape[-1]))


@pytest.mark.evidence
@pytest.mark.parametrize("seed", [0, 1])
def test_smooth_frames_lose_little(seed):
    """Against attention over all tokens: descriptors err far less than patches drawn at random, on smooth frames.

    On white noise nothing is left of this but that a descriptor is the mean of four patches, which can halve the
    error of drawing (a ratio of at most 2): the gain comes from neighbours being alike.
    """
    side, s, dim = 16, 6, 64
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(
        torch.randn(s, dim, 4, 4, generator=g), (side, side), mode="bicubic", align_corners=True
    )
    inputs = {
        "smooth": (smooth / smooth.std()).flatten(2).mT.unsqueeze(0),
        "noise": torch.randn(1, s, side * side, dim, generator=g),
    }
    torch.manual_seed(seed)
    attention = DescriptorAttention(dim, 4, Compression(ratio=1, **BARE), rope=None)
    gains, errors = {}, {}
    with torch.no_grad():
        for name, x in inputs.items():
            attention.compression = Compression(ratio=1, **BARE)
            full = attention(x, (side, side))
            size = (full - attention.proj.bias).norm()
            for ratio in (2, 4):
                off = []
                for kind in (Compression, Drawn):
                    attention.compression = kind(ratio=ratio, **BARE)
                    off.append(float((attention(x, (side, side)) - full).norm() / size))
                gains[name, ratio], errors[name, ratio] = off[1] / off[0], off[0]
    assert gains["smooth", 2] > 8 and gains["smooth", 4] > 4, gains
    assert gains["noise", 2] < 2 and gains["noise", 4] < 2, gains
    assert errors["smooth", 2] < 0.05 and errors["smooth", 4] < 0.2, errors


@pytest.mark.evidence
@pytest.mark.parametrize("kind", ["bilinear", "nearest", "mean"])
def test_weighed_descriptors_of_constant_cells_are_exact(kind):
    """Frames that are constant within cells of 2 x 2: the log of 4 on descriptors gives attention over all tokens.

    Control: unweighed, special tokens count four times as much as they should.
    """
    options = {"special": 3, "reference": False, "every": None}
    weighed, plain = (Compression(ratio=2, kind=kind, weigh=w, **options) for w in (True, False))
    attention = made(weighed, rope=None)
    coarse = torch.randn(2, 4, 3, 4, 32, dtype=torch.float64)
    patches = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2, 3)
    x = torch.cat([torch.randn(2, 4, 3, 32, dtype=torch.float64), patches], 2)
    out = []
    for c in (weighed, plain, Compression(ratio=1, **options)):
        attention.compression = c
        out.append(attention(x, (6, 8)).detach())
    # log(4) is float32: relative error 2^-24 of 1.39, in weights that sum to 1.
    assert (out[0] - out[2]).abs().max() < 2.0**-22 * float(out[2].abs().max())
    assert (out[1] - out[2]).abs().max() > 1e-2
    attention.compression = weighed
    assert (steps(attention, x, (6, 8), 4) - out[2]).abs().max() < 2.0**-22 * float(out[2].abs().max())


@pytest.mark.evidence
def test_clusters_find_every_scene():
    """Uneven scenes: clustering names a frame of each. Control: as many at a fixed stride miss the short ones."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        sizes = [23, 4, 3, 25, 5]
        scene = torch.arange(5).repeat_interleave(torch.tensor(sizes))
        centres = 3 * torch.randn(2, 5, 16, generator=g)
        x = centres[:, scene] + 0.3 * torch.randn(2, 60, 16, generator=g)
        found = cluster_frames(x, 5)
        assert found.shape == (2, 5) and (found > 0).all() and (found.diff(dim=1) > 0).all()
        for row in found:
            assert set(scene[row].tolist()) == set(range(5))
    assert len(set(scene[::12].tolist())) < 5


@pytest.mark.parametrize("s", [2, 3, 10])
def test_clusters_are_distinct_even_among_equal_frames(s):
    for x in (torch.zeros(2, s, 4), torch.ones(1, s, 4), torch.randn(1, s, 4)):
        for count in range(s):
            found = cluster_frames(x, count, rounds=3)
            assert found.shape == (len(x), count) and all(len(set(row)) == count for row in found.tolist())
            assert not (found == 0).any()
    with pytest.raises(ValueError, match=rf"count must be in 0..{s - 1} for {s} frames"):
        cluster_frames(x, s)


def test_keyframes():
    """Found by clustering at once, none in chunks; given ones instead; frame 0 need not be named, but may be."""
    c = Compression(special=1, ratio=3, every=3)
    attention, x = made(c), frames(9, c)
    chosen = cluster_frames(x.mean(2), 3)
    torch.testing.assert_close(attention(x, GRID), attention(x, GRID, keyframes=chosen))
    rows = [attention(x[i : i + 1], GRID, keyframes=chosen[i]) for i in range(2)]
    torch.testing.assert_close(attention(x, GRID), torch.cat(rows))
    alone = attention(x, GRID, keyframes=torch.zeros(0, dtype=torch.int64))
    assert (alone - attention(x, GRID)).abs().max() > 1e-3
    few = x[:, :5]  # one cluster is not worth it
    torch.testing.assert_close(attention(few, GRID), attention(few, GRID, keyframes=torch.tensor([0])))
    named = torch.tensor([0, 3, 6])
    torch.testing.assert_close(attention(x, GRID, keyframes=named), attention(x, GRID, keyframes=named[1:]))
    both = torch.tensor([[0, 4], [7, 0]])
    torch.testing.assert_close(
        attention(x, GRID, keyframes=both), attention(x, GRID, keyframes=both.sort(1).values)
    )
    without = made(Compression(special=1, ratio=3, every=3, reference=False))
    assert (without(x, GRID, keyframes=named) - without(x, GRID, keyframes=named[1:])).abs().max() > 1e-3


def test_keyframes_of_chunks():
    """Kept whole from their own chunk on; `forward` counts them in the sequence, `step` in the chunk."""
    c = Compression(special=1, ratio=3, retain=4)
    attention, x = made(c), frames(8, c)
    want = attention(x, GRID, chunk=4, keyframes=torch.tensor([2, 5]))
    first, state = attention.step(x[:, :4], GRID, keyframes=torch.tensor([2]))
    second, state = attention.step(x[:, 4:], GRID, state, keyframes=torch.tensor([[1], [1]]))
    torch.testing.assert_close(torch.cat([first, second], 1), want)
    assert state.length == 3 * 42 + 2 * 5
    assert (attention(x, GRID, chunk=4) - want).abs().max() > 1e-3
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(attention(changed, GRID, chunk=4, keyframes=torch.tensor([2, 5]))[:, :4], want[:, :4])


def test_a_chunk_can_be_taken_again():
    c = Compression(special=2, ratio=2)
    attention, x = made(c), frames(6, c)
    _, state = attention.step(x[:, :3], GRID)
    length = state.length
    one = attention.step(x[:, 3:], GRID, state)[0]
    attention.step(x[:, :2], GRID, state)
    assert state.length == length and torch.equal(attention.step(x[:, 3:], GRID, state)[0], one)


def test_nothing_compressed_is_dense_attention():
    """Ratio 1 without anything whole: softmax over all tokens, as one call of PyTorch's."""
    c = Compression(special=3, ratio=1, reference=False, every=None)
    for options in ({"rope": None}, {"rope": None, "qk_norm": False}, {"rope": 100.0}):
        attention, x = made(c, **options), frames(3, c)
        q, k, v = (attention.qkv(x.flatten(1, 2)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)).unbind(0)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if options["rope"] is not None:
            at = torch.cartesian_prod(torch.arange(1, 7), torch.arange(1, 8))
            at = torch.cat([torch.zeros(3, 2, dtype=torch.int64), at]).repeat(3, 1).unsqueeze(0)
            q, k = rotate(q, at), rotate(k, at)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention(x, GRID), attention.proj(out).view_as(x))


def test_rotation_is_multiplication_of_complex_numbers():
    x, places = torch.randn(1, 3, 20, 16, dtype=torch.float64), torch.randint(0, 40, (1, 20, 2))
    got = rotate(x, places, base=50.0)
    for n in range(20):
        torch.testing.assert_close(got[0, :, n], turned(x[0, :, n], places[0, n].tolist(), 50.0))
    assert torch.equal(rotate(x, 0 * places), x)


def test_parameters_are_those_of_vggt():
    names = ["qkv.weight", "qkv.bias", "q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"]
    attention = made(Compression(), 32, 4)
    assert list(attention.state_dict()) == [*names, "proj.weight", "proj.bias"]
    assert attention.qkv.weight.shape == (96, 32) and attention.q_norm.weight.shape == (8,)
    assert "Compression(special=5, ratio=4" in repr(attention)


def test_grouped_heads_are_repeated_ones():
    c = Compression(special=1, ratio=2)
    few, many = made(c, kv_heads=2), made(c)
    x = frames(3, c)
    with torch.no_grad():
        for name in ("weight", "bias"):
            q, k, v = getattr(few.qkv, name).split([32, 16, 16])
            wide = [part.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v)]
            getattr(many.qkv, name).copy_(torch.cat([q, *wide]))
    many.proj.load_state_dict(few.proj.state_dict())
    torch.testing.assert_close(few(x, GRID), many(x, GRID))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weigh", [False, True])
def test_dtypes(dtype, weigh):
    c = Compression(special=2, ratio=2, retain=2, weigh=weigh)
    attention = made(c, dtype=dtype)
    exact = made(c)
    exact.load_state_dict(attention.state_dict())
    x = frames(4, c, dtype=dtype)
    want = exact(x.double(), GRID, chunk=2)
    # About ten roundings one after the other, in values up to 4.
    close = 10 * 4 * torch.finfo(dtype).eps
    with torch.no_grad():
        for out in (attention(x, GRID, chunk=2), steps(attention, x, GRID, 2)):
            assert out.dtype == dtype and (out.double() - want).abs().max() < close


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_engines(engine):
    c = Compression(special=2, ratio=2, retain=2, weigh=True)
    attention, other = made(c, dtype=torch.float32, engine=engine), made(c)
    x = frames(5, c)
    other.load_state_dict(attention.state_dict())
    with torch.no_grad():
        got = attention(x.float(), GRID, chunk=2)
    assert (got.double() - other(x, GRID, chunk=2)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["bilinear", "nearest", "mean"])
@pytest.mark.parametrize("s", [0, 1, 2])
@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (17, 2)])
def test_any_length_and_grid(kind, s, grid):
    c = Compression(special=1, ratio=2, kind=kind)
    attention, x = made(c, dtype=torch.float32), frames(s, c, grid, dtype=torch.float32).requires_grad_()
    for run in (attention(x, grid), attention(x, grid, chunk=1), attention.step(x, grid)[0]):
        assert run.shape == x.shape and run.isfinite().all()
    attention(x, grid).sum().backward()
    assert x.grad.isfinite().all()


def test_compiles_whole():
    """At once, in chunks, with clusters and with a state; given key frames are looked at, which a graph cannot."""
    c = Compression(special=2, ratio=2, every=3)
    attention, x = made(c, dtype=torch.float32), frames(7, c, dtype=torch.float32)
    runs = (
        lambda y: attention(y, GRID),
        lambda y: attention(y, GRID, chunk=2),
        lambda y: steps(attention, y, GRID, 3),
    )
    for run in runs:
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), run(x))


def test_an_empty_first_chunk_changes_nothing():
    c = Compression(special=1, ratio=2)
    attention, x = made(c), frames(3, c)
    _, state = attention.step(x[:, :0], GRID)
    assert state.length == 0
    assert torch.equal(attention.step(x, GRID, state)[0], attention.step(x, GRID)[0])


def test_the_future_is_not_seen():
    c = Compression(special=1, ratio=2, retain=2)
    attention, x = made(c), frames(7, c)
    changed = x.clone()
    changed[:, 4:] *= -1
    assert torch.equal(attention(x, GRID, chunk=2)[:, :4], attention(changed, GRID, chunk=2)[:, :4])


def test_mask():
    q, k = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2])
    stays = torch.tensor([True, False, False, True, False])
    seen = ChunkMemory(q, k, stays).bind(4, 5).tokens()[0, 0]
    want = [[1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    assert seen.int().tolist() == want
    with pytest.raises(ValueError, match=r"k_chunk must be \[4\] or \[B, 1, 4\], got \[5\]"):
        ChunkMemory(q, k, stays).bind(4, 4)


def test_a_state_of_other_frames_is_refused():
    c = Compression(special=2, ratio=2)
    attention, x = made(c), frames(3, c)
    _, state = attention.step(x, GRID)
    turned_grid = (GRID[1], GRID[0])
    with pytest.raises(
        ValueError, match=r"state holds descriptors of grid \(6, 7\), this chunk has \(7, 6\)"
    ):
        attention.step(x, turned_grid, state)
    with pytest.raises(ValueError, match="compression Compression.*ratio=2.*this chunk has .*ratio=3"):
        made(Compression(special=2, ratio=3)).step(x, GRID, state)
    with pytest.raises(ValueError, match="dtype torch.float64, this chunk has torch.float32"):
        made(c, dtype=torch.float32).step(x.float(), GRID, state)
    with pytest.raises(ValueError, match=r"\(2, 4, 8\), this chunk has \(1, 4, 8\)"):
        attention.step(x[:1], GRID, state)
    with pytest.raises(ValueError, match=r"\(2, 4, 8\), this chunk has \(2, 2, 8\)"):
        made(c, kv_heads=2).step(x, GRID, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"special": -1}, "special must be an integer >= 0, got -1"),
        ({"ratio": 0}, "ratio must be an integer >= 1, got 0"),
        ({"retain": 1.5}, "retain must be an integer >= 1, got 1.5"),
        ({"every": 0}, "every must be None or an integer >= 1, got 0"),
        ({"kind": "bicubic"}, "kind must be one of bilinear, nearest, mean, got 'bicubic'"),
    ],
)
def test_bad_compression(arguments, message):
    with pytest.raises(ValueError, match=message):
        Compression(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be an integer >= 1, got 0"),
        ({"heads": 5}, "heads 5 must divide dim 32"),
        ({"kv_heads": 3}, "multiple of kv_heads 3"),
        ({"heads": 16}, "head_dim in multiples of 4, got 100.0, 2"),
        ({"rope": -1.0}, "rope needs a base > 0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        DescriptorAttention(**{"dim": 32, "heads": 4, **arguments})


def test_bad_input():
    c = Compression(special=2, ratio=4)
    attention, x = made(c), frames(3, c)
    for grid in ((3, 7), (6,), (6.0, 7)):
        with pytest.raises(ValueError, match=r"grid must be \(H, W\), both integers >= ratio 4"):
            attention(x, grid)
    with pytest.raises(
        ValueError, match=r"x must be \[B, S, 44, 32\] for grid \(6, 7\), got \[2, 3, 43, 32\]"
    ):
        attention(x[:, :, 1:], GRID)
    with pytest.raises(ValueError, match="got list"):
        attention.step([x], GRID)
    for chunk in (0, 2.0):
        with pytest.raises(ValueError, match="chunk must be None or an integer >= 1"):
            attention(x, GRID, chunk=chunk)
    for keyframes in (torch.tensor([3]), torch.tensor([-1]), torch.tensor([1, 1])):
        with pytest.raises(ValueError, match=r"keyframes must be distinct numbers in 0\.\.2"):
            attention(x, GRID, keyframes=keyframes)
    with pytest.raises(ValueError, match=r"keyframes must be \[n\] or \[2, n\], got \[3, 1\]"):
        attention(x, GRID, keyframes=torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="frame 0 in every batch entry or in none"):
        attention(x, GRID, keyframes=torch.tensor([[0, 1], [1, 2]]))
    for keyframes in ([1], torch.tensor([1.0]), torch.tensor(1)):
        with pytest.raises(TypeError, match="keyframes must be None or an int64 tensor"):
            attention(x, GRID, keyframes=keyframes)
