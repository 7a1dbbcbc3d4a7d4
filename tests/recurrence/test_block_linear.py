"""Block linear attention: streamed block after block it is the whole, with a state of one size."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.recurrence import BlockLinearAttention, BlocksSeen
from tilewise.recurrence.vision import rotations, turn

WIDTH, HEADS, AREA, BLOCK = 32, 2, (3, 4), 2
PLACES = AREA[0] * AREA[1]


def layer(dtype: torch.dtype = torch.float64, **options) -> BlockLinearAttention:
    torch.manual_seed(0)
    return BlockLinearAttention(WIDTH, HEADS, **options).to(dtype).eval()


def clip(frames: int, seed: int = 1, b: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(b, frames * PLACES, WIDTH, generator=gen, dtype=torch.float64).to(dtype)


def stream(mixer: BlockLinearAttention, x: Tensor, frames: int = BLOCK) -> tuple[Tensor, list[BlocksSeen]]:
    """Block after block, each with the state that the one before left."""
    state, outs, states = None, [], []
    for part in x.split(frames * PLACES, 1):
        out, state = mixer(part, (part.shape[1] // PLACES, *AREA), state)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 1), states


def written_out(mixer: BlockLinearAttention, x: Tensor, block: int, weigh_turned: bool = False) -> Tensor:
    """The attention matrix of block-causal linear attention, `N x N`, from the layer's weights."""
    frames = x.shape[1] // PLACES
    q, k = (
        mixer.features(
            F.rms_norm(made(x), (WIDTH,), norm.weight, 1e-5).unflatten(2, (HEADS, -1)).transpose(1, 2)
        )
        for made, norm in ((mixer.query, mixer.q_norm), (mixer.key, mixer.k_norm))
    )
    v = mixer.value(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
    turns = rotations((frames, *AREA), q.shape[3])
    turned_q, turned_k = turn(q, turns), turn(k, turns)
    owner = torch.arange(frames).repeat_interleave(PLACES) // block
    seen = owner.unsqueeze(1) >= owner
    below = (turned_q @ turned_k.mT if weigh_turned else q @ k.mT).masked_fill(~seen, 0)
    made = (turned_q @ turned_k.mT).masked_fill(~seen, 0) / below.sum(3, keepdim=True)
    return mixer.out((made @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("block", [1, 2, 5, None])
def test_it_is_its_attention_matrix(block):
    """With gradients; a block of all frames is linear attention without order."""
    mixer, x = layer(), clip(7).requires_grad_()
    got, want = mixer(x, (7, *AREA), block=block)[0], written_out(mixer, x, block or 7)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    weight = torch.randn_like(want)
    both = [torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()]) for y in (got, want)]
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.evidence
@torch.no_grad()
def test_streaming_is_the_block_causal_whole_and_its_state_is_of_one_size():
    """Block after block equals all at once, and the state after any block is as large as after the first,
    while a softmax cache grows by every key and value. Controls: with sums that are not handed on, and with
    sums of the block before alone, the later blocks are wrong."""
    mixer, x = layer(), clip(24)
    whole, last = mixer(x, (24, *AREA), block=BLOCK)
    got, states = stream(mixer, x)
    torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(states[-1].sums.products, last.sums.products)
    assert len({state.bytes for state in states}) == 1
    cache = [2 * (i + 1) * BLOCK * PLACES * WIDTH * 8 * len(x) for i in range(12)]  # keys and values, float64
    assert states[0].bytes < cache[0] and cache[-1] == 12 * cache[0] > 10 * states[-1].bytes
    first = slice(0, BLOCK * PLACES)
    places = torch.arange(x.shape[1]).split(BLOCK * PLACES)

    def error(parts: list[Tensor]) -> list[float]:
        return [
            float((part - whole[:, rows]).norm() / whole[:, rows].norm()) for part, rows in zip(parts, places)
        ]

    alone, pairs = [], []
    for i, rows in enumerate(places):
        nothing = mixer._nothing(x)
        here = BlocksSeen(nothing.sums, nothing.frames + BLOCK * i)
        alone.append(mixer(x[:, rows], (BLOCK, *AREA), here)[0])
        before = places[i - 1] if i else rows[:0]
        _, near = mixer(
            x[:, before], (len(before) // PLACES, *AREA), BlocksSeen(nothing.sums, here.frames - BLOCK)
        )
        pairs.append(mixer(x[:, rows], (BLOCK, *AREA), BlocksSeen(near.sums, here.frames))[0])
    assert torch.equal(alone[0], got[:, first]) and min(error(alone)[1:]) > 0.05
    assert max(error(pairs)[:2]) < 1e-9 and min(error(pairs)[2:]) > 0.05


def test_any_calls_of_whole_blocks_give_the_same():
    """Several blocks a call, a state carried on through float32 and bfloat16, rows chosen anew."""
    mixer, x = layer(), clip(12)
    whole, _ = mixer(x, (12, *AREA), block=BLOCK)
    for borders in ([0, 4, 12], [0, 2, 8, 10, 12]):
        state, outs = None, []
        for start, end in itertools.pairwise(borders):
            part = x[:, start * PLACES : end * PLACES]
            out, state = mixer(part, (end - start, *AREA), state, block=BLOCK)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-12)
    _, half = mixer(x[:, : 6 * PLACES], (6, *AREA), block=BLOCK)
    rows = torch.tensor([1, 1, 0])
    out, _ = mixer(x[rows, 6 * PLACES :], (6, *AREA), half.select(rows), block=BLOCK)
    torch.testing.assert_close(out, whole[rows, 6 * PLACES :], rtol=1e-9, atol=1e-12)
    again, _ = mixer(x[:, 6 * PLACES :], (6, *AREA), half, block=BLOCK)  # a block may be tried many times
    assert torch.equal(again[rows], out)


def test_a_long_stream_in_float32_stays_at_rounding():
    """4,800 tokens: against float64, no more than twice what the whole call in float32 loses."""
    mixer, exact, x = layer(torch.float32), layer(), clip(400, b=1)
    want, _ = exact(x, (400, *AREA), block=BLOCK)
    whole = (mixer(x.float(), (400, *AREA), block=BLOCK)[0].double() - want).norm()
    got = (stream(mixer, x.float())[0].double() - want).norm()
    plain = (written_out(mixer, x.float(), BLOCK).double() - want).norm()
    assert got <= 2 * whole and whole <= 2 * plain


def test_no_block_sees_a_later_one():
    """Bit for bit; within a block all see all."""
    mixer, x = layer(torch.float32), clip(8, dtype=torch.float32)
    want, _ = mixer(x, (8, *AREA), block=BLOCK)
    size = BLOCK * PLACES
    for start in (size, 3 * size - 1):
        other = x.clone()
        other[:, start:] += torch.randn_like(other[:, start:])
        got, _ = mixer(other, (8, *AREA), block=BLOCK)
        border = start // size * size
        assert torch.equal(got[:, :border], want[:, :border])
        assert ((got - want)[:, border:].abs().amax(2) > 0).all()


@pytest.mark.evidence
def test_relu_features_keep_denominators_positive_and_others_do_not():
    """With ReLU behind which features are turned, and denominators of those that are not turned, every
    denominator is above 0 and outputs stay within a few times the values. Controls: without a map of
    features, and with turned features in the denominator, denominators change their sign, and outputs where
    they are near 0 grow."""
    x = clip(60, b=1)
    found = {}
    for name, features, turned in (
        ("relu", "relu", False), ("no map", None, False), ("turned denominators", "relu", True)
    ):  # fmt: skip
        mixer = layer(features=features)
        with torch.no_grad():
            q, k = (
                mixer.features(norm(made(x)).unflatten(2, (HEADS, -1)).transpose(1, 2))
                for made, norm in ((mixer.query, mixer.q_norm), (mixer.key, mixer.k_norm))
            )
            if turned:
                q, k = (turn(part, rotations((60, *AREA), 16)) for part in (q, k))
            below = (q @ k.mean(2, keepdim=True).mT).flatten()
            mixer.out.weight.copy_(torch.eye(WIDTH))
            out = written_out(mixer, x, 60, turned) if turned else mixer(x, (60, *AREA))[0]
            values = mixer.value(x).abs().max()
        found[name] = float(below.min()), float(out.abs().max() / values)
    assert found["relu"][0] > 0 and found["relu"][1] < 2, found
    assert found["no map"][0] < 0 and found["no map"][1] > 20, found
    assert found["turned denominators"][0] < 0, found
    assert found["turned denominators"][1] > 5 * found["relu"][1], found


def test_states_and_blocks_that_do_not_fit():
    mixer, x = layer(), clip(4)
    _, state = mixer(x, (4, *AREA))
    with pytest.raises(ValueError, match=r"grid must be \(T, H, W\), got \(16, 3\)"):
        mixer(x, (16, 3))
    with pytest.raises(ValueError, match="block must be None or an integer >= 1, got 0"):
        mixer(x, (4, *AREA), block=0)
    with pytest.raises(ValueError, match=r"state must hold sums \[1, 2, 16, 16\], got \[2, 2, 16, 16\]"):
        mixer(x[:1], (4, *AREA), state)
    with pytest.raises(ValueError, match=r"state must hold sums .*, got dict"):
        mixer(x, (4, *AREA), {})
