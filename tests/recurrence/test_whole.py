"""`whole_attention`: equal to its weights written out, for any shape, dtype, stride, group and padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.recurrence import Sums, whole_attention
from tilewise.recurrence.whole import gather, read

NORMALIZE = (None, "divide", "subtract")
every_normaliser = pytest.mark.parametrize("normalize", NORMALIZE)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(n: int = 40, h: int = 2, h_q: int = 4, d: int = 8, e: int = 5, b: int = 2) -> tuple[Tensor, ...]:
    """Queries and keys that are not negative, and values."""
    return F.relu(draw(b, h_q, n, d)) + 0.1, F.relu(draw(b, h, n, d, seed=1)), draw(b, h, n, e, seed=2)


def weights(
    q: Tensor, k: Tensor, normalize: str | None, scale=None, eps=0.0, weigh=None, mask=None
) -> Tensor:
    """The attention matrix `[B, H_q, N, N]` as the docstring has it, in the dtype given."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask
    n = seen.sum(1).clamp(min=1).view(-1, 1, 1, 1).to(q.dtype)
    seen = seen.view(q.shape[0], 1, 1, -1)
    scores = (q @ k.mT).masked_fill(~seen, 0)
    if normalize == "divide":
        below = scores if weigh is None else weights(*weigh, None, 1.0, mask=mask) * n
        below = below.sum(-1, keepdim=True) / n + eps
        made = torch.where(below == 0, 0, scores / (n * below))
    else:
        scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
        made = scores / n
        if normalize == "subtract":
            made = (scores - scores.sum(-1, keepdim=True) / n) / n + 1 / n
    return made.masked_fill(~(seen & seen.mT), 0)


def written_out(q: Tensor, k: Tensor, v: Tensor, normalize: str | None, **options) -> Tensor:
    return weights(q, k, normalize, **options) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


@every_normaliser
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 33, 129, 1000])
@pytest.mark.parametrize("h_q", [2, 4, 14])
def test_it_is_its_weights_forward_and_backward(normalize, n, h_q):
    given = [x.requires_grad_() for x in features(n, h_q=h_q)]
    got, want = whole_attention(*given, normalize=normalize), written_out(*given, normalize)
    assert got.shape == (2, h_q, n, 5)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    weight = draw(*want.shape, seed=5)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), given) for x in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@every_normaliser
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_error_is_at_most_twice_that_of_plain_code(normalize, dtype, shift):
    """Against float64 on the same rounded inputs, with keys around 0 and around 4; zeros fail."""
    q, k, v = (x.to(dtype) for x in features(500))
    k = k + shift
    want = written_out(q.double(), k.double(), v.double(), normalize)
    plain = (written_out(q, k, v, normalize).double() - want).norm()
    got = whole_attention(q, k, v, normalize=normalize)
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= 2 * plain < 0.5 * want.norm()


@every_normaliser
def test_padding_is_not_there(normalize):
    """Anywhere, whatever it holds; rows that are all padding give 0, and no gradient is lost to it."""
    q, k, v = features(30)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(3)) < 0.6
    dirty = [x.masked_fill(~mask.view(2, 1, 30, 1), float("nan")).requires_grad_() for x in (q, k, v)]
    got = whole_attention(*dirty, normalize=normalize, mask=mask)
    for row in range(2):
        kept = [x[row : row + 1, :, mask[row]] for x in (q, k, v)]
        want = whole_attention(*kept, normalize=normalize)
        torch.testing.assert_close(got[row : row + 1, :, mask[row]], want)
    assert (got.masked_select(~mask.view(2, 1, 30, 1)) == 0).all()
    got.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in dirty)
    none = whole_attention(q, k, v, normalize=normalize, mask=torch.zeros(2, 30, dtype=torch.bool))
    assert (none == 0).all()


@every_normaliser
def test_strides(normalize):
    """Transposed, sliced out of one projection, and expanded."""
    fused = draw(2, 33, 3 * 16)
    views = [x.unflatten(-1, (2, 8)).transpose(1, 2).abs() for x in fused.chunk(3, -1)]
    want = whole_attention(*(x.contiguous() for x in views), normalize=normalize)
    torch.testing.assert_close(whole_attention(*views, normalize=normalize), want)
    other = [x.transpose(1, 2) for x in views]
    got = whole_attention(*other, normalize=normalize, layout="bnhd")
    torch.testing.assert_close(got, want.transpose(1, 2))
    one = [x[:1].expand(3, -1, -1, -1) for x in views]
    torch.testing.assert_close(whole_attention(*one, normalize=normalize)[2], want[0])


@every_normaliser
def test_sums_add_up(normalize):
    """Tokens may be read in parts, in any order: the sums of all are what the whole reads."""
    q, k, v = features(50)
    parts = [gather(k[:, :, at], v[:, :, at]) for at in (slice(30, 50), slice(0, 1), slice(1, 30))]
    both: Sums = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(read(q, both, normalize), whole_attention(q, k, v, normalize=normalize))
    assert both.bytes == 8 * (2 * 2 * 8 * 5 + 2 * 2 * 8 + 2 * 2 * 5 + 2)
    empty = gather(k[:, :, :0], v[:, :, :0])
    assert (read(q, empty, normalize) == 0).all() and torch.equal((both + empty).products, both.products)


def test_other_features_may_weigh():
    """Numerators of features turned by positions, denominators of those that are not."""
    q, k, v = features(20)
    turned = q.roll(3, 3) - 0.5, k.roll(1, 3) - 0.2
    got = whole_attention(*turned, v, weigh=(q, k), eps=0.01)
    torch.testing.assert_close(got, written_out(*turned, v, "divide", weigh=(q, k), eps=0.01))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 7:] = False
    got = whole_attention(*turned, v, weigh=(q, k), mask=mask)
    torch.testing.assert_close(got, written_out(*turned, v, "divide", weigh=(q, k), mask=mask))
    swapped = [x.transpose(1, 2) for x in (*turned, v, q, k)]
    torch.testing.assert_close(
        whole_attention(*swapped[:3], weigh=tuple(swapped[3:]), layout="bnhd").transpose(1, 2),
        whole_attention(*turned, v, weigh=(q, k)),
    )
    wider = torch.cat((q, q), 3), torch.cat((k, k), 3)
    torch.testing.assert_close(
        whole_attention(*turned, v, weigh=wider), whole_attention(*turned, v, weigh=(2 * q, k))
    )


def test_options():
    q, k, v = features(20)
    for scale in (0.3, -2.0):
        for normalize in (None, "subtract"):
            got = whole_attention(q, k, v, normalize=normalize, scale=scale)
            torch.testing.assert_close(got, written_out(q, k, v, normalize, scale=scale))
    torch.testing.assert_close(whole_attention(q, k, v, eps=0.3), written_out(q, k, v, "divide", eps=0.3))
    zero = torch.zeros_like(q).requires_grad_()
    nothing = whole_attention(zero, k, v)
    nothing.sum().backward()
    assert (nothing == 0).all() and zero.grad is not None and (zero.grad == 0).all()


def test_autocast_does_not_round_the_sums():
    q, k, v = (x.float() for x in features(200))
    want = whole_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole_attention(q, k, v), want)


def test_compiles_whole():
    q, k, v = (x.float() for x in features(33))
    for normalize in NORMALIZE:
        compiled = torch.compile(whole_attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(q, k, v, normalize=normalize), whole_attention(q, k, v, normalize=normalize)
        )


def test_nothing_is_n_by_n():
    """The largest tensor made at 20,000 tokens, forward and backward, is as large as its inputs."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in _tensors(out))])
            return out

    q, k, v = (torch.rand(1, 2, 20_000, 8).requires_grad_() for _ in range(3))
    with Sizes():
        for normalize in NORMALIZE:
            whole_attention(q, k, v, normalize=normalize).sum().backward()
    assert largest == q.numel()


def _tensors(out) -> list[Tensor]:
    return [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]


def test_what_is_refused():
    q, k, v = features(20)
    with pytest.raises(ValueError, match="normalize must be one of None, 'divide', 'subtract', got 'sum'"):
        whole_attention(q, k, v, normalize="sum")
    with pytest.raises(ValueError, match="normalize 'divide' takes no scale, which cancels, got 2.0"):
        whole_attention(q, k, v, scale=2.0)
    with pytest.raises(ValueError, match="weigh and eps are for normalize 'divide', got normalize None"):
        whole_attention(q, k, v, normalize=None, eps=1.0)
    with pytest.raises(ValueError, match="layout must be 'bhnd' or 'bnhd', got 'bhdn'"):
        whole_attention(q, k, v, layout="bhdn")
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        whole_attention(q, k, v, eps=-1)
    with pytest.raises(ValueError, match=r"weigh must hold keys \[2, 2, 20, D\] of torch.float64"):
        whole_attention(q, k, v, weigh=(q, k[:, :, :5]))
    with pytest.raises(ValueError, match=r"mask must be \[2, 20\], got shape \(2, 19\)"):
        whole_attention(q, k, v, mask=torch.ones(2, 19, dtype=torch.bool))
    with pytest.raises(ValueError, match="heads of q must be a multiple of those of k, got 3 and 2"):
        whole_attention(q[:, :3], k, v)
    with pytest.raises(TypeError, match="must share one floating dtype"):
        whole_attention(q, k.float(), v)
