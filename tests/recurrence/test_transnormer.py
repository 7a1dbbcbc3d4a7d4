"""TransNormer: bounded gradients without a denominator, and attention that stays near in the early layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.recurrence import decays
from tilewise.recurrence import DiagonalAttention, NormAttention, TransNormer, scan

EPS = 1e-5


def parts(x: Tensor, layer: NormAttention | DiagonalAttention) -> list[Tensor]:
    return [
        (x @ part.weight.T).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for part in (layer.query, layer.key, layer.value)
    ]


@pytest.mark.evidence
@pytest.mark.parametrize("denominator", [False, True])
def test_norm_attention_is_its_formula(denominator):
    torch.manual_seed(0)
    made, x = NormAttention(16, heads=2, denominator=denominator).double(), torch.randn(1, 40, 16).double()
    q, k, v = parts(x, made)
    scores = ((1 + F.elu(q)) @ (1 + F.elu(k)).mT).tril()
    if denominator:
        scores = scores / scores.sum(-1, keepdim=True)
    out = (scores @ v).transpose(1, 2).flatten(2)
    if not denominator:
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + EPS)
    torch.testing.assert_close(made(x)[0], out @ made.out.weight.T, rtol=1e-9, atol=1e-10)


@pytest.mark.evidence
def test_diagonal_attention_is_softmax_within_blocks():
    torch.manual_seed(0)
    made, x = DiagonalAttention(16, heads=2, block=8).double(), torch.randn(1, 43, 16).double()
    q, k, v = parts(x, made)
    block = torch.arange(43) // 8
    near = (block.view(-1, 1) == block).tril()
    scores = (q @ k.mT * 8**-0.5).masked_fill(~near, -torch.inf).softmax(-1)
    want = (scores @ v).transpose(1, 2).flatten(2) @ made.out.weight.T
    torch.testing.assert_close(made(x)[0], want, rtol=1e-9, atol=1e-10)


def largest(scores: Tensor, v: Tensor, kind: str) -> float:
    """The largest derivative of any output by any score, `scores [N, N]` being what queries and keys give."""

    def out(row: Tensor) -> Tensor:
        if kind == "softmax":
            return row.softmax(0) @ v
        made = row @ v
        if kind == "sum":
            return made / row.sum()
        return made * torch.rsqrt(made.square().mean() + (EPS if kind == "norm" else 0))

    rows = torch.func.vmap(torch.func.jacrev(out))(scores)
    return float(rows.abs().max())


@pytest.mark.evidence
def test_gradients_of_the_norm_are_bounded_where_those_of_the_denominator_are_not():
    """The paper's analysis, measured: with features scaled down by ten again and again, derivatives by scores grow
    a hundredfold each time under a denominator; under the norm they keep to |v| / sqrt(eps) whatever the scale, as
    softmax keeps to its own bound. The control is the norm without its eps, which is as unbounded."""
    gen = torch.Generator().manual_seed(0)
    features = torch.rand(2, 32, 8, generator=gen, dtype=torch.float64)
    v = torch.randn(32, 8, generator=gen, dtype=torch.float64)
    found: dict[str, list[float]] = {kind: [] for kind in ("softmax", "sum", "norm", "norm without eps")}
    for power in range(6):
        q, k = features * 10.0**-power
        for kind, sizes in found.items():
            sizes.append(largest(q @ k.T, v, kind))
        if power == 3:  # these are the operator's own outputs
            heads = [x.view(1, 1, *x.shape) for x in (q, k, v)]
            made = scan(*heads, normalize="sum", scale=1.0)[0, 0, -1]
            torch.testing.assert_close(made, (q @ k.T)[-1] @ v / (q @ k.T)[-1].sum())
    bound = float(v.norm(dim=1).max()) * EPS**-0.5
    for kind in ("sum", "norm without eps"):
        for before, after in zip(found[kind], found[kind][1:]):
            assert after == pytest.approx(100 * before, rel=1e-6)
        assert found[kind][-1] > 1e3 * bound
    assert max(found["norm"]) < bound
    assert max(found["softmax"]) < float(2 * v.abs().max()) / 4 + 1e-9


@torch.no_grad()
def near_mass(name: str, within: int) -> float:
    """The share of the first layer's scores that lies on the token itself and the `within - 1` before it, for the
    queries that could look further back, over held-out text."""
    model, data = decays.load(name), decays.text(held_out=True)
    tokens = data[: 8 * 256].view(8, 256)
    block = model.blocks[0]
    q, k, _ = parts(block.norm(model.embedding(tokens)), block.mixer)
    apart = torch.arange(256).view(-1, 1) - torch.arange(256)
    if isinstance(block.mixer, DiagonalAttention):
        rows = torch.arange(256) // block.mixer.block
        hidden = (rows.view(-1, 1) != rows) | (apart < 0)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    else:
        scores = ((1 + F.elu(q)) @ (1 + F.elu(k)).mT).tril()
        weights = scores / scores.sum(-1, keepdim=True)
    return float((weights * (apart < within)).sum(-1)[..., 128:].mean())


@pytest.mark.evidence
def test_early_layers_look_near_with_diagonal_attention():
    """Attention dilution: a trained global first layer of linear attention, with a denominator or a norm, spreads
    its scores over everything, hardly more on the last 16 tokens than an even spread would."""
    even = sum(16 / (t + 1) for t in range(128, 256)) / 128
    found = {
        name: near_mass(name, 16) for name in ("transnormer", "transnormer-global", "transnormer-denominator")
    }
    assert found["transnormer"] > 0.8, found
    assert max(found["transnormer-global"], found["transnormer-denominator"]) < 3 * even < 0.3, (found, even)


@pytest.mark.evidence
def test_trained_it_models_text_better_than_without_its_parts():
    """Same size, data and steps: all layers global, and those with a denominator as well."""
    names = ("transnormer", "transnormer-global", "transnormer-denominator")
    found = {name: decays.bits_per_byte(decays.load(name)) for name in names}
    assert found["transnormer"] < found["transnormer-global"] - 0.15, found
    assert found["transnormer-global"] < found["transnormer-denominator"], found


def test_bad_arguments():
    with pytest.raises(ValueError, match="block must be an integer >= 1, got 0"):
        DiagonalAttention(16, block=0)
    with pytest.raises(ValueError, match="local must be from 0 to the 4 layers, got 5"):
        TransNormer(10, 16, 4, local=5)
    kinds = [type(block.mixer) for block in TransNormer(10, 16, 4, block=8).blocks]
    assert kinds == [DiagonalAttention] * 2 + [NormAttention] * 2
