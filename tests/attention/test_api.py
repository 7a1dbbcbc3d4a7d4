"""The public functions of the attention room: arguments by name, bad input, explanations, plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tilewise
from tests.conformance.common import ENGINES, METHODS, exact, grid, qkv
from tilewise.attention import (
    Antidiagonal,
    Explanation,
    KeyConvolution,
    Mass,
    MoBA,
    Own,
    PBSAttention,
    Plan,
    SegmentSort,
    SinkWindow,
    Tiles,
    TopK,
    XAttention,
    as_method,
    attend_tiles,
    named,
    plan,
    router_recall,
    router_snr,
)
from tilewise.kernels import EngineRefused
from tilewise.tiles import (
    BlockCausal,
    Documents,
    Padding,
    Prefix,
    TileMap,
    Tiling,
    TokenMask,
    Window,
    as_mask,
    sliding_window,
)

N = 48
CALLS: dict[str, Callable] = {
    "attend": tilewise.attend,
    "attend_tiles": lambda q, k, v, **options: attend_tiles(q, k, v, _ones(), **options),
    "plan": lambda q, k, v, **options: plan("moba", q, k, **options),
    "explain": tilewise.explain,
}


def _ones(n: int = N) -> TileMap:
    tiles = -(-n // 16)
    return TileMap.from_mask(torch.ones(1, 1, tiles, tiles, dtype=torch.bool), (16, 16))


def test_every_argument_by_name():
    q, k, v = qkv(2, 4, 2, N)
    bias = torch.randn(4, N, N, dtype=torch.float64)
    want = exact(q, k, v, torch.ones(N, N).tril().bool(), bias=bias)
    options = {"mask": "causal", "bias": bias, "engine": "torch"}
    got = tilewise.attend(
        q=q, k=k, v=v, method=None, scale=None, softcap=None, return_lse=False, layout="bhnd", **options
    )
    want.check({"out": got})
    got = attend_tiles(
        q=q, k=k, v=v, tile_map=_ones(), scale=8**-0.5, softcap=None, return_lse=True, **options
    )
    want.check({"out": got.out})
    made = plan(method="dense", q=q, k=k, mask="causal", scale=0.5)
    assert made.seconds >= 0 and made.density == 1
    why = tilewise.explain(
        q=q, k=k, v=v, method=made, softcap=2.0, return_lse=True, bias=bias, scale=1.0, mask=None
    )
    assert why.passes[0][0] == "torch"


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_scores_of_nothing_but_zeros_give_the_mean_of_what_is_seen(engine):
    """PyTorch's own kernel gives NaN for a causal mask at scale 0, so it must not be the one that runs."""
    q, k, v = qkv(1, 2, 2, 9, dtype=torch.float32)
    try:
        out = tilewise.attend(q, k, v, mask="causal", scale=0.0, engine=engine)
    except EngineRefused:
        assert engine == "sdpa"
        return
    want = v.cumsum(2) / torch.arange(1, 10).view(9, 1)
    torch.testing.assert_close(out, want)


def test_scale_is_a_factor_of_the_scores():
    q, k, v = qkv(1, 2, 2, N)
    for call in (tilewise.attend, lambda *x, **o: attend_tiles(*x, _ones(), **o)):
        for engine in ("auto", "torch", "definition"):
            want = exact(q * 0.3 * 8**0.5, k, v, torch.ones(N, N).tril().bool())
            want.check({"out": call(q, k, v, mask="causal", scale=0.3, engine=engine)})
    # Methods choose with the same scale: a scale of 0 makes all tiles alike, which a large one does not.
    q, k, _ = qkv(1, 2, 2, 256)
    sharp, flat = (plan(METHODS["xattention"], q, k, mask="causal", scale=s) for s in (50.0, 0.0))
    assert sharp.density < flat.density


def test_a_float_mask_is_added_and_a_boolean_one_says_what_may_be_seen():
    q, k, v = qkv(2, 4, 2, N)
    seen = torch.rand(2, 1, N, N) > 0.3
    additive = torch.zeros(2, 1, N, N, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    want = exact(q, k, v, seen)
    for mask in (seen, additive, TokenMask(seen)):
        for engine in ("torch", "definition"):
            want.check({"out": tilewise.attend(q, k, v, mask=mask, engine=engine)})
    bias = torch.randn(4, 1, N, dtype=torch.float64)
    exact(q, k, v, seen, bias=bias.expand(2, 4, N, N)).check(
        {"out": tilewise.attend(q, k, v, mask=additive, bias=bias)}
    )


def test_a_plan_serves_other_values_and_says_what_it_decided():
    q, k, v = qkv(1, 2, 2, N)
    made = plan(METHODS["moba"], q, k, mask="causal")
    for values in (v, -v, v[..., :3]):
        exact(q, k, values, grid(made, 1, 2, N, N)).check({"out": tilewise.attend(q, k, values, made)})
    assert made.tile_maps[0].keep.shape == (1, 2, N, 3)
    assert plan(METHODS["sink-window"], q, k, mask="causal").tile_maps[1] is None
    every = torch.arange(N)
    assert torch.equal(made.kept(q_tokens=every, k_tokens=every, heads=2), grid(made, 1, 2, N, N))
    assert torch.equal(made.kept(every[40:44], every[::5], 2), grid(made, 1, 2, N, N)[:, :, 40:44, ::5])


@pytest.mark.parametrize("name", METHODS)
def test_kept_is_what_a_plan_computes(name):
    q, k, _ = qkv(2, 4, 2, 97)
    made = plan(METHODS[name], q, k, mask="causal")
    every = torch.arange(97)
    kept = made.kept(every, every, 4)
    assert torch.equal(kept.expand(2, 4, 97, 97), grid(made, 2, 4, 97, 97))


# Explanations


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "options", [{}, {"return_lse": True}, {"softcap": 1.0}, {"bias": torch.zeros(1)}], ids=str
)
def test_explain_names_the_engine_that_runs_and_why_no_other(name, engine, options, monkeypatch):
    from tilewise.kernels import attend_tiles as kernel

    q, k, v = qkv(1, 2, 1, N)
    ran = []
    for each, module in kernel.ENGINES.items():

        def run(call, each=each, inner=module.run):
            ran.append(each)
            return inner(call)

        monkeypatch.setattr(module, "run", run)
    try:
        why = tilewise.explain(q, k, v, METHODS[name], mask="causal", engine=engine, **options)
    except EngineRefused as refusal:
        with pytest.raises(EngineRefused) as raised:
            tilewise.attend(q, k, v, METHODS[name], mask="causal", engine=engine, **options)
        assert str(raised.value) == str(refusal) and f"engine {engine!r} cannot run" in str(refusal)
        assert ran == []
        return
    assert ran == []
    tilewise.attend(q, k, v, METHODS[name], mask="causal", engine=engine, **options)
    assert ran == [chosen for chosen, _ in why.passes]
    for chosen, refused in why.passes:
        assert set(refused) == set(kernel.ENGINES) - {chosen}
        assert all(reason.strip() for reason in refused.values())
        assert chosen != "definition" or engine == "definition"
        assert all(reason in str(why) and other in str(why) for other, reason in refused.items())
    assert isinstance(why, Explanation) and str(METHODS[name]) in str(why)


def test_auto_never_picks_the_definition(monkeypatch):
    from tilewise.kernels import attend_tiles as kernel

    for name, module in kernel.ENGINES.items():
        if name != "definition":
            monkeypatch.setattr(module, "refuse", lambda call: "is switched off")
    q, k, v = qkv(1, 2, 2, N)
    for call in (tilewise.attend, tilewise.explain):
        with pytest.raises(EngineRefused, match="no engine can run this call .*torch: is switched off"):
            call(q, k, v)
    assert tilewise.attend(q, k, v, engine="definition").shape == q.shape


def test_explain_of_a_plan_and_its_text():
    q, k, v = qkv(1, 2, 2, N)
    text = str(tilewise.explain(q, k, v, plan("sink-window", q, k, mask="causal")))
    assert "2 passes" in text and "pass 2 runs on torch" in text and "not definition: " in text
    assert "1 pass\n" in str(tilewise.explain(q, k, v))


# Bad input: each message names the argument, what was given, what is accepted


def _t(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


Q = _t(2, 4, N, 8)
KV = _t(2, 2, N, 8)
BAD_TENSORS = {
    "q is no tensor": ((None, KV, KV), ValueError, r"q must be a tensor \[B, H, N, D\], got NoneType"),
    "q of 3 axes": ((Q[0], KV, KV), ValueError, r"q must be a tensor .*got \[4, 48, 8\]"),
    "k of 3 axes": ((Q, KV[0], KV), ValueError, r"k must be a tensor .*got \[2, 48, 8\]"),
    "dtypes differ": ((Q, KV.float(), KV), TypeError, "share one floating dtype.*float64.*k torch.float32"),
    "integers": ((Q.long(), KV.long(), KV.long()), TypeError, "share one floating dtype.*int64"),
    "batches differ": ((Q, KV[:1], KV[:1]), ValueError, r"k and v must be \[2, .*got \[1, 2, 48, 8\]"),
    "heads do not divide": (
        (Q, _t(2, 3, N, 8), _t(2, 3, N, 8)),
        ValueError,
        "multiple of kv heads, got 4 and 3",
    ),
    "no kv heads": ((Q, _t(2, 0, N, 8), _t(2, 0, N, 8)), ValueError, "multiple of kv heads, got 4 and 0"),
    "head_dims differ": ((Q, _t(2, 2, N, 4), _t(2, 2, N, 4)), ValueError, "head_dim in 1..512, got 8 and 4"),
    "head_dim 513": ((_t(1, 1, 2, 513),) * 3, ValueError, "head_dim in 1..512, got 513"),
    "head_dim 0": ((_t(1, 1, 2, 0),) * 3, ValueError, "head_dim in 1..512, got 0"),
}
BAD_VALUES = {
    "v is no tensor": ((Q, KV, "v"), ValueError, r"v must be a tensor .*got str"),
    "v of another dtype": ((Q, KV, KV.half()), TypeError, "share one floating dtype.*v torch.float16"),
    "v of another length": ((Q, KV, KV[:, :, :5]), ValueError, r"k and v must be .*\[2, 2, 5, 8\]"),
    "v of other heads": ((Q, KV, KV[:, :1]), ValueError, r"k and v must be .*\[2, 1, 48, 8\]"),
}
BAD_MASKS = {
    "integer mask": (_t(N, N).long(), TypeError, "mask tensor must be bool .*got torch.int64"),
    "mask for another length": (
        _t(N, 40).bool(),
        ValueError,
        r"mask is for \[48, 40\] tokens, the call has \[48, 48\]",
    ),
    "mask of 3 axes": (_t(2, N, N).bool(), TypeError, r"mask tensor must be bool \[N_q, N_k\] or .*got"),
    "mask of another batch": (_t(3, 1, N, N).bool(), ValueError, "mask has 3 batch, the call has 2"),
    "mask of other heads": (_t(1, 3, N, N).bool(), ValueError, "mask has 3 heads, the call has 4"),
    "mask of kv heads": (_t(1, 2, N, N).bool(), ValueError, "mask has 2 heads, the call has 4"),
    "mask by an unknown name": (
        "casual",
        ValueError,
        "mask must be None, 'causal', a mask object or .*got 'casual'",
    ),
    "mask of another kind": (3, TypeError, "mask must be None, 'causal', .*got int"),
    "float mask for another length": (
        _t(N, 40),
        ValueError,
        r"mask must broadcast to \[2, 4, 48, 48\], got .*48, 40",
    ),
    "padding for another length": (
        Padding(_t(2, 40).long()),
        ValueError,
        "padding mask covers 40 keys.*are 48",
    ),
    "padding for another batch": (Padding(_t(3, N).long()), ValueError, "mask has 3 batch, the call has 2"),
    "documents too short": (Documents(torch.tensor([0, 40])), ValueError, "cu_seqlens ends at 40, but .* 47"),
}
BAD_OPTIONS = {
    "bias that does not broadcast": (
        {"bias": _t(3, N, N)},
        ValueError,
        r"bias must broadcast to \[2, 4, 48, 48\], got",
    ),
    "bias of 5 axes": ({"bias": _t(1, 1, 1, N, N)}, TypeError, "bias must be a floating tensor"),
    "integer bias": ({"bias": _t(N, N).long()}, TypeError, "bias must be a floating tensor"),
    "bias that is no tensor": ({"bias": 1.0}, TypeError, "bias must be a floating tensor"),
    "bias and float mask that do not fit": (
        {"bias": _t(1, 1, N, N), "mask": _t(5, 5)},
        ValueError,
        r"mask must broadcast to \[2, 4, 48, 48\], got .*5, 5",
    ),
    "bias of another kind beside a float mask": (
        {"bias": "x", "mask": _t(N, N)},
        TypeError,
        "bias must be a floating",
    ),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap must be None or > 0, got 0.0"),
    "softcap below 0": ({"softcap": -1.0}, ValueError, "softcap must be None or > 0, got -1.0"),
    "unknown engine": ({"engine": "trion"}, ValueError, "engine must be 'auto' or one of .*got 'trion'"),
    "engine that refuses": (
        {"engine": "sdpa", "return_lse": True},
        EngineRefused,
        "engine 'sdpa' cannot run this call",
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", {**BAD_TENSORS, **BAD_VALUES})
def test_bad_tensors(call, case):
    inputs, error, message = {**BAD_TENSORS, **BAD_VALUES}[case]
    if call == "plan" and case in BAD_VALUES:
        return  # a plan takes no values
    with pytest.raises(error, match=message):
        CALLS[call](*inputs)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks(call, case):
    mask, error, message = BAD_MASKS[case]
    with pytest.raises(error, match=message):
        CALLS[call](Q, KV, KV, mask=mask)


@pytest.mark.parametrize("call", ["attend", "attend_tiles", "explain"])
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(call, case):
    options, error, message = BAD_OPTIONS[case]
    if call == "attend_tiles" and "engine 'sdpa'" in message:
        message += ": computes every tile"
    with pytest.raises(error, match=message):
        CALLS[call](Q, KV, KV, **options)


@pytest.mark.parametrize(
    "inputs", [(Q, KV, KV), (None, KV, KV), (Q[0, 0], KV, KV), (3, 4, 5)], ids=["good", "none", "flat", "int"]
)
@pytest.mark.parametrize("layout", ["nhd", "BHND", None, "bnhd"])
def test_bad_layouts(layout, inputs):
    if layout == "bnhd":
        if (
            inputs[0] is Q
        ):  # the axes are taken as said, not guessed: heads and tokens swapped do not fit here
            with pytest.raises(ValueError, match="multiple of kv heads|alike|share a head_dim"):
                tilewise.attend(Q.transpose(1, 2), KV, KV, layout=layout)
            return
        with pytest.raises(ValueError, match=r"q must be a tensor \[B, .*got"):
            tilewise.attend(*inputs, layout=layout)
        return
    with pytest.raises(ValueError, match="layout must be 'bhnd' or 'bnhd', got"):
        tilewise.attend(*inputs, layout=layout)


@pytest.mark.parametrize("call", [tilewise.attend, tilewise.explain, lambda q, k, v, m: plan(m, q, k)])
@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("xattenton", ValueError, "unknown attention method 'xattenton'; did you mean xattention"),
        ("mobba", ValueError, "unknown attention method 'mobba'; did you mean moba"),
        ("zzz", ValueError, "unknown attention method 'zzz'; known methods: dense, .*moba, .*xattention"),
        (3, TypeError, "method must be None, a name or a configured method, got int"),
        (MoBA, TypeError, "method must be None, a name or a configured method, got type"),
    ],
)
def test_unknown_methods(call, method, error, message):
    with pytest.raises(error, match=message):
        call(Q, KV, KV, method)


ANOTHER_CALL = {
    "longer": ((_t(2, 4, 50, 8), _t(2, 2, 50, 8)), "plan was made for 48 .*50"),
    "more keys": ((Q, _t(2, 2, 50, 8)), "plan was made for .*48.*50"),
    "more heads": ((_t(2, 8, N, 8), KV), "plan was made for .*heads.*8"),
    "larger batch": ((_t(3, 4, N, 8), _t(3, 2, N, 8)), "plan was made for .*batch.*3"),
}


@pytest.mark.parametrize("case", ANOTHER_CALL)
@pytest.mark.parametrize("method", ["moba", "pbs"])
def test_a_plan_for_another_call_is_refused(method, case):
    (q, k), message = ANOTHER_CALL[case]
    made = plan(METHODS[method], Q, KV, mask="causal")
    with pytest.raises(ValueError, match=message):
        tilewise.attend(q, k, k, made)


def test_a_mask_beside_a_plan_is_not_ignored():
    """A plan holds the mask it was made for. Another one is refused or holds as well; dropped, it could leak."""
    q, k, v = qkv(2, 4, 2, N)
    made = plan(METHODS["moba"], q, k)
    want = exact(q, k, v, grid(made, 2, 4, N, N) & torch.ones(N, N).tril().bool())
    try:
        out = tilewise.attend(q, k, v, made, mask="causal")
    except ValueError as refusal:
        assert "mask" in str(refusal) and "plan" in str(refusal)
    else:
        want.check({"out": out})


BAD_MAPS = {
    "no map": (
        lambda: torch.ones(1, 1, 3, 3, dtype=torch.bool),
        TypeError,
        "tile_map must be a TileMap, got Tensor",
    ),
    "wrong count of tiles": (
        lambda: TileMap.from_mask(torch.ones(1, 1, 3, 4, dtype=torch.bool), (16, 16)),
        ValueError,
        r"tile map is \[1, 1, 3, 4\], but 48 queries by 48 keys need \[2, 4, 3, 3\]",
    ),
    "wrong heads": (
        lambda: TileMap.from_mask(torch.ones(1, 2, 3, 3, dtype=torch.bool), (16, 16)),
        ValueError,
        "tile map is",
    ),
    "wrong batch": (
        lambda: TileMap.from_mask(torch.ones(3, 1, 3, 3, dtype=torch.bool), (16, 16)),
        ValueError,
        "tile map is",
    ),
    "bounds end elsewhere": (
        lambda: TileMap(
            torch.ones(1, 1, 2, 3, dtype=torch.bool), Tiling.from_bounds(torch.tensor([0, 5, 40])), Tiling(16)
        ),
        ValueError,
        r"query tiling ends at \[40\], but the sequence has 48 tokens",
    ),
    "key bounds end elsewhere": (
        lambda: TileMap(
            torch.ones(1, 1, 3, 2, dtype=torch.bool), Tiling(16), Tiling.from_bounds(torch.tensor([0, 5, 50]))
        ),
        ValueError,
        r"key tiling ends at \[50\], but the sequence has 48 tokens",
    ),
    "query bounds of other heads": (
        lambda: TileMap(torch.ones(1, 1, 1, 3, dtype=torch.bool), _bounds(3), Tiling(16)),
        ValueError,
        "query tiling has .*3.*heads",
    ),
    "key bounds of query heads": (
        lambda: TileMap(torch.ones(1, 1, 3, 1, dtype=torch.bool), Tiling(16), _bounds(4)),
        ValueError,
        "key tiling has .*4.*heads",
    ),
}


def _bounds(heads: int) -> Tiling:
    return Tiling.from_bounds(torch.tensor([0, N]).expand(1, heads, 2).contiguous())


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_tile_maps(case):
    make, error, message = BAD_MAPS[case]
    with pytest.raises(error, match=message):
        attend_tiles(Q, KV, KV, make())


ONE_TILE = torch.ones(1, 1, 1, 1, dtype=torch.bool)
BAD_PARTS = {
    "map of integers": (lambda: TileMap.from_mask(ONE_TILE.long()), TypeError, "tile map must be bool"),
    "map of 2 axes": (
        lambda: TileMap.from_mask(ONE_TILE[0, 0]),
        TypeError,
        r"tile map must be bool .*\[1, 1\]",
    ),
    "map that is a list": (lambda: TileMap.from_mask([[True]]), TypeError, "tile map must be bool"),
    "tile size 0": (
        lambda: TileMap.from_mask(ONE_TILE, (0, 4)),
        ValueError,
        "tile size must be an integer >= 1, got 0",
    ),
    "tile size 1.5": (
        lambda: TileMap.from_mask(ONE_TILE, (4, 1.5)),
        ValueError,
        "tile size must be an integer .*1.5",
    ),
    "one tile size": (
        lambda: TileMap.from_mask(ONE_TILE, (4,)),
        ValueError,
        r"tile must be \(queries, keys\), got \(4,\)",
    ),
    "tiling of -1": (lambda: Tiling(size=-1), ValueError, "tile size must be an integer >= 1, got -1"),
    "bounds of floats": (lambda: Tiling.from_bounds(_t(3)), ValueError, "bounds must be int64 .*float64"),
    "bounds of 2 axes": (
        lambda: Tiling.from_bounds(_t(2, 3).long()),
        ValueError,
        r"bounds must be int64 .*\[2, 3\]",
    ),
    "bounds that do not start at 0": (
        lambda: Tiling.from_bounds(torch.tensor([1, 3])),
        ValueError,
        "start at 0 and never",
    ),
    "bounds that decrease": (
        lambda: Tiling.from_bounds(torch.tensor([0, 3, 2])),
        ValueError,
        "start at 0 and never decrease",
    ),
    "no bounds": (
        lambda: Tiling.from_bounds(torch.tensor([], dtype=torch.int64)),
        ValueError,
        "bounds must be",
    ),
    "window left -1": (
        lambda: Window(-1, 0),
        ValueError,
        "window left must be None or an integer >= 0, got -1",
    ),
    "window right 1.0": (
        lambda: Window(0, 1.0),
        ValueError,
        "window right must be None or an integer >= 0, got 1.0",
    ),
    "sliding window 0": (
        lambda: sliding_window(0),
        ValueError,
        "sliding window size must be an integer >= 1, got 0",
    ),
    "block 0": (lambda: BlockCausal(block=0), ValueError, "block must be an integer >= 1, got 0"),
    "prefix -1": (lambda: Prefix(length=-1), ValueError, "prefix length must be an integer >= 0, got -1"),
    "documents as a list": (
        lambda: Documents([0, 3]),
        TypeError,
        "cu_seqlens must be an int32 or int64 .*got list",
    ),
    "documents of floats": (
        lambda: Documents(_t(3)),
        TypeError,
        "cu_seqlens must be an int32 or int64 .*float64",
    ),
    "documents from 1": (lambda: Documents(torch.tensor([1, 3])), ValueError, "cu_seqlens must start at 0"),
    "documents that decrease": (lambda: Documents(torch.tensor([0, 3, 2])), ValueError, "never decrease"),
    "no documents": (lambda: Documents(torch.tensor([0])), ValueError, "at least two entries"),
    "padding of floats": (
        lambda: Padding(_t(2, 3)),
        TypeError,
        r"keep must be a bool or integer tensor \[B, N_k\]",
    ),
    "padding of 1 axis": (lambda: Padding(_t(3).bool()), TypeError, r"keep must be a bool .*\[3\]"),
    "token mask of floats": (lambda: TokenMask(seen=_t(3, 3)), TypeError, "mask tensor must be bool"),
    "mask by number": (lambda: as_mask(1), TypeError, "mask must be None, 'causal', .*got int"),
    "top-k 0": (lambda: TopK(k=0), ValueError, "top-k must be an integer >= 1, got 0"),
    "top-k 1.5": (lambda: MoBA(top_k=1.5), ValueError, "top-k must be an integer >= 1, got 1.5"),
    "mass 0": (lambda: Mass(threshold=0), ValueError, r"mass threshold must be in \(0, 1\], got 0"),
    "mass 1.1": (
        lambda: XAttention(threshold=1.1),
        ValueError,
        r"mass threshold must be in \(0, 1\], got 1.1",
    ),
    "mass nan": (
        lambda: PBSAttention(threshold=float("nan")),
        ValueError,
        r"mass threshold must be .*got nan",
    ),
    "MoBA block 0": (lambda: MoBA(block=0), ValueError, "block must be an integer >= 1, got 0"),
    "XAttention stride 0": (lambda: XAttention(stride=0), ValueError, "stride must divide .*got 0"),
    "XAttention stride 3": (
        lambda: XAttention(stride=3),
        ValueError,
        "stride must divide the tile size 128, got 3",
    ),
    "XAttention tile 0": (lambda: XAttention(tile=0), ValueError, "tile .*got 0"),
    "PBS segment 100": (
        lambda: PBSAttention(segment=100),
        ValueError,
        "segment must be a multiple of .*128, got 100",
    ),
    "PBS tile 0": (lambda: PBSAttention(tile=0), ValueError, "tile .*got 0"),
    "sink -1": (lambda: SinkWindow(sink=-1), ValueError, "sink must be an integer >= 0, got -1"),
    "window 0": (lambda: SinkWindow(window=0), ValueError, "window must be an integer >= 1, got 0"),
    "sort segment 0": (lambda: SegmentSort(segment=0), ValueError, "segment must be an integer >= 1, got 0"),
    "sort probe 0": (
        lambda: SegmentSort(segment=4, probe=0),
        ValueError,
        "probe must be an integer >= 1, got 0",
    ),
    "own segment 0": (lambda: Own(segment=0), ValueError, "segment must be an integer >= 1, got 0"),
    "antidiagonal stride 0": (
        lambda: Antidiagonal(stride=0),
        ValueError,
        "stride must be an integer >= 1, got 0",
    ),
    "tiles of 0": (lambda: Tiles(Antidiagonal(1), TopK(1), tile=(0, 4)), ValueError, "tile .*got"),
    "taps 0": (lambda: KeyConvolution(channels=4, width=0), ValueError, "width must be >= 1, got 0"),
    "router of no blocks": (
        lambda: router_recall(snr=1.0, blocks=0, top_k=1),
        ValueError,
        "blocks and top_k",
    ),
    "router of clusters too large": (
        lambda: router_snr(head_dim=64, block=4, gap=1.0, clustered=5, cluster_gap=0.1),
        ValueError,
        "clustered in 1..block",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts(case):
    make, error, message = BAD_PARTS[case]
    with pytest.raises(error, match=message):
        make()


def test_a_score_that_does_not_fit_its_tiles():
    method = Tiles(score=Antidiagonal(stride=4), select=TopK(1), tile=(16, 6))
    with pytest.raises(ValueError, match="antidiagonal scores need tiles in multiples of stride 4"):
        tilewise.attend(Q, KV, KV, method)


def test_nothing_is_changed_by_a_call_that_raises():
    tensors = [x.requires_grad_() for x in qkv(1, 2, 2, N)]
    bias = torch.randn(1, 2, N, N, dtype=torch.float64, requires_grad=True)
    everything = [*tensors, bias]
    before = [(x.detach().clone(), x._version) for x in everything]
    seed, methods = torch.get_rng_state(), named()
    for options in (
        {"engine": "sdpa"},
        {"engine": "no"},
        {"mask": torch.zeros(3, 3).bool()},
        {"method": "no"},
    ):
        with pytest.raises(ValueError):
            tilewise.attend(*tensors, bias=bias, **options)
    with pytest.raises(ValueError):
        attend_tiles(*tensors, _ones(100), bias=bias)
    for x, (value, version) in zip(everything, before):
        assert torch.equal(x, value) and x._version == version and x.grad is None
    assert torch.equal(torch.get_rng_state(), seed) and named() == methods


def test_methods_are_values():
    """Settings are fields; equal settings are equal methods; names lead to defaults."""
    for name, method in METHODS.items():
        assert as_method(name) == type(method)() and as_method(method) is method
        assert method.parameters() == {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
        assert method == type(method)(**method.parameters())
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, next(iter(method.parameters()), "x"), 1)
    assert as_method(method=None) == as_method("dense")
    assert isinstance(plan(None, Q, KV), Plan)
