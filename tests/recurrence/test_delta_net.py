"""DeltaNet: the chunkwise form is the recurrence, and what replacing values is worth in recall."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from tests.recurrence.recalled import marks, said, trained
from tilewise.data.recall_tasks import IGNORE, accuracy, mqar, recall_after_forgetting
from tilewise.recurrence import MIXERS, scan


def drawn(n: int, d_k: int = 16, d_v: int = 24, seed: int = 0) -> tuple[Tensor, ...]:
    """Queries, keys of length 1, values and betas in float64, `[2, 2, n, *]`."""
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 2, n, d_k, generator=gen, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 2, n, d_v, generator=gen, dtype=torch.float64)
    beta = torch.rand(2, 2, n, generator=gen, dtype=torch.float64)
    return q, torch.nn.functional.normalize(k, dim=-1), v, beta


def recurrent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The paper's equation, written out: `S_t = S_{t-1} (I - beta k k^T) + beta v k^T`, with S [D_v, D_k]."""
    state = q.new_zeros(*q.shape[:2], v.shape[3], k.shape[3])
    eye, rows = torch.eye(k.shape[3], dtype=q.dtype), []
    for t in range(q.shape[2]):
        strength = beta[:, :, t, None, None]
        key, value = k[:, :, t, :, None], v[:, :, t, :, None]
        state = state @ (eye - strength * key @ key.mT) + strength * value @ key.mT
        rows.append((state @ q[:, :, t, :, None]).squeeze(3))
    return torch.stack(rows, 2)


def chunkwise(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, chunk: int) -> Tensor:
    """The paper's WY form with the UT transform, written out: a triangular inverse and matrix products by chunk."""
    state = q.new_zeros(*q.shape[:2], k.shape[3], v.shape[3])
    rows = []
    for start in range(0, q.shape[2], chunk):
        queries, keys, values = (x[:, :, start : start + chunk] for x in (q, k, v))
        strength = torch.diag_embed(beta[:, :, start : start + chunk])
        eye = torch.eye(keys.shape[2], dtype=q.dtype)
        mixed = torch.linalg.inv(eye + (strength @ keys @ keys.mT).tril(-1)) @ strength
        w, u = mixed @ keys, mixed @ values
        new = u - w @ state
        rows.append(queries @ state + (queries @ keys.mT).tril() @ new)
        state = state + keys.mT @ new
    return torch.cat(rows, 2)


def gradients(run, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, weights)


def scanned(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options) -> Tensor:
    return scan(q, k, v, beta=beta, rule="delta", scale=1.0, **options)  # type: ignore[return-value]


@pytest.mark.evidence
@pytest.mark.parametrize("n", [1, 64, 150])
def test_chunkwise_wy_form_is_the_recurrence_forward_and_backward(n):
    """To float64 rounding, outputs and every gradient; and so is the operator, whatever its chunk."""
    given = drawn(n)
    want = gradients(recurrent, given)
    forms = {f"WY {chunk}": functools.partial(chunkwise, chunk=chunk) for chunk in (16, 64)}
    forms |= {
        f"scan {chunk}": functools.partial(scanned, chunk=chunk, engine="torch") for chunk in (None, 16)
    }
    for (name, form), parts in itertools.product(forms.items(), [("out", "d_q", "d_k", "d_v", "d_beta")]):
        for part, got, exact in zip(parts, gradients(form, given), want):
            error = (got - exact).norm() / exact.norm()
            assert error < 1e-12, f"{name}: {part} is off by {error:.1e}"


@pytest.mark.evidence
def test_without_the_correction_it_is_another_function():
    """The control of the test above: rule "add", and the WY form whose inverse is left out."""
    q, k, v, beta = drawn(64)
    want = recurrent(q, k, v, beta)
    added = scan(q, k, v, beta=beta, scale=1.0)
    assert (added - want).norm() > 0.3 * want.norm()
    strength = torch.diag_embed(beta)
    plain = (q @ k.mT).tril() @ strength @ v
    torch.testing.assert_close(plain, added, rtol=1e-10, atol=1e-10)


def retold(seed: int, pairs: int = 16) -> tuple[Tensor, Tensor]:
    return mqar(100, 6 * pairs, pairs, vocabulary=128, writes=2, seed=seed)


def state_bytes(name: str) -> int:
    _, states = trained(name)(retold(0)[0][:1, :8])
    return states[0].scan.bytes


def told(seed: int, pairs: int = 32) -> tuple[Tensor, Tensor]:
    return mqar(50, 4 * pairs, pairs, vocabulary=256, seed=seed)


@pytest.mark.evidence
def test_recall_of_pairs_told_once_beats_linear_attention():
    """Plain recall: 32 pairs in a state of 32 x 32, one layer, three seeds of each, trained on up to 64 pairs.

    Linear attention is the published one (elu + 1, divided by its sum) with the same short convolutions, channel
    mixer, pairs and steps. Set before these seeds were looked at with so many pairs, from runs of another one:
    every seed of DeltaNet errs at most a quarter as often as the best of linear attention. It is the layer that is
    compared, not its rule alone: on pairs told once the same layer with rule "add" is no worse
    (docs/recurrence-delta.md); on pairs told anew it is, below.
    """
    delta, linear = (
        torch.stack([marks(trained(f"{name}-told-{seed}"), told, draws=3) for seed in range(3)])
        for name in ("delta", "linear")
    )
    sizes = [
        trained(f"{name}-told-0")(told(0)[0][:1, :8])[1][0].scan.matrix.shape for name in ("delta", "linear")
    ]
    assert sizes[0] == sizes[1]
    found = said(delta=delta, linear=linear)
    assert (1 - delta.mean(1)).max() < 0.25 * (1 - linear.mean(1)).min(), found


@pytest.mark.evidence
def test_recall_of_pairs_told_anew_beats_linear_attention():
    """Keys come twice, and the last value counts: 16 pairs in a state of 32 x 32, one layer.

    The same layer with rule "add" has the same recipe of training, GLA nearly three times the steps; their states
    are of the same size.
    """
    names = ("delta-retold", "add-retold", "gla-retold")
    assert len({state_bytes(name) for name in names}) == 1
    delta, add, gla = (marks(trained(name), retold) for name in names)
    found = said(delta=delta, add=add, gla=gla)
    assert delta.min() > 0.8, found
    assert add.max() < 0.5 * delta.min(), found
    assert 1 - delta.min() < 0.5 * (1 - gla.max()), found


@pytest.mark.evidence
def test_the_correction_is_what_recalls():
    """The trained model with its rule broken: what it has learned is of no use without the correction."""
    broken = marks(trained("delta-retold", options={"delta-net": {"heads": 1, "rule": "add"}}), retold)
    whole = marks(trained("delta-retold"), retold)
    assert broken.max() < 0.6 * whole.min(), said(broken=broken, whole=whole)


def test_a_rule_that_is_not_known():
    with pytest.raises(ValueError, match="rule must be one of 'add', 'delta', got 'sub'"):
        MIXERS["delta-net"](32, rule="sub")


def test_mqar_asks_for_what_was_told():
    for writes, gap in ((1, 0), (3, 5)):
        tokens, targets = mqar(50, 100, 8, vocabulary=40, seed=3, writes=writes, gap=gap)
        again = mqar(50, 100, 8, vocabulary=40, seed=3, writes=writes, gap=gap)
        assert torch.equal(tokens, again[0]) and torch.equal(targets, again[1])
        assert ((targets != IGNORE).sum(1) == 8).all()
        told = 16 * writes
        for row, answers in zip(tokens.tolist(), targets.tolist()):
            last = dict(zip(row[0:told:2], row[1:told:2]))
            assert len(last) == 8 and not any(row[told : told + gap])
            asked = {row[i]: answers[i] for i in range(100) if answers[i] != IGNORE}
            assert asked == last
            assert min(i for i in range(100) if answers[i] != IGNORE) >= told + gap
    near = mqar(200, 200, 8, power=0.01)[1]
    far = mqar(200, 200, 8)[1]
    mean = [(x != IGNORE).nonzero()[:, 1].double().mean() for x in (near, far)]
    assert mean[0] < mean[1] - 20
    logits = torch.nn.functional.one_hot(targets.clamp(min=0), 40).float()
    assert accuracy(logits, targets) == 1 and accuracy(logits.roll(1, 2), targets) == 0


def test_forgetting_follows_its_rule():
    tokens, targets = recall_after_forgetting(200, 7, resets=3, vocabulary=40, seed=2)
    for row, answers in zip(tokens.tolist(), targets.tolist()):
        kept: dict[int, int] = {}
        i = 0
        while i < 2 * 7 + 3:
            if row[i] <= 2:  # a reset: 1 + its group
                kept = {key: value for key, value in kept.items() if (key - 3) % 2 != row[i] - 1}
                i += 1
            else:
                kept[row[i]] = row[i + 1]
                i += 2
        assert answers[:17] == [IGNORE] * 17
        assert [kept.get(key, 0) for key in row[17:]] == answers[17:]
    share = (targets == 0).sum() / (targets != IGNORE).sum()
    assert 0.3 < share < 0.7


def test_wrong_sizes_of_tasks():
    with pytest.raises(ValueError, match="length must be at least .*32, got 31"):
        mqar(1, 31, 8)
    with pytest.raises(ValueError, match="vocabulary must hold 8 keys in its lower half, got 16"):
        mqar(1, 32, 8, vocabulary=16)
    with pytest.raises(ValueError, match="pairs must be at least 1, got 0"):
        mqar(1, 32, 0)
    with pytest.raises(ValueError, match="between 1 and the 29 keys .*got 30"):
        recall_after_forgetting(1, 30)
