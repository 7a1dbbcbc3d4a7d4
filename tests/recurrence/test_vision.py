"""What all layers for images and video keep: grids, padding, dtypes, places, inheritance, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tilewise.recurrence import LINA, BlockLinearAttention, InLine, LinFusion, LiT, VisionMixer
from tilewise.recurrence.vision import LocalConv, rotations, turn

WIDTH = 16


class OneBlock(BlockLinearAttention):
    """Without its state, so that it stands among the others."""

    def forward(self, x: Tensor, grid, *, mask=None):  # type: ignore[override]
        frames = grid if len(grid) == 3 else (1, *grid)
        return super().forward(x, frames, mask=mask)[0]


KINDS = {
    "inline": lambda tokens, **o: InLine(WIDTH, 2, **o),
    "inline-rope": lambda tokens, **o: InLine(
        WIDTH, 2, rope=True, qk_norm=True, local=5, features="relu", **o
    ),
    "lina": lambda tokens, **o: LINA(WIDTH, 2, tokens, rope=True, **o),
    "lina-subtract": lambda tokens, **o: LINA(WIDTH, 4, gate=False, conv=3, normalize="subtract", **o),
    "linfusion": lambda tokens, **o: LinFusion(WIDTH, 2, 12, qk_norm=True, rope=True, **o),
    "lit": lambda tokens, **o: LiT(WIDTH, 2, rope=True, qk_norm=True, **o),
    "lit-plain": lambda tokens, **o: LiT(WIDTH, 1, conv=0, features="elu", bias=False, **o),
    "block": lambda tokens, **o: OneBlock(WIDTH, 2, **o),
}
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def built(kind: str, tokens: int, dtype: torch.dtype = torch.float64, **options) -> VisionMixer:
    """All of its parameters random, so that none hides behind a zero."""
    torch.manual_seed(0)
    made = KINDS[kind](tokens, **options).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_kind
@pytest.mark.parametrize("grid", [(0, 4), (1, 1), (5, 3), (2, 3, 4), (1, 9, 7)])
def test_every_token_sees_every_token_on_any_grid(kind, grid):
    tokens = torch.Size(grid).numel()
    mixer, x = built(kind, max(1, tokens)), draw(2, tokens, WIDTH)
    if tokens == 0 and kind == "lina":
        return  # a gate has at least one place
    out = mixer(x, grid)
    assert out.shape == x.shape and out.isfinite().all()
    if tokens > 1:
        for at in (0, tokens - 1):
            other = x.clone()
            other[1, at] += 1
            moved = (mixer(other, grid) - out).abs().amax(2)
            assert (moved[1] > 1e-9).all() and (moved[0] == 0).all()


@every_kind
def test_every_parameter_learns(kind):
    mixer, x = built(kind, 12), draw(2, 12, WIDTH).requires_grad_()
    mixer(x, (3, 4)).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    # All keys moved alike change nothing where the mean weight is subtracted.
    idle = {"key.bias"} if kind == "inline" else set()
    missing = {name for name, p in mixer.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert missing == idle


@every_kind
def test_padding_is_not_there(kind):
    """Rows of a picture's grid behind its end, whatever they hold; a padded place gives 0."""
    mixer, x = built(kind, 32), draw(2, 32, WIDTH)
    if kind == "lina":
        mixer.key_gate = nn.Parameter(mixer.key_gate[:, :1].expand(-1, 20, -1))
        mixer.value_gate = nn.Parameter(mixer.value_gate[:, :1].expand(-1, 20, -1))
    want = mixer(x[:, :20], (5, 4))
    if kind == "lina":
        for name in ("key_gate", "value_gate"):
            setattr(mixer, name, nn.Parameter(getattr(mixer, name)[:, :1].expand(-1, 32, -1)))
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[:, :20] = True
    for hold in (1e4, float("nan")):
        padded = torch.cat((x[:, :20], torch.full((2, 12, WIDTH), hold, dtype=torch.float64)), 1)
        got = mixer(padded, (8, 4), mask=mask)
        torch.testing.assert_close(got[:, :20], want)
        assert (got[:, 20:] == 0).all()
        got.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    assert (mixer(x, (8, 4), mask=mask & False) == 0).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(kind, dtype):
    """As near to float64 as three times what rounding weights and inputs alone costs."""
    exact, low, rounded = built(kind, 35), built(kind, 35, dtype), built(kind, 35)
    rounded.load_state_dict(low.state_dict())
    x = draw(2, 35, WIDTH).to(dtype)
    want, by_weights = exact(x.double(), (5, 7)), rounded(x.double(), (5, 7))
    got = low(x, (5, 7))
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (got.double() - by_weights).norm() <= 3 * max((by_weights - want).norm(), eps * want.norm())


@every_kind
def test_strides_and_images_apart(kind):
    mixer, x = built(kind, 12), draw(3, 12, WIDTH)
    want = mixer(x, (3, 4))
    torch.testing.assert_close(mixer(x.mT.contiguous().mT, (3, 4)), want)
    torch.testing.assert_close(torch.cat([mixer(row, (3, 4)) for row in x.split(1)]), want)


@pytest.mark.parametrize("kind", ["inline", "inline-rope", "lina", "linfusion", "lit"])
def test_extra_tokens_stand_before_the_grid(kind):
    """They see and are seen, and have no place: the grid behind them is as without them."""
    mixer, x = built(kind, 15, extra=3), draw(1, 15, WIDTH)
    assert mixer(x, (3, 4)).shape == x.shape
    with torch.no_grad():
        mixer.value.weight.zero_()  # nothing is read: what is left is local
        if mixer.value.bias is not None:
            mixer.value.bias.zero_()
    if kind == "lina":
        got = mixer(x, (3, 4)) - mixer.out.bias
        alone = mixer.conv.conv(x[:, 3:].mT.unflatten(2, (3, 4))).flatten(2).mT @ mixer.out.weight.mT
        torch.testing.assert_close(got[:, 3:], alone)
        assert got[:, :3].abs().max() < 1e-12
    q = draw(1, 2, 15, 8)
    if mixer.rope:
        turned = mixer.turned(q, (3, 4))
        assert torch.equal(turned[:, :, :3], q[:, :, :3])
        torch.testing.assert_close(turned[:, :, 3:], turn(q[:, :, 3:], rotations((3, 4), 8)))


def test_rotations_may_begin_at_a_later_frame():
    later = rotations((2, 3, 5), 32, first=torch.tensor([0, 4]))
    whole = rotations((6, 3, 5), 32)
    torch.testing.assert_close(later[0][1], whole[0][0, 4 * 15 :])
    assert later[0].shape == (2, 30, 16)


def test_products_of_turned_vectors_depend_on_distance_alone():
    q, k = draw(2, 1, 1, 1, 8).expand(2, 1, 1, 20, 8)
    turns = rotations((4, 5), 8)
    scores = (turn(q, turns) @ turn(k, turns).mT)[0, 0].unflatten(0, (4, 5)).unflatten(2, (4, 5))
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3], rtol=1e-6, atol=1e-6)
    assert (scores[0, 0, 1, 2] - scores[0, 0, 2, 1]).abs() > 1e-3


def test_a_local_convolution_is_of_each_frame():
    conv, x = LocalConv(4, 3).double(), draw(2, 2 * 3 * 5, 4)
    want = conv.conv(x.unflatten(1, (2, 3, 5)).flatten(0, 1).permute(0, 3, 1, 2))
    torch.testing.assert_close(conv(x, (2, 3, 5)), want.permute(0, 2, 3, 1).reshape(2, 30, 4))


def test_inheritance_copies_the_projections():
    mixer, other = LiT(WIDTH, 2), InLine(WIDTH, 4)
    names = ("query", "key", "value", "out")
    mixer.inherit(**{name: getattr(other, name) for name in names})
    for name in names:
        mine, theirs = getattr(mixer, name), getattr(other, name)
        assert torch.equal(mine.weight, theirs.weight) and mine.weight is not theirs.weight
    before = mixer.query.weight.clone()
    with pytest.raises(ValueError, match=r"out must be \[16, 16\] with bias, got \[16, 16\] without bias"):
        mixer.inherit(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 16, bias=False))
    assert torch.equal(mixer.query.weight, before)


def test_what_is_refused():
    x = torch.randn(1, 12, WIDTH)
    with pytest.raises(ValueError, match=r"x must be \[B, N, 16\], got \[1, 12, 8\]"):
        LiT(WIDTH)(x[:, :, :8], (3, 4))
    with pytest.raises(ValueError, match=r"grid must be \(H, W\) or \(T, H, W\): what is local"):
        InLine(WIDTH, 2)(x)
    with pytest.raises(ValueError, match=r"grid must be \(H, W\) or \(T, H, W\), got \(12,\)"):
        LiT(WIDTH)(x, (12,))
    with pytest.raises(ValueError, match=r"grid \(3, 5\) and 0 extra tokens are 15 tokens, got 12"):
        LiT(WIDTH)(x, (3, 5))
    with pytest.raises(ValueError, match="must be a multiple of heads, got 16 and 3"):
        LiT(WIDTH, 3)
    with pytest.raises(ValueError, match="rope turns pairs and needs an even size of heads, got 1"):
        LiT(WIDTH, 16, rope=True)
    with pytest.raises(ValueError, match="conv must be an odd integer >= 1, got 4"):
        LiT(WIDTH, conv=4)
    with pytest.raises(ValueError, match="local must be an odd integer >= 1, got 2"):
        InLine(WIDTH, 2, local=2)
    with pytest.raises(ValueError, match="features must be one of 'elu'.*got 'gelu'"):
        InLine(WIDTH, 2, features="gelu")
    with pytest.raises(ValueError, match="extra must be an integer >= 0, got -1"):
        LiT(WIDTH, extra=-1)
    with pytest.raises(ValueError, match=r"mask must be bool \[1, 12\], got torch.bool \[1, 11\]"):
        LiT(WIDTH)(x, (3, 4), mask=torch.ones(1, 11, dtype=torch.bool))
    with pytest.raises(ValueError, match="tokens must be an integer >= 1 where there is a gate, got None"):
        LINA(WIDTH, 2)
    with pytest.raises(ValueError, match="x must have the gate's 9 tokens, got 12"):
        LINA(WIDTH, 2, 9)(x, (3, 4))
    with pytest.raises(ValueError, match="normalize must be 'divide' or 'subtract', got None"):
        LINA(WIDTH, 2, 9, normalize=None)
    with pytest.raises(ValueError, match="hidden must be an integer >= 1, got 0"):
        LinFusion(WIDTH, 2, 0)
    with pytest.raises(NotImplementedError, match="VisionMixer does not say how it mixes"):
        VisionMixer(WIDTH, 2)(x)
