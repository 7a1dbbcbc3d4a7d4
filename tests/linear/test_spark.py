"""SparkFFN: its formula, its work, and what a small language model of it loses against dense and random layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tilewise
from tilewise.linear import SparkFFN

WIDTH, NEURONS = 128, 512


class Dense(nn.Module):
    """A plain layer."""

    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, neurons, bias=False), nn.Linear(neurons, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class RandomlyActive(SparkFFN):
    """The control: as many neurons per token, drawn at random."""

    def forward(self, x: Tensor, sparse: bool = False) -> Tensor:
        predicted = self.predict(x[..., : self.rank])
        drawn = torch.rand_like(predicted) < self.choose.k / predicted.shape[-1]
        return self.out(F.gelu(predicted) * drawn * self.gate(x[..., self.rank :]))


class NextByte(nn.Module):
    """The byte after eight others, by one feed-forward layer."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.embed, self.mix, self.ffn = nn.Embedding(256, 16), nn.Linear(128, WIDTH), ffn
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def hidden(self, x: Tensor) -> Tensor:
        return self.mix(self.embed(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.head(self.after(hidden + self.ffn(self.before(hidden))))


def _trained(make, steps: int = 250, batch: int = 256) -> tuple[float, NextByte, Tensor]:
    """Loss in nats on the last tenth of the bundled text after training on the rest, the model, and its inputs."""
    text = bytearray((Path(tilewise.__file__).parent / "data/sample.txt").read_bytes())
    data = torch.frombuffer(text, dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    torch.manual_seed(0)
    model, g = NextByte(make()), torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        at = torch.randint(cut - 9, (batch,), generator=g)
        window = data[at.unsqueeze(1) + torch.arange(9)]
        optimiser.zero_grad()
        F.cross_entropy(model(window[:, :8]), window[:, 8]).backward()
        optimiser.step()
    held = data[cut:].unfold(0, 9, 1)[::3]
    with torch.no_grad():
        return float(F.cross_entropy(model(held[:, :8]), held[:, 8])), model, held[:, :8]


@pytest.mark.evidence
def test_a_trained_layer_keeps_its_loss_with_8_percent_active():
    """Next byte of the bundled text: about as good as a dense layer of as many parameters.

    Controls: the same layer with 8 % drawn at random loses most of what a layer gains over none at all; and so
    does, if less, a dense layer of only as many neurons as are active.
    """
    (dense, plain, _), (mine, model, held) = (
        _trained(lambda: Dense(WIDTH, NEURONS)),
        _trained(lambda: SparkFFN(128, 512)),
    )
    (random, _, _), (narrow, _, _) = (
        _trained(lambda: RandomlyActive(128, 512)),
        _trained(lambda: Dense(WIDTH, 41)),
    )
    count = [sum(p.numel() for p in x.ffn.parameters()) for x in (plain, model)]
    assert count[0] == count[1]
    x = model.before(model.hidden(held))
    assert 0.06 < float(model.ffn.active(x).double().mean()) / NEURONS < 0.1
    assert mine < dense + 0.05, (dense, mine, random, narrow)
    assert min(random, narrow) > mine + 0.12, (dense, mine, random, narrow)
    assert model.ffn.work(x) < 0.35


@pytest.mark.evidence
def test_work_is_what_is_multiplied():
    """Counted by PyTorch: the sparse form multiplies for 2 x `active` rows, the dense form for all."""
    layer = SparkFFN(width=128, neurons=1024, active=0.05, rank=32)
    x = torch.randn(64, 128)
    counted = {}
    for sparse in (False, True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x, sparse=sparse)
        counted[sparse] = counter.get_total_flops() / 64 / 2
    assert counted[False] == 2 * 128 * 1024
    assert counted[True] == 32 * 1024 + 2 * 51 * (96 + 128)
    active = float(layer.active(x).double().mean())
    assert abs(active - 51) < 5
    assert layer.work(x) == pytest.approx((32 * 1024 + active * (96 + 128)) / (2 * 128 * 1024))


def test_is_its_formula_in_both_forms():
    layer = SparkFFN(24, 60, active=0.2).double()
    x = torch.randn(3, 7, 24, dtype=torch.float64, requires_grad=True)
    scores = x[..., :12] @ layer.predict.weight.T
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.8, dtype=torch.float64))
    level = scores.mean(-1, keepdim=True) + scores.std(-1, keepdim=True) * quantile
    want = (F.gelu((scores - level).clamp(min=0)) * (x[..., 12:] @ layer.gate.weight.T)) @ layer.out.weight.T
    leaves = (x, *layer.parameters())
    d_out = torch.randn_like(want)
    gradients = torch.autograd.grad(want, leaves, d_out, retain_graph=True)
    for sparse in (False, True):
        got = layer(x, sparse=sparse)
        torch.testing.assert_close(got, want)
        for one, two in zip(torch.autograd.grad(got, leaves, d_out), gradients):
            torch.testing.assert_close(one, two)


def test_sizes_and_formats():
    layer = SparkFFN(16, 32)
    for shape in ((0, 16), (16,), (1, 16), (2, 3, 16)):
        for sparse in (False, True):
            assert layer(torch.randn(shape), sparse=sparse).shape == shape
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(5, 16)
        low = SparkFFN(16, 32, active=1.0)
        want = low(x).detach()
        got = low.to(dtype)(x.to(dtype)).detach()
        assert got.dtype == dtype and float((got.float() - want).abs().max()) < 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 1, "neurons": 8}, "width must be an integer >= 2, got 1"),
        ({"width": 8, "neurons": 0}, "neurons must be an integer >= 2, got 0"),
        ({"width": 8, "neurons": 8, "active": 0.0}, r"active must be in \(0, 1\], got 0.0"),
        ({"width": 8, "neurons": 8, "rank": 8}, "rank must be an integer in 1..7, got 8"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SparkFFN(**options)
