"""Kimi Linear: KDA is its recurrence, finer gates, and what a quarter of attention buys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.recurrence.recalled import marks, said, trained
from tilewise.attention.latent.mla import MLA
from tilewise.data.recall_tasks import recall_after_forgetting
from tilewise.recurrence import KDA, LatentAttention, ModelConfig, SequenceModel, kimi_linear, scan


def drawn(n: int, strength: float, d: int = 16, seed: int = 0) -> list[Tensor]:
    """Queries, keys of length 1, values, log decays by channel and betas, float64 `[2, 2, n, *]`."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v, decay = (torch.randn(2, 2, n, d, generator=gen, dtype=torch.float64) for _ in range(4))
    beta = torch.rand(2, 2, n, generator=gen, dtype=torch.float64)
    return [q, F.normalize(k, dim=-1), v, -strength * decay.abs(), beta]


def recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, form: str = "kda") -> Tensor:
    """The paper's equation, written out: `S_t = (I - beta k k^T) Diag(a) S_{t-1} + beta k v^T`.

    `form` "dplr" has it as diagonal plus low rank, `(Diag(a) - b c^T) S` with b = beta k and c = a * k; "swapped"
    decays after the correction, which is another function.
    """
    state = q.new_zeros(*q.shape[:2], k.shape[3], v.shape[3])
    eye, rows = torch.eye(k.shape[3], dtype=q.dtype), []
    for t in range(q.shape[2]):
        strength, key = beta[:, :, t, None, None], k[:, :, t, :, None]
        factor = decay[:, :, t].exp()
        if form == "dplr":
            low = (strength * key) @ (factor.unsqueeze(3) * key).mT
            transition = torch.diag_embed(factor) - low
        elif form == "swapped":
            transition = torch.diag_embed(factor) @ (eye - strength * key @ key.mT)
        else:
            transition = (eye - strength * key @ key.mT) @ torch.diag_embed(factor)
        state = transition @ state + strength * key @ v[:, :, t, None, :]
        rows.append((state.mT @ q[:, :, t, :, None]).squeeze(3))
    return torch.stack(rows, 2)


def gradients(run, given: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def scanned(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    return scan(q, k, v, decay=decay, beta=beta, rule="delta", scale=1.0, engine="torch")  # type: ignore[return-value]


@pytest.mark.evidence
@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_chunkwise_form_is_the_recurrence_and_diagonal_plus_low_rank(strength):
    """Forward and backward, from decays that hardly forget to ones that forget all at once."""
    given = drawn(130, strength)
    want = gradients(recurrent, given)
    for form in (scanned, lambda *x: recurrent(*x, form="dplr")):
        for got, exact in zip(gradients(form, given), want):
            assert (got - exact).norm() <= 1e-11 * exact.norm()
    if strength == 1.0:  # the control: the order of forgetting and correcting is seen
        other = recurrent(*given, form="swapped")
        assert (other - want[0]).norm() > 0.05 * want[0].norm()


@pytest.mark.evidence
def test_the_layer_is_its_formula_token_by_token():
    """Gates, short convolutions, norms of keys, output norm and gate, written out from the parameters."""
    torch.manual_seed(0)
    layer = KDA(32, heads=2).double()
    x = torch.randn(2, 50, 32, dtype=torch.float64)

    def conv(place: int, part: Tensor) -> Tensor:
        weight = layer.convs[place].weight
        padded = F.pad(part, (0, 0, 3, 0))
        return F.silu(sum(weight[j] * padded[:, j : j + 50] for j in range(4)))

    def heads(part: Tensor) -> Tensor:
        return part.view(2, 50, 2, 16).transpose(1, 2)

    q, k, v = (heads(conv(i, part(x))) for i, part in enumerate((layer.query, layer.key, layer.value)))
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    rate = layer.log_rate.exp().view(1, 2, 1, 1)
    decay = -rate * torch.log1p(heads(layer.step(x)).exp())
    out = recurrent(q / 4, k, v, decay, layer.beta(x).sigmoid().mT)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    want = layer.out(out.transpose(1, 2).flatten(2) * layer.gate(x).sigmoid())
    torch.testing.assert_close(layer(x)[0], want, rtol=1e-9, atol=1e-10)


def fading(n: int, seed: int, count: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Registers that are written one at a time and fade, each at its own pace, from a half to 0.99 a step.

    Which is written and what, `[count, n]`, which is asked after it, and what is then left in it.
    """
    gen = torch.Generator().manual_seed(seed)
    written, asked = (torch.randint(8, (count, n), generator=gen) for _ in range(2))
    values = torch.randn(count, n, generator=gen)
    keep = 1 - torch.logspace(-0.3, -2, 8)
    held, left = torch.zeros(count, 8), []
    for t in range(n):
        held = (held * keep).scatter(1, written[:, t : t + 1], values[:, t : t + 1])
        left.append(held.gather(1, asked[:, t : t + 1]))
    return written, values, asked, torch.cat(left, 1)


def misfit(channels: int, steps: int = 150) -> float:
    """The mean square that a head with so many decays, fitted, leaves of registers it has not seen."""
    rate = torch.full((channels,), -2.0, requires_grad=True)
    optimiser = torch.optim.Adam([rate], lr=0.1)
    for step in range(steps + 1):
        written, values, asked, left = fading(48, step)
        keys, queries = (F.one_hot(x, 8).float().unsqueeze(1) for x in (written, asked))
        decay = -F.softplus(rate).view(1, 1, 1, -1).expand(1, 1, 48, 8)
        out = scan(queries, keys, values.view(32, 1, 48, 1), decay=decay, rule="delta", scale=1.0)
        error = (out.flatten(1) - left).square().mean()  # type: ignore[union-attr]
        if step == steps:
            return float(error.detach() / left.square().mean())
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    raise AssertionError


@pytest.mark.evidence
def test_finer_gates_hold_what_fades_at_different_paces():
    """Fitted decays by channel hold eight registers; one for the head, fitted as well, misses a seventh."""
    fine, coarse = misfit(8), misfit(1)
    assert fine < 0.01, fine
    assert coarse > 0.1, coarse


def resets(seed: int) -> tuple[Tensor, Tensor]:
    return recall_after_forgetting(200, 14, resets=4, vocabulary=64, seed=seed)


@pytest.mark.evidence
def test_finer_gates_forget_a_part():
    """One head, told to forget one of two groups of keys and keep the other: fewer errors than with one decay.

    Both have the same parameters and recipe; `fine=False` takes the mean of a head's steps. One decay is no bar to
    this task, since corrections can erase too: with four groups both did alike.
    """
    fine, coarse = (marks(trained(name), resets) for name in ("kda-fine", "kda-coarse"))
    found = said(fine=fine, coarse=coarse)
    assert fine.min() > coarse.max(), found
    assert 1 - fine.mean() < 0.75 * (1 - coarse.mean()), found


@pytest.mark.evidence
def test_trained_fine_gates_averaged_are_lost():
    """The same weights with one decay for a head: what the channels had apart was of use."""
    whole = marks(trained("kda-fine"), resets)
    averaged = marks(trained("kda-fine", options={"kda": {"heads": 1, "fine": False}}), resets)
    assert averaged.max() < whole.min() - 0.1, said(whole=whole, averaged=averaged)


@pytest.mark.evidence
def test_hybrid_keeps_a_quarter_of_the_cache():
    """Bytes held after 500 and 1,000 tokens: what they grow by is a quarter of four layers of MLA."""
    config = kimi_linear(128, 32)
    dense = ModelConfig(128, 32, ("mla",) * 4, {"mla": config.options["mla"]})
    grown = []
    for made in (config, dense):
        model, held = SequenceModel(made).eval(), []
        with torch.no_grad():
            for n in (500, 1000):
                _, states = model(torch.randint(128, (1, n)))
                held.append(sum(state.bytes for state in states))
        grown.append(held[1] - held[0])
    assert grown[0] * 4 == grown[1] == 4 * 500 * 16 * 4  # tokens, latent, bytes of a number


def test_latent_attention_is_mla():
    torch.manual_seed(0)
    mixer = LatentAttention(32, heads=2, rope_dim=4).double()
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    assert isinstance(mixer.mla, MLA)
    want, _ = mixer.mla(x)
    got, state = mixer(x[:, :39])
    last, _ = mixer(x[:, 39:], state)  # a single token takes the absorbed form
    torch.testing.assert_close(torch.cat((got, last), 1), want, rtol=1e-10, atol=1e-10)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="rank must be None or an integer >= 1, got 0"):
        KDA(32, rank=0)
    with pytest.raises(ValueError, match="blocks must be an integer >= 1, got 0"):
        kimi_linear(10, 32, blocks=0)
