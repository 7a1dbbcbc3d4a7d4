"""What the conformance tests share: the methods and engines they run over, and exact answers with their rounding.

The reference here is written independently of the library: plain float64 PyTorch over a boolean grid. How far a
correct result may lie from it is derived from the number of operations, never picked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

import tilewise
from tilewise.attention import (
    HISA,
    S2O,
    Dense,
    FlexPrefill,
    Mass,
    MeanPool,
    Method,
    MoBA,
    Own,
    Pass,
    PBSAttention,
    Plan,
    PrFlashAttention,
    ProxyAttn,
    Quantised,
    Quest,
    SageAttention2,
    SegmentSort,
    SinkWindow,
    Spark,
    Tiles,
    TopK,
    VerticalSlash,
    XAttention,
    named,
)
from tilewise.kernels import EngineRefused
from tilewise.kernels.attend_tiles import ENGINES as ENGINE_TABLE

# Engines that take minutes over the whole suite (an interpreter, a compiler for each shape) have one of their own.
OWN_SUITES = {"triton": "tests/kernels/test_triton.py", "flex": "tests/kernels/test_flex.py"}
ENGINES = [engine for engine in ENGINE_TABLE if engine not in OWN_SUITES]
# The widest format of each engine that stops short of float64; tests give it their float64 inputs rounded to it.
WIDEST = {"native": torch.float32}
LOW = (torch.float32, torch.bfloat16, torch.float16)

# Small settings, so that short sequences have many tiles. A method added by name needs an entry in both tables.
METHODS: dict[str, Method] = {
    "dense": Dense(),
    "moba": MoBA(block=16, top_k=3),
    "pbs": PBSAttention(segment=32, threshold=0.4, tile=16),
    "pr-flash": PrFlashAttention(budget=3, tile=16),
    "sink-window": SinkWindow(sink=3, window=20),
    "xattention": XAttention(stride=4, threshold=0.7, tile=32),
    "quest": Quest(page=8, top_k=4),
    "hisa": HISA(block=8, blocks=4, top_k=12),
    "spark": Spark(top_k=12, rank=4),
    "vertical-slash": VerticalSlash(vertical=6, slash=12, tile=16, probe=16, sinks=2, local=4),
    "flexprefill": FlexPrefill(gamma=0.4, tau=0.1, min_budget=16, tile=16),
    "proxy-attn": ProxyAttn(proxies=1, stride=2, threshold=0.5, min_budget=16, tile=16),
    "s2o": S2O(segment=32, threshold=0.9, tile=16, probe=4),
}
# The same methods set to compute everything.
FULL: dict[str, Method] = {
    "dense": Dense(),
    "moba": MoBA(block=16, top_k=10**6),
    "pbs": PBSAttention(segment=64, threshold=1.0, tile=32, queries=True),
    "pr-flash": PrFlashAttention(budget=10**6, tile=16),
    "sink-window": SinkWindow(sink=3, window=10**6),
    "xattention": XAttention(stride=4, threshold=1.0, tile=32),
    "quest": Quest(page=8, top_k=10**6),
    "hisa": HISA(block=8, blocks=10**6, top_k=10**6),
    "spark": Spark(top_k=10**6, rank=4),
    "vertical-slash": VerticalSlash(vertical=6, slash=10**6, tile=16, probe=16, sinks=2, local=4),
    "flexprefill": FlexPrefill(gamma=1.0, tau=0.1, min_budget=16, tile=16),
    "proxy-attn": ProxyAttn(proxies=1, stride=2, threshold=1.0, tile=16),
    "s2o": S2O(segment=32, threshold=0.0, tile=16, probe=4),
}
# Methods that round what they compute, for tests/conformance/test_rounded.py.
ROUNDED: dict[str, Method] = {
    "sage2": SageAttention2(),
    "sage2, 4 bits": SageAttention2("int4", "fp8", smooth_q=True, smooth_v=True, group="warp"),
    "rounded tiles": Tiles(
        score=MeanPool(), select=TopK(4), tile=(4, 16), always=(Own(),), precision=Quantised(smooth_q=True)
    ),
}
# Compositions that no name stands for.
UNNAMED: dict[str, Method] = {
    "sorted queries": PBSAttention(segment=64, threshold=0.4, tile=32, queries=True),
    "flat tiles, sorted": Tiles(
        score=MeanPool(),
        select=Mass(0.6),
        tile=(4, 16),
        order=SegmentSort(segment=32, probe=8),
        always=(Own(),),
    ),
}


def methods() -> dict[str, Method]:
    """One small setting of every named method, plus unnamed compositions."""
    known = {name for name, kind in named().items() if kind.exact}
    missing = known - set(METHODS)
    if missing or known != set(FULL):
        raise LookupError(
            f"tests/conformance/common.py has no setting for {sorted(missing) or known ^ set(FULL)}"
        )
    return {**METHODS, **UNNAMED}


def qkv(
    b: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    n_q: int = 96,
    n_k: int | None = None,
    d: int = 8,
    d_v: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values, exactly representable in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, n_k, d_v = kv_heads or heads, n_q if n_k is None else n_k, d_v or d
    shapes = ((b, heads, n_q, d), (b, kv_heads, n_k, d), (b, kv_heads, n_k, d_v))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)  # type: ignore[return-value]


def widest(engine: str) -> torch.dtype:
    """The widest format that an engine computes in."""
    return WIDEST.get(engine, torch.float64)


def repeat(x: Tensor, heads: int) -> Tensor:
    """kv heads repeated to query heads, in memory."""
    return (
        x.repeat_interleave(heads // x.shape[1], 1)
        if x.shape[1] not in (1, heads)
        else x.expand(-1, heads, *[-1] * (x.ndim - 2))
    )


def grid(plan: Plan, b: int, heads: int, n_q: int, n_k: int) -> Tensor:
    """The token pairs that a plan computes, bool `[B, H, N_q, N_k]`; no pair may be computed twice."""
    times = torch.zeros(b, heads, n_q, n_k, dtype=torch.int64)
    for one in plan.passes:
        if one.reads is not None:
            times += listed(one, b, heads, n_q, n_k)
            continue
        seen = repeat(one.view.tokens(), heads).expand(b, heads, n_q, n_k)
        if one.tiles is not None:
            keep = repeat(one.tiles.keep, heads).expand(b, heads, -1, -1)
            rows = tile_of(one.tiles.q_tiling, one.q_order, b, heads, n_q)
            columns = tile_of(one.tiles.k_tiling, one.k_order, b, heads, n_k)
            at = torch.arange(b).view(b, 1, 1, 1), torch.arange(heads).view(1, heads, 1, 1)
            seen = seen & keep[(*at, rows.unsqueeze(3), columns.unsqueeze(2))]
        times += seen
    if times.numel() and int(times.max()) > 1:
        raise AssertionError("passes of one plan overlap")
    return times.bool()


def listed(one: Pass, b: int, heads: int, n_q: int, n_k: int) -> Tensor:
    """How often a pass that reads a sample or lists of keys computes each pair of tokens, `[B, H, N_q, N_k]`."""
    entries = repeat(one.reads.read(torch.arange(n_q)), heads).expand(b, heads, n_q, -1)
    seen = entries >= 0
    if not one.reads.by_query:
        seen = seen & repeat(one.view.tokens(), heads)
        if one.tiles is not None:
            keep = repeat(one.tiles.keep, heads).expand(b, heads, -1, -1)
            rows = tile_of(one.tiles.q_tiling, one.q_order, b, heads, n_q)
            columns = tile_of(one.tiles.k_tiling, None, b, heads, entries.shape[3])
            at = torch.arange(b).view(b, 1, 1, 1), torch.arange(heads).view(1, heads, 1, 1)
            seen = seen & keep[(*at, rows.unsqueeze(3), columns.unsqueeze(2))]
    times = torch.zeros(b, heads, n_q, n_k + 1, dtype=torch.int64)
    times.scatter_add_(3, torch.where(entries < 0, n_k, entries), seen.long())
    visible = repeat(one.view.tokens(), heads) if one.reads.by_query else 1
    return times[..., :n_k] * visible


def tile_of(tiling, order: Tensor | None, b: int, heads: int, n: int) -> Tensor:
    """The tile in which every token lies, `[B, H, N]`, walked out place by place."""
    bounds = tiling.bounds
    if bounds is None:
        ends = [min((t + 1) * tiling.size, n) for t in range(-(-n // tiling.size))]
        bounds = torch.tensor([0, *ends]).view(1, 1, -1)
    bounds = repeat(bounds, heads).expand(b, heads, -1)
    tiles = torch.empty(b, heads, n, dtype=torch.int64)
    for i in range(b):
        for h in range(heads):
            places = torch.repeat_interleave(torch.arange(bounds.shape[2] - 1), bounds[i, h].diff())
            tokens = torch.arange(n) if order is None else repeat(order, heads).expand(b, heads, n)[i, h]
            tiles[i, h, tokens] = places
    return tiles


@dataclass
class Result:
    """Output and gradients of one call; `grads` of q, k, v and, where there is one, bias."""

    out: Tensor
    lse: Tensor | None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None


def naive(q, k, v, seen: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Textbook attention in the inputs' own dtype."""
    heads = q.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = (q @ repeat(k, heads).mT) * scale
    if bias is not None:
        scores = scores + bias
        seen = seen & (bias > -torch.inf)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    return weights @ repeat(v, heads)


def with_grads(run: Callable[..., Tensor], q, k, v, d_out: Tensor, bias: Tensor | None = None) -> Result:
    """`run(q, k, v, bias)` and its gradients for `d_out`."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    out = run(*leaves, bias)
    wanted = [*leaves, *([] if bias is None else [bias])]
    grads = torch.autograd.grad(out, wanted, d_out.to(out.dtype))
    return Result(out.detach(), None, *grads)


@dataclass
class Exact(Result):
    """The float64 answer, and per element what one evaluation may round away per unit of machine precision."""

    rounding: dict[str, Tensor] | None = None

    def check(
        self, got: Result | dict[str, Tensor], dtype: torch.dtype | None = None, slack: int = 4
    ) -> None:
        """Raise unless every field of `got` is this answer to rounding in `dtype`, by default that of `got.out`.

        `slack` covers what the count of operations leaves out: this answer and the inputs round as well, and
        results of several passes are weighed and added.
        """
        have = got if isinstance(got, dict) else {f.name: getattr(got, f.name) for f in fields(Result)}
        if dtype is None:
            dtype = torch.float64 if have.get("out") is None else have["out"].dtype
        for name, value in have.items():
            if value is None or name == "lse":
                continue
            want = getattr(self, name)
            allowed = slack * torch.finfo(dtype).eps * self.rounding[name]
            if value.shape != want.shape:
                raise AssertionError(f"{name}: shape {list(value.shape)}, expected {list(want.shape)}")
            wrong = ~((value.double() - want).abs() <= allowed)
            if wrong.any():
                at = tuple(int(i) for i in wrong.nonzero()[0])
                raise AssertionError(
                    f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {at}: got {value[at].item()},"
                    f" expected {want[at].item()}, rounding allows {allowed[at].item():.1e}"
                )


def exact(q, k, v, seen: Tensor, d_out: Tensor | None = None, bias: Tensor | None = None) -> Exact:
    """The float64 answer over the grid `seen`, with gradients for `d_out` (ones if not given).

    Rounding: a sum of n products is off by at most n eps times the sum of their sizes (Higham, 2002, 3.1). It is
    carried from the scores through the softmax to each gradient; `rounding` is the factor of eps.
    """
    q, k, v = (x.detach().double() for x in (q, k, v))
    bias = None if bias is None else bias.detach().double()
    heads, n_q, n_k, d = q.shape[1], q.shape[2], k.shape[2], q.shape[3]
    seen = seen.expand(q.shape[0], heads, n_q, n_k)
    d_out = torch.ones(*q.shape[:3], v.shape[3], dtype=torch.float64) if d_out is None else d_out.double()
    result = with_grads(lambda q, k, v, bias: naive(q, k, v, seen, bias), q, k, v, d_out, bias)

    scale, kk, vv = d**-0.5, repeat(k, heads), repeat(v, heads)
    scores = scale * q @ kk.mT
    sizes = scale * q.abs() @ kk.abs().mT
    if bias is not None:
        scores, sizes = scores + bias, sizes + bias.abs().nan_to_num(posinf=0)
        seen = seen & (bias > -torch.inf)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    largest = sizes.masked_fill(~seen, 0).amax(-1, keepdim=True) if n_k else sizes.sum(-1, keepdim=True)
    weight = 2 * (d + 2) * largest + n_k + 3  # relative error of a weight, in eps
    products = d_out.abs() @ vv.abs().mT
    flow = weights * (products + (weights * products).sum(-1, keepdim=True))  # sizes that make up d_scores
    flow_error = (2 * weight + 2 * v.shape[3] + n_k + 3) * flow

    def by_group(x: Tensor) -> Tensor:
        return x.unflatten(1, (k.shape[1], heads // k.shape[1])).sum(2)

    rounding = {
        "out": (weight + n_k + 1) * (weights @ vv.abs()),
        "dq": scale * (flow_error + (n_k + 2) * flow) @ kk.abs(),
        "dk": by_group(scale * (flow_error + (n_q * heads + 2) * flow).mT @ q.abs()),
        "dv": by_group(((weight + n_q * heads + 1) * weights).mT @ d_out.abs()),
    }
    if bias is not None:
        full = flow_error + (n_q * n_k + 1) * flow
        rounding["dbias"] = full.sum_to_size(bias.shape)
    seen_scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(seen_scores, -1) if n_k else seen_scores.sum(-1).fill_(-torch.inf)
    return Exact(result.out, lse, result.dq, result.dk, result.dv, result.dbias, rounding)


def run_or_refuse(engine: str, q, k, v, method, **options) -> Callable[..., Tensor] | None:
    """`attend` on a named engine as a function of (q, k, v, bias); None where the engine refuses.

    A refusal is checked too: the call then raises it, and says why. An engine that stops short of float64 gets
    float64 inputs rounded to its widest format.
    """

    def fit(x):
        narrow = isinstance(x, Tensor) and x.dtype == torch.float64 and engine in WIDEST
        return x.to(WIDEST[engine]) if narrow else x

    first, options = [fit(x) for x in (q, k, v)], {name: fit(x) for name, x in options.items()}
    try:
        tilewise.explain(*first, method, engine=engine, **options)
    except EngineRefused as refusal:
        with pytest.raises(EngineRefused, match=f"engine '{engine}' cannot run this call: ..."):
            tilewise.attend(*first, method, engine=engine, **options)
        if engine != "sdpa":
            raise AssertionError(f"{engine} should run everything") from refusal
        return None
    options.pop("bias", None)

    def run(q, k, v, bias):
        return tilewise.attend(fit(q), fit(k), fit(v), method, bias=fit(bias), engine=engine, **options)

    return run


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square deviation; infinite for NaN."""
    return float((got.double() - want).nan_to_num(torch.inf).square().mean().sqrt())


def relative_error(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """Deviation over the size of `want`, or over `least` if that is larger; root mean squares both."""
    return error(got, want.double()) / max(error(torch.zeros_like(want), want.double()), least)


def over_budget(got: Tensor, baseline: Tensor, want: Tensor) -> str | None:
    """Why `got` errs more than twice as much as `baseline` does, or None.

    Over the whole tensor, not its largest element: the quotient of two largest roundings is chance (it reaches 3
    either way between correct results). A single wrong element stands out in float32, where all others are right
    to 1e-7.
    """
    mine, naives = error(got, want), error(baseline, want)
    return None if mine <= 2 * naives else f"error {mine:.2e}, naive {naives:.2e}"


def cases(names: Iterable[str] | None = None) -> list:
    """Methods as pytest parameters."""
    table = methods()
    return [pytest.param(table[name], id=name.replace(" ", "-")) for name in names or table]
