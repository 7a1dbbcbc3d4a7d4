"""FlashDecoding++: partial softmaxes with one maximum, computed again on overflow; flat products by measurement."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tests.conformance.common import ENGINES, exact, qkv, widest
from tilewise.attention import FlatProducts, UnifiedMax, decode, measure_flat
from tilewise.attention.unified_max import REACH
from tilewise.kernels.attend_tiles import native

SEEN = torch.ones(1, 900, dtype=torch.bool)


def _recomputed() -> int:
    library = native.LIBRARY.loaded
    assert not isinstance(library, str)
    return library.tilewise_recomputed_pieces()


@pytest.mark.evidence
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_maximum_for_all_parts_is_exact_and_recomputes_on_overflow(group, dtype):
    """Near the scores nothing is computed again; far off, every part is, and the answer stays the same."""
    q, k, v = qkv(2, 2 * group, 2, 1, 900, d=16, dtype=dtype)
    want = exact(q, k, v, SEEN)
    near = UnifiedMax.calibrate(q, k)
    assert near.fits
    _recomputed()
    answers, counts = [], []
    for value in (near, near.value + 0.9 * REACH, near.value + 1000, near.value - 1000):
        answers.append(decode(q, k, v, value, engine="native", return_lse=True))
        counts.append(_recomputed())
    assert counts[0] == counts[1] == 0
    assert counts[2] == counts[3] >= 4  # both heads of both sequences at the least
    usual = tilewise.attend(q, k, v, mask="causal", engine="native", return_lse=True)
    assert _recomputed() == 0
    eps = torch.finfo(dtype).eps
    for out, lse in answers:
        assert float((out.double() - usual.out.double()).abs().max()) <= 4 * eps * float(v.abs().max())
        assert float((lse.double() - want.lse).abs().max()) <= 64 * torch.finfo(torch.float32).eps * 8
    if dtype == torch.float32:
        for out, _ in answers:
            want.check({"out": out})


@pytest.mark.evidence
def test_without_computing_again_a_far_maximum_is_wrong():
    """The control: the plain formula with a maximum that does not fit overflows, or all its weights vanish."""
    q, k, v = qkv(1, 1, 1, 1, 300, d=16, dtype=torch.float32)
    scores = q @ k.mT * 16**-0.5

    def plain(value: float) -> torch.Tensor:
        weights = (scores - value).exp()
        return weights @ v / weights.sum(-1, keepdim=True)

    good = plain(float(scores.max()))
    for value in (-1000.0, 1000.0):
        assert plain(value).isnan().all()
        fixed = decode(q, k, v, value, engine="native")
        assert torch.allclose(fixed, good, rtol=1e-5, atol=1e-6)


@pytest.mark.evidence
def test_parts_with_one_maximum_add_up_without_rescaling():
    """The paper's asynchronous softmax: sums of parts are added as they are; an online softmax must rescale."""
    q, k, v = qkv(1, 2, 2, 1, 1024, d=16)
    scores = q @ k.mT * 0.25
    value = UnifiedMax.calibrate(q, k).value
    numerator, denominator, rescaled = 0.0, 0.0, 0
    top = torch.full((1, 2, 1), -torch.inf, dtype=torch.float64)
    for part, values in zip(scores.split(64, -1), v.split(64, 2)):
        weights = (part - value).exp()
        numerator, denominator = numerator + weights @ values, denominator + weights.sum(-1, keepdim=True)
        rescaled += int((part.amax(-1) > top).sum())  # an online softmax would rescale what it has so far
        top = torch.maximum(top, part.amax(-1))
    exact(q, k, v, torch.ones(1, 1024, dtype=torch.bool)).check({"out": numerator / denominator})
    assert rescaled > 2 * 2  # more often than the first part of each head


def test_a_sequence_that_strays_in_one_part_is_computed_again_there_alone():
    q, k, v = qkv(1, 1, 1, 1, 16_384, d=8, dtype=torch.float32)
    k[:, :, 9000] *= 0
    k[:, :, 9000] += 300 * q[0, 0, 0] / q[0, 0, 0].square().sum() * 8**0.5  # one score of 300
    _recomputed()
    got = decode(q, k, v, 0.0, engine="native")
    assert _recomputed() == 1
    exact(q, k, v, torch.ones(1, 16_384, dtype=torch.bool)).check({"out": got})


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_same(engine):
    q, k, v = qkv(2, 4, 2, 1, 200, dtype=widest(engine))
    want = exact(q, k, v, torch.ones(1, 200, dtype=torch.bool))
    want.check({"out": decode(q, k, v, 3.0, engine=engine)})


def test_rows_that_see_nothing_and_masks():
    q, k, v = qkv(1, 2, 1, 3, 40, dtype=torch.float32)
    mask = torch.rand(3, 40) > 0.5
    mask[1] = False
    out, lse = decode(q, k, v, 2.0, mask=mask, engine="native", return_lse=True)
    assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all()
    exact(q, k, v, mask).check({"out": out})


def test_scale_and_softcap_are_those_of_attend():
    q, k, v = qkv(1, 2, 1, 1, 100, dtype=torch.float32)
    got = decode(q=q, k=k, v=v, unified_max=1.0, mask=None, scale=0.2, softcap=3.0, engine="native")
    want = tilewise.attend(q, k, v, scale=0.2, softcap=3.0, engine="native")
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_calibration_says_when_no_maximum_fits():
    q, k, _ = qkv(1, 2, 1, 50, 60, d=8)
    assert UnifiedMax.calibrate(q, k).fits
    assert (
        UnifiedMax(value=0, lowest=-60, highest=60).fits
        and not UnifiedMax(value=0, lowest=-61, highest=0).fits
    )
    wide = torch.cat([q, 200 * q], 2)
    found = UnifiedMax.calibrate(wide, k)
    assert not found.fits and found.lowest < found.value < found.highest
    with pytest.raises(ValueError, match="q and k must not be empty"):
        UnifiedMax.calibrate(q[:, :, :0], k)


@pytest.mark.evidence
def test_flat_products_go_by_what_was_measured():
    """The inflection is where loops stop winning; a loop that wins again later does not count."""
    rows = (1, 2, 4, 8)
    assert FlatProducts(rows=rows, loops=(1, 1, 3, 9), products=(2, 2, 2, 2)).streamed == 2
    assert FlatProducts(rows, (3, 1, 1, 1), (2, 2, 2, 2)).streamed == 0
    assert FlatProducts(rows, (1, 1, 1, 1), (2, 2, 2, 2)).streamed == 8
    assert FlatProducts(rows, (1, 3, 1, 1), (2, 2, 2, 2)).streamed == 1
    before = native.STREAMED[torch.float32]
    try:
        measured = measure_flat(dtype=torch.float32, head_dim=32, keys=2048, rows=(1, 2, 8), repeats=2)
        assert native.STREAMED[torch.float32] == measured.streamed
        assert min(measured.loops + measured.products) > 0
        q, k, v = qkv(1, 16, 2, 1, 700, d=24, dtype=torch.float32)
        for streamed in (0, 8):  # both ways are right, so that the choice is one of speed alone
            native.STREAMED[torch.float32] = streamed
            out = tilewise.attend(q, k, v, engine="native")
            exact(q, k, v, torch.ones(1, 700, dtype=torch.bool)).check({"out": out})
    finally:
        native.STREAMED[torch.float32] = before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_input(value):
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(ValueError, match="unified_max must be a finite number"):
        decode(q, k, v, value)
    with pytest.raises(ValueError, match=r"dtype must be one of .*torch.float32.*, got torch.float64"):
        measure_flat(torch.float64)
