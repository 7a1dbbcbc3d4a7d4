"""InLine: which queries read alike under each attention, and a small classifier against plain attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.recurrence import pictures
from tests.recurrence.vision_models import CLASSIFIERS, classifier
from tilewise.recurrence import InLine, spread
from tilewise.recurrence.whole import gather, read


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(q: Tensor, k: Tensor, normalize: str) -> Tensor:
    """What q gives each key: the attention over values that are the keys' numbers, `[M, N]`."""
    if normalize == "softmax":
        return (q @ k.T * k.shape[1] ** -0.5).softmax(-1)
    keys = gather(k[None, None], torch.eye(len(k), dtype=k.dtype)[None, None])
    return read(q[None, None], keys, normalize)[0, 0]


@pytest.mark.evidence
def test_queries_of_one_direction_read_alike_only_where_weights_are_divided():
    """The proof of the paper, on vectors: with ReLU features q and 2 q (and any a q) give the same weights
    bit for bit when these are divided by their sum, at every key; InLine and softmax tell them apart. So they
    do where features differ but lie in one direction."""
    k, q = draw(20, 6), draw(1, 6, seed=1)
    several = torch.cat([q * a for a in (1.0, 2.0, 4.0)])
    divided = weights(F.relu(several), F.relu(k), "divide")
    assert (
        torch.equal(divided[0], divided[1]) and torch.equal(divided[0], divided[2]) and divided[0].std() > 0
    )
    for normalize in ("subtract", "softmax"):
        made = weights(several, k, normalize)
        torch.testing.assert_close(made.sum(1), torch.ones(3, dtype=torch.float64))
        assert (made[0] - made[1]).norm() > 0.05 * made[0].norm() < (made[1] - made[2]).norm() / 0.05
    # elu + 1 as well: two unlike queries whose features are multiples of one another.
    first = F.elu(q) + 1
    second = torch.where(3 * first < 1, (3 * first).log(), 3 * first - 1)
    assert (F.normalize(second, dim=1) - F.normalize(q, dim=1)).norm() > 0.1
    both, keys = F.elu(torch.cat((q, second))) + 1, F.elu(k) + 1
    torch.testing.assert_close(*weights(both, keys, "divide"))
    assert (weights(both, keys, "subtract").diff(dim=0)).norm() > 0.01


@pytest.mark.evidence
def test_inline_keeps_queries_apart_by_what_spread_says():
    """From queries to weights InLine is affine: distances grow by at least `spread(k)`, and by that alone in
    the worst direction. Control: keys that do not span the space have a spread of 0, and two queries read
    alike."""
    for n, dim in ((30, 6), (7, 6)):
        k = draw(n, dim) + 5
        p, q = draw(200, dim, seed=2), draw(200, dim, seed=3)
        apart = (weights(p, k, "subtract") - weights(q, k, "subtract")).norm(dim=1)
        assert spread(k) > 0 and (apart >= spread(k) * (p - q).norm(dim=1) * (1 - 1e-9)).all()
        worst = torch.linalg.svd(k - k.mean(0)).Vh[-1:]
        moved = (weights(q[:1] + worst, k, "subtract") - weights(q[:1], k, "subtract")).norm()
        torch.testing.assert_close(moved, spread(k))
    flat = torch.cat(
        (draw(30, 5), torch.full((30, 1), 3.0, dtype=torch.float64)), 1
    )  # one coordinate the same
    assert spread(flat) < 1e-15
    unlike = q[:1].clone()[:, :6]
    unlike[:, 5] += 1
    torch.testing.assert_close(*weights(torch.cat((q[:1], unlike)), flat, "subtract"))
    assert spread(draw(4, 6)) == 0 and spread(draw(2, 3, 20, 6)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"k must be \[..., N, D\], got \[6\]"):
        spread(draw(6))


def test_the_layer_is_its_formula():
    """Weights of heads by subtraction, and windows of values weighed by what the mean token says."""
    torch.manual_seed(0)
    layer, x = InLine(8, 2, features="relu").double(), draw(2, 12, 8)
    q, k, v = (made(x).unflatten(2, (2, 4)).transpose(1, 2) for made in (layer.query, layer.key, layer.value))
    scores = F.relu(q) @ F.relu(k).mT / 2
    read = ((scores - scores.mean(3, keepdim=True)) / 12 + 1 / 12) @ v
    kernel = layer.residual(x.mean(1).unsqueeze(2)).view(2, 8, 3, 3)
    values = v.transpose(1, 2).flatten(2).mT.reshape(2, 8, 3, 4)
    near = torch.stack(
        [F.conv2d(values[i : i + 1], kernel[i].unsqueeze(1), padding=1, groups=8)[0] for i in (0, 1)]
    )
    want = layer.out(read.transpose(1, 2).flatten(2) + near.flatten(2).mT)
    torch.testing.assert_close(layer(x, (3, 4)), want)
    assert not torch.allclose(kernel[0], kernel[1])


def test_the_window_is_all_that_is_local():
    layer, x = InLine(8, 2).double(), draw(1, 64, 8)
    with torch.no_grad():
        layer.query.weight.zero_()
        layer.query.bias.zero_()  # without a query all values count alike
    out = layer(x, (8, 8)) - InLineWithout(layer)(x)
    other = x.clone()
    other[0, 0] += 1
    other[0, 63] -= 1  # the mean token stays
    moved = (layer(other, (8, 8)) - InLineWithout(layer)(other) - out).abs().amax(2).view(8, 8) > 1e-9
    want = torch.zeros(8, 8, dtype=torch.bool)
    want[:2, :2] = want[6:, 6:] = True
    assert torch.equal(moved, want)


class InLineWithout:
    """The layer without its residual."""

    def __init__(self, layer: InLine) -> None:
        self.layer = InLine(8, 2, local=0).double()
        self.layer.load_state_dict({n: p for n, p in layer.state_dict().items() if "residual" not in n})

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.evidence
def test_a_small_classifier_beats_plain_linear_attention_at_equal_parameters():
    """Glyphs under noise, trained alike (`training/train_vision.py`): InLine against ReLU features divided by
    their sum, whose wider perceptrons make up for the residual's parameters, on fresh pictures. Control:
    InLine
    without its residual, with such perceptrons, is no better than the plain one here: what is local makes the
    difference."""
    found, sizes = {}, []
    for name in CLASSIFIERS:
        model = pictures.loaded(classifier(name), name)
        sizes.append(sum(p.numel() for p in model.parameters()))
        found[name] = pictures.right(model)
    assert max(sizes) <= 1.01 * min(sizes), sizes
    assert found["inline"] > found["plain-linear"] + 0.3, found
    assert abs(found["inline-no-local"] - found["plain-linear"]) < 0.05, found
