"""xLSTM 7B: exponential gates with a stabiliser and a normaliser, and the block they stand in."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence import MLSTM, MixerState, ModelConfig, SequenceModel, scan, xlstm_7b


def drawn(n: int, size: float, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values, log forget gates and input gates of a size, `[2, 2, n, *]`."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, n, 16, generator=gen, dtype=torch.float64) for _ in range(3))
    forget, write = (torch.randn(2, 2, n, generator=gen, dtype=torch.float64) for _ in range(2))
    return [x.to(dtype) for x in (q, k, v, F.logsigmoid(forget + 3), size * write)]


def recurrent(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor) -> Tensor:
    """The paper's stabilised recurrence, written out, one token after the other."""
    matrix = q.new_zeros(*q.shape[:2], 16, 16)
    sums, peak, rows = q.new_zeros(*q.shape[:2], 16), q.new_full(q.shape[:2], -torch.inf), []
    for t in range(q.shape[2]):
        before, peak = peak, torch.maximum(forget[:, :, t] + peak, write[:, :, t])
        keep, put = (forget[:, :, t] + before - peak).exp(), (write[:, :, t] - peak).exp()
        key = k[:, :, t]
        matrix = keep[..., None, None] * matrix + put[..., None, None] * key.unsqueeze(3) * v[
            :, :, t
        ].unsqueeze(2)
        sums = keep.unsqueeze(2) * sums + put.unsqueeze(2) * key
        query = q[:, :, t] / 4
        below = torch.maximum((sums * query).sum(-1).abs(), (-peak).exp())
        rows.append((matrix * query.unsqueeze(3)).sum(2) / below.unsqueeze(2))
    return torch.stack(rows, 2)


def naive(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor) -> Tensor:
    """The same without a stabiliser: exp of the input gate as it is."""
    matrix, sums, rows = q.new_zeros(*q.shape[:2], 16, 16), q.new_zeros(*q.shape[:2], 16), []
    for t in range(q.shape[2]):
        keep, put, key = forget[:, :, t].exp(), write[:, :, t].exp(), k[:, :, t]
        matrix = keep[..., None, None] * matrix + put[..., None, None] * key.unsqueeze(3) * v[
            :, :, t
        ].unsqueeze(2)
        sums = keep.unsqueeze(2) * sums + put.unsqueeze(2) * key
        query = q[:, :, t] / 4
        below = (sums * query).sum(-1).abs().clamp(min=1)
        rows.append((matrix * query.unsqueeze(3)).sum(2) / below.unsqueeze(2))
    return torch.stack(rows, 2)


def scanned(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor, **options) -> Tensor:
    return scan(q, k, v, decay=forget, log_beta=write, normalize="bounded", **options)  # type: ignore[return-value]


def gradients(run, given: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


@pytest.mark.evidence
@pytest.mark.parametrize("size", [0.1, 3.0, 100.0])
def test_chunkwise_is_the_recurrence_with_a_running_maximum(size):
    """Forward and backward in float64, from gates near 1 to gates that no float32 holds (exp of 300)."""
    given = drawn(150, size)
    want = gradients(recurrent, given)
    for chunk in (None, 32):
        found = gradients(lambda *x, chunk=chunk: scanned(*x, chunk=chunk, engine="torch"), given)
        for got, exact in zip(found, want):
            assert (got - exact).norm() <= 1e-9 * exact.norm()
    if size < 50:  # where it does not overflow, the naive form is the same function
        assert (naive(*given) - want[0]).norm() <= 1e-9 * want[0].norm()


@pytest.mark.evidence
@pytest.mark.parametrize("size", [5.0, 100.0])
def test_naive_exponentials_overflow_and_these_do_not(size):
    """float32: at gates of 300 the naive form gives no numbers; the stabilised one is as near to float64 as the
    stabilised recurrence written out is, to a factor of 2. Weights are positive: else a denominator may cross 0."""
    errors = []
    for seed in range(4):
        given = drawn(200, size, torch.float32, seed)
        given[:2] = [x.abs() for x in given[:2]]
        assert bool(naive(*given).isfinite().all()) == (size < 50)
        exact = recurrent(*(x.double() for x in given))
        errors.append(
            [(x.double() - exact).norm() / exact.norm() for x in (scanned(*given), recurrent(*given))]
        )
    error, allowed = torch.tensor(errors).mean(0)
    assert error <= 2 * allowed, (error, allowed)


@pytest.mark.evidence
def test_the_normaliser_bounds_what_gates_write():
    """Where all weights are positive, an output stays within the values however large the gates and long the
    sequence; without a normaliser it grows with both, beyond what float16 holds."""
    q, k, v, forget, write = drawn(2000, 5.0)
    q, k = q.abs(), k.abs()
    write = write + 10
    bounded = scanned(q, k, v, forget, write)
    assert bounded.abs().max() <= v.abs().max()
    plain = scan(q, k, v, decay=forget, log_beta=write)
    assert plain.abs().max() > torch.finfo(torch.float16).max


@pytest.mark.evidence
def test_the_bound_of_one_keeps_a_new_layer_quiet():
    """A layer whose input gates are nearly shut (bias -10) adds a third or less of what one with open gates adds,
    because the denominator is never below 1. Divided by its plain sum it would speak at full size."""
    torch.manual_seed(0)
    x = torch.randn(2, 200, 64)
    layer = MLSTM(64)
    loud = MLSTM(64, input_bias=0.0)
    loud.load_state_dict({**layer.state_dict(), "input.bias": torch.zeros(4)})
    quiet, open_ = layer(x)[0].std(), loud(x)[0].std()
    assert quiet < open_ / 3, (quiet, open_)
    q, k, v, forget, write = drawn(200, 0.5)
    shut = scanned(q.abs(), k.abs(), v, forget, write - 10).std()
    by_sum = scan(q.abs(), k.abs(), v, decay=forget, log_beta=write - 10, normalize="sum").std()  # type: ignore[union-attr]
    assert shut < 0.1 * by_sum, (shut, by_sum)


@pytest.mark.evidence
def test_gates_are_capped_at_15():
    """However large the token, and smoothly: gradients still pass."""
    torch.manual_seed(0)
    layer = MLSTM(32, heads=2)
    x = (1000 * torch.randn(1, 40, 32)).requires_grad_()
    out, state = layer(x)
    assert out.isfinite().all() and isinstance(state, MixerState)
    assert state.scan.peak is not None and 14 < state.scan.peak.abs().max() <= 15
    out.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    wild = MLSTM(32, heads=2, cap=1e6)
    wild.load_state_dict(layer.state_dict())
    peak = wild(x)[1].scan.peak
    assert peak is not None and peak.abs().max() > 100


TEXT = torch.tensor(list(resources.files("tilewise.data").joinpath("sample.txt").read_bytes()))


def excerpts(seed: int, held_out: bool = False, count: int = 16, length: int = 96) -> Tensor:
    """Pieces of the bundled text, bytes `[count, length + 1]`; its last eighth is held out."""
    border = len(TEXT) * 7 // 8
    low, high = (border, len(TEXT)) if held_out else (0, border)
    starts = torch.randint(low, high - length - 1, (count, 1), generator=torch.Generator().manual_seed(seed))
    return TEXT[starts + torch.arange(length + 1)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())


def fitted(model: SequenceModel, steps: int) -> float:
    """Bits per byte on fresh text after so many steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=8e-3)
    for step in range(steps):
        loss = loss_of(model, excerpts(step))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    with torch.no_grad():
        return float(loss_of(model, excerpts(0, held_out=True, count=64)) / torch.tensor(2.0).log())


@pytest.mark.evidence
def test_a_small_model_of_the_7b_layout_trains():
    """Two blocks learn from bytes what a model without its mixers cannot: what stood before the last byte."""
    found = []
    for mixing in (True, False):
        torch.manual_seed(0)
        model = SequenceModel(xlstm_7b(256, 48, blocks=2, heads=2))
        if not mixing:
            for block in model.blocks:
                nn.init.zeros_(block.mixer.out.weight).requires_grad_(False)
        found.append(fitted(model, 120))
    assert found[0] < 0.94 * found[1], found


def test_layout_of_7b():
    """The published sizes: 32 blocks of 4,096, 8 heads, keys half as wide as values, 10,944 hidden."""
    config = xlstm_7b()
    assert (config.width, len(config.layers), config.hidden, config.tied) == (4096, 32, 10_944, False)
    assert config.vocabulary == 50_304 and config.logit_cap == 30

    def count(width: int, blocks: int, heads: int, hidden: int, vocabulary: int) -> int:
        mixer = 4 * width**2 + 2 * (width + 1) * heads + width
        return blocks * (mixer + 3 * width * hidden + 2 * width) + 2 * vocabulary * width + width

    small = SequenceModel(xlstm_7b(100, 96, blocks=2, heads=4))
    assert sum(p.numel() for p in small.parameters()) == count(96, 2, 4, 256, 100)
    assert round(count(4096, 32, 8, 10_944, 50_304) / 1e9, 2) == 6.87
    layer = MLSTM(64)
    assert layer.query.out_features * 2 == layer.value.out_features == 64
    assert torch.equal(layer.input.bias, torch.full((4,), -10.0))
    assert torch.equal(layer.forget.bias, torch.linspace(3, 6, 4))
    logits, _ = SequenceModel(ModelConfig(9, 16, ("mlstm",), tied=False, logit_cap=0.5))(
        torch.arange(9).view(1, 9)
    )
    assert 0.0 < logits.abs().max() < 0.5


def test_wrong_settings():
    with pytest.raises(ValueError, match="cap must be above 0, got 0"):
        MLSTM(32, cap=0)
    with pytest.raises(ValueError, match=r"width \* key must be a multiple of heads, got 16 and 5"):
        MLSTM(40, heads=5, key=0.4)
