"""Gated linear attention: stable whatever the decays, equal to the recurrence, and able to forget on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.test_scan import skip_unless_here
from tests.recurrence import decays
from tilewise.recurrence import GLA, scan


def one_reference(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The parallel form with one reference for the whole chunk, `(q exp(g)) (k exp(-g))^T`, in which exp(-g) grows
    with all that was forgotten since the beginning."""
    sums = decay.cumsum(2)
    scores = (q * sums.exp()) @ (k * (-sums).exp()).mT
    return scores.tril() @ v


def drawn(strength: float, n: int = 128, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=gen, dtype=torch.float64) for _ in range(3))
    decay = -strength * torch.rand(1, 2, n, 16, generator=gen, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, decay)]


def run(engine: str, given: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Outputs and all gradients."""
    leaves = [x.clone().requires_grad_() for x in given]
    q, k, v, decay = leaves
    out = scan(q, k, v, decay=decay, scale=1.0, engine=engine) if engine else one_reference(q, k, v, decay)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("strength", [0.05, 3.0, 50.0])
def test_secondary_chunking_is_the_recurrence_where_one_reference_overflows(engine, strength):
    """Outputs and gradients within twice the recurrence's own error in float32. With one reference for the chunk
    the same is right for weak decays only; for strong ones there is not one number left."""
    skip_unless_here(engine)
    low = drawn(strength)
    weight = torch.randn(low[0].shape, generator=torch.Generator().manual_seed(1))
    exact = run("definition", [x.double() for x in low], weight)
    naive, tiled, single = (run(name, low, weight) for name in ("definition", engine, ""))
    half = torch.finfo(torch.float32).eps / 2 * (16 + 64) ** 0.5

    def right(found: list[Tensor]) -> bool:
        return all(
            float((got.double() - want).norm() / want.norm())
            <= 2 * max(float((loop.double() - want).norm() / want.norm()), half)
            for got, loop, want in zip(found, naive, exact)
        )

    assert right(tiled)
    if strength > 1:
        assert not single[0].isfinite().all() and not right(single)
    else:
        torch.testing.assert_close(single[0].double(), exact[0], rtol=1e-3, atol=1e-3)


@pytest.mark.evidence
def test_the_layer_is_its_formula():
    """Every step of one layer written out; each channel of a head decays by a number of its own, for every
    token."""
    torch.manual_seed(0)
    made = GLA(16, heads=2, rank=4).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    low, bias = made.decay[0].weight, made.decay[1]
    factors = (x @ low.T @ bias.weight.T + bias.bias).sigmoid() ** (1 / 16)
    q, k, v = (x @ part.weight.T for part in (made.query, made.key, made.value))
    state, rows = torch.zeros(2, 4, 8, dtype=torch.float64), []
    for t in range(30):
        state = factors[0, t].view(2, 4, 1) * state + k[0, t].view(2, 4, 1) * v[0, t].view(2, 1, 8)
        read = (q[0, t].view(2, 1, 4) @ state).view(2, 8) / 2
        rows.append((read * torch.rsqrt(read.square().mean(-1, keepdim=True) + 1e-5)).view(16))
    want = (
        torch.stack(rows) * made.norm.weight.view(16) * F.silu(x[0] @ made.gate.weight.T)
    ) @ made.out.weight.T
    torch.testing.assert_close(made(x)[0][0], want, rtol=1e-9, atol=1e-10)
    assert factors[0, :, 0].std() > 1e-3 and factors[0, 0].std() > 1e-3


@pytest.mark.evidence
def test_decays_that_depend_on_the_token_forget_at_resets():
    """A dictionary that is emptied at random: trained alike on the same data, the model whose channels each learn a
    decay of their own, but the same at every token, cannot tell what was written before a reset. At a length eight
    times that of training as well."""
    tokens, targets = decays.resets(64, 64, torch.Generator().manual_seed(77))
    long = decays.resets(8, 512, torch.Generator().manual_seed(78))
    found = {}
    for name in ("gla-resets", "gla-resets-fixed"):
        model = decays.load(name)
        with torch.no_grad():
            found[name] = tuple(decays.accuracy(model(x)[0], y) for x, y in ((tokens, targets), long))
    asked = targets[targets >= 0]
    most_common = float(asked.bincount().max() / len(asked))
    assert min(found["gla-resets"]) > 0.97, found
    assert most_common < max(found["gla-resets-fixed"]) < 0.85, (found, most_common)
