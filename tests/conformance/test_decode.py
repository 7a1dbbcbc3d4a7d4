"""Conformance 8: prefill then token by token, or chunk by chunk, equals the full forward."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tests.conformance.common import ENGINES, FULL, METHODS, exact, grid, methods, qkv
from tilewise.attention import plan
from tilewise.attention.method import MODES

N = 80
# At full density every method that supports a mode is exact in it. Sparse, these choose for a query what they
# choose for it in the full forward: sink-window reads nothing, MoBA routes every query alone over blocks cut from
# the first key, XAttention chooses for a tile of queries over tiles cut from the first key (chunks of whole tiles),
# PrFlashAttention draws for a tile of queries what it drew for it in the prompt.
DECODES = {name: METHODS[name] for name in ("dense", "sink-window", "moba", "pr-flash", "hisa", "spark")}
CHUNKS = {**DECODES, "xattention": METHODS["xattention"]}
BY_TILES = (METHODS["xattention"], METHODS["pr-flash"])


def _supporting(mode: str, table) -> dict:
    full = {f"{name}, full": method for name, method in FULL.items() if mode in method.modes}
    return {**full, **{name: method for name, method in table.items() if mode in method.modes}}


def _steps(method, q, k, v, borders, engine):
    """Calls with the queries between two borders and all keys so far."""
    outs = [
        tilewise.attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], method, mask="causal", engine=engine)
        for a, b in zip([0, *borders], [*borders, q.shape[2]])
    ]
    return torch.cat(outs, 2)


@pytest.mark.parametrize("engine", ["auto", "torch", "definition"])
@pytest.mark.parametrize(
    "method", _supporting("decode", DECODES).values(), ids=_supporting("decode", DECODES)
)
def test_prefill_then_token_by_token(method, engine):
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=N)
    want = exact(q, k, v, grid(plan(method, q, k, mask="causal"), 2, 4, N, N))
    for prefill in (1, 17, 64):
        want.check({"out": _steps(method, q, k, v, range(prefill, N), engine)})


@pytest.mark.parametrize("engine", ["auto", "torch", "definition"])
@pytest.mark.parametrize(
    "method",
    _supporting("chunked prefill", CHUNKS).values(),
    ids=_supporting("chunked prefill", CHUNKS),
)
def test_chunked_prefill(method, engine):
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=N)
    want = exact(q, k, v, grid(plan(method, q, k, mask="causal"), 2, 4, N, N))
    for borders in ((32, 64), (64,)):
        want.check({"out": _steps(method, q, k, v, borders, engine)})
    if method not in BY_TILES:  # chunks that cut a tile of queries
        for borders in ((2, 33, 35, 60), (7,)):
            want.check({"out": _steps(method, q, k, v, borders, engine)})


def test_decode_with_a_window_and_padding():
    from tilewise.tiles import Causal, Padding, sliding_window

    q, k, v = qkv(b=2, n_q=N)
    keep = torch.arange(N).ge(torch.tensor([[0], [30]]))
    whole = tilewise.attend(q, k, v, mask=Causal() & sliding_window(9) & Padding(keep))
    for t in range(40, N):
        mask = Causal() & sliding_window(9) & Padding(keep[:, : t + 1])
        one = tilewise.attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], mask=mask)
        seen = torch.zeros(2, 1, 1, t + 1, dtype=torch.bool)
        seen[..., max(0, t - 8) :] = True
        seen &= keep[:, None, None, : t + 1]
        exact(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], seen).check({"out": one})
        exact(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], seen).check(
            {"out": whole[:, :, t : t + 1]}
        )


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("mode", MODES)
def test_unsupported_modes_raise_and_name_those_that_are(mode, engine):
    n_q = {"decode": 1, "chunked prefill": 5}.get(mode, N)
    for name, method in methods().items():
        q, k, v = qkv(n_q=n_q, n_k=N)
        if mode == "train":
            q.requires_grad_()
        if mode in method.modes:
            assert tilewise.attend(q, k, v, method, mask="causal").shape == q.shape, name
            continue
        for call in (tilewise.attend, tilewise.explain):
            with pytest.raises(ValueError, match=f"{mode} .*supports {', '.join(method.modes)}"):
                call(q, k, v, method, mask="causal", engine=engine)
        with pytest.raises(ValueError, match=f"does not support {mode}"):
            plan(method, q, k, mask="causal")


def test_training_is_refused_where_it_is_not_supported():
    class OnlyInference(tilewise.attention.Dense):
        modes = ("prefill",)

    q, k, v = qkv(n_q=8)
    assert tilewise.attend(q, k, v, OnlyInference()).shape == q.shape
    v.requires_grad_()
    with pytest.raises(ValueError, match="does not support train"):
        tilewise.attend(q, k, v, OnlyInference())
    with torch.no_grad():
        tilewise.attend(q, k, v, OnlyInference())
