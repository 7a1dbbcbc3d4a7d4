"""What a plan means whose passes read means of keys, weighted samples or lists: one explicit softmax over it all.

And the checks that hold methods without a name to the conventions, which test_weighted.py runs over all of them.
The formula walks entry by entry and shares no code with the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.conformance.common import over_budget, qkv, repeat, run_or_refuse, tile_of
from tilewise.attention import Lists, Means, Method, Pass, Plan, Sample, attend, plan
from tilewise.attention.method import mode_of
from tilewise.tiles import Causal, Documents, Mask, Padding, TokenMask, Window, as_mask

N = 130
MASKS = {
    "none": None,
    "causal": "causal",
    "window": Causal() & Window(40, None),
    "documents": Causal() & Documents(torch.tensor([0, 30, 30, N])),
    "left padding": Causal() & Padding(torch.arange(N).ge(torch.tensor([[13], [40]]))),
    "right padding": Padding(torch.arange(N).lt(torch.tensor([[100], [61]]))),
    "any": TokenMask(torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.5),
}

LENGTHS = (
    *((n, n) for n in (0, 1, 2, 15, 17, 33, 129)),
    *((1, 40), (5, 33), (64, 129), (33, 5), (40, 1), (7, 0), (0, 7)),
)
Make = Callable[[Tensor, Tensor], Method]


@dataclass(frozen=True)
class Case:
    """A method in small settings, and what it does not take.

    Args:
        method: or what makes it for queries `[B, H_q, N_q, D]` and keys: with a gate for as many heads, clusters of
            these very keys, a grid of as many tokens.
        full: the same set to compute everything; None where there is no such setting.
        refuses: lengths (queries, keys) that it does not take, though it has the mode, and how its message reads.
        queries: how many a call with so many keys has in checks of other things than lengths.
        compiled: lengths at which it is compiled; one only where further ones would each need a graph of their own.
            None for a method that cannot be part of a graph, which is then checked: it says so, and its plan can.
    """

    method: Method | Make
    full: Method | Make | None = None
    refuses: Mapping[tuple[int, int], str] = field(default_factory=dict)
    queries: Callable[[int], int] = lambda n: n
    compiled: tuple[int, ...] | None = (64, 97, 257)

    @classmethod
    def of(cls, method: Method | Case) -> Case:
        return method if isinstance(method, Case) else cls(method)

    def qkv(self, b: int, heads: int, kv_heads: int, n: int, **options) -> tuple[Tensor, Tensor, Tensor]:
        """Random inputs of a call with `n` keys."""
        return qkv(b, heads, kv_heads, self.queries(n), n, **options)

    def on(self, q: Tensor, k: Tensor, full: bool = False) -> Method:
        """The method for these tensors, or the same set to compute everything."""
        made = self.full if full else self.method
        return made if isinstance(made, Method) else made(q, k)


def narrowed(mask: Mask | str | None, n_q: int) -> Mask | str | None:
    """A mask of `MASKS` for the last `n_q` queries: positions know how to, a grid does not."""
    return TokenMask(mask.seen[-n_q:]) if isinstance(mask, TokenMask) else mask


def explicit(made: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """A plan's answer by its meaning: one softmax over all tokens and means that a query reads.

    In the inputs' dtype. Means are products with a matrix of averages made token by token; the first order is the
    mean of `(k - mean of its tile) v^T` over the tokens that a query reads as means. N x N, differentiable.
    """
    heads, d = q.shape[1], q.shape[3]
    kk, vv = repeat(k, heads), repeat(v, heads)
    scale = d**-0.5 if scale is None else scale
    logits, values, shift = [], [], []
    for one in made.passes:
        mix, weight, counts = entries(one, q, k)
        keys, own = (mix @ kk, mix @ vv) if mix is not None else (kk, vv)
        seen = pairs(one, q, keys.shape[2])
        logits.append((q @ keys.mT * scale + weight).masked_fill(~seen, -torch.inf))
        values.append(own)
        moved = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        if isinstance(one.reads, Means) and one.reads.slope:
            moved = first_order(seen, mix, counts, q, kk, vv) * scale * one.reads.slope
        shift.append(moved)
    sizes = [x.shape[3] for x in logits]
    both = torch.cat(logits, 3)
    weights = both.softmax(-1).masked_fill(both == -torch.inf, 0).split(sizes, 3)
    return sum(w @ x + w.sum(-1, keepdim=True) * s for w, x, s in zip(weights, values, shift, strict=True))


def entries(one: Pass, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What a pass reads: a matrix `[B, H, entries, N_k]` that makes entries of keys, what is added to their scores,
    and of how many tokens each is made. None for the keys themselves."""
    (b, heads), n_k, reads = q.shape[:2], k.shape[2], one.reads
    if isinstance(reads, Means):
        mix, counts = (x.to(q.dtype) for x in averages(reads, b, heads, n_k))
        return mix, counts.clamp(min=1).log().unsqueeze(2), counts
    if isinstance(reads, Sample):
        index = repeat(reads.index, heads).expand(b, heads, -1)
        weight = torch.zeros_like(index, dtype=q.dtype)
        if reads.log_weight is not None:
            weight = repeat(reads.log_weight, heads).expand(b, heads, -1).to(q.dtype)
        return torch.nn.functional.one_hot(index, n_k).to(q.dtype), weight.unsqueeze(2), None
    return None, torch.zeros((), dtype=q.dtype), None


def reached(made: Plan, q: Tensor, k: Tensor) -> Tensor:
    """Which keys have a part in a query's answer, themselves or in a mean: bool `[B, H, N_q, N_k]`."""
    found = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    for one in made.passes:
        mix = entries(one, q, k)[0]
        seen = pairs(one, q, k.shape[2] if mix is None else mix.shape[2])
        found |= seen if mix is None else seen.to(mix.dtype) @ (mix > 0).to(mix.dtype) > 0
    return found


def pairs(one: Pass, q: Tensor, count: int) -> Tensor:
    """Which of `count` entries each query reads in a pass, bool `[B, H, N_q, entries]`."""
    b, heads, n_q, _ = q.shape
    seen = repeat(one.view.tokens(), heads).expand(b, heads, n_q, count)
    if isinstance(one.reads, Lists):
        index = repeat(one.reads.index, heads).expand(b, heads, n_q, -1)
        listed = torch.zeros(b, heads, n_q, count + 1, dtype=torch.bool)
        return seen & listed.scatter_(3, torch.where(index < 0, count, index), True)[..., :count]
    if one.tiles is None:
        return seen
    keep = repeat(one.tiles.keep, heads).expand(b, heads, -1, -1)
    rows = tile_of(one.tiles.q_tiling, one.q_order, b, heads, n_q)
    columns = tile_of(one.tiles.k_tiling, None if one.reads is not None else one.k_order, b, heads, count)
    at = torch.arange(b).view(b, 1, 1, 1), torch.arange(heads).view(1, heads, 1, 1)
    return seen & keep[(*at, rows.unsqueeze(3), columns.unsqueeze(2))]


def averages(reads: Means, b: int, heads: int, n_k: int) -> tuple[Tensor, Tensor]:
    """The matrix of averages `[b, heads, means, n_k]` and the tokens in each mean."""
    own = tile_of(reads.tiling, reads.order, b, heads, n_k)
    members = torch.nn.functional.one_hot(own, reads.tiling.count(n_k)).mT
    members = members * repeat(reads.seen, heads).unsqueeze(2)
    counts = members.sum(-1).double()
    return members / counts.clamp(min=1).unsqueeze(-1), counts


def first_order(seen: Tensor, average: Tensor, counts: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`q C`, with C the mean over the tokens of the means that a query reads."""
    members = (average > 0).to(q.dtype)  # [b, h, means, n]
    centred = k - members.mT @ (average @ k)
    moments = torch.einsum("bhtn,bhnd,bhne->bhtde", members, centred, v.to(q.dtype))
    tokens = (seen * counts.unsqueeze(2)).sum(-1, keepdim=True).clamp(min=1)
    return torch.einsum("bhqd,bhqt,bhtde->bhqe", q, (seen / tokens).to(q.dtype), moments)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def check_plan(method, mask, heads=4, kv_heads=2, n=N, d=8, b=2, engine="torch", seed=0) -> Plan:
    """Forward and gradients of a method on one engine equal the explicit formula; returns the plan."""
    case = Case.of(method)
    q, k, v = case.qkv(b, heads, kv_heads, n, d=d, d_v=6, seed=seed)
    mask = narrowed(mask, q.shape[2])
    made = plan(case.on(q, k), q, k, mask=mask, v=v)
    visible = repeat(as_mask(mask).bind(q.shape[2], n).tokens(), heads)
    assert not (reached(made, q, k) & ~visible).any(), "hidden keys have a part"
    run = run_or_refuse(engine, q, k, v, made)
    if run is None:
        return made
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = explicit(made, *leaves)
    d_out = torch.randn_like(want)
    wanted = [want, *torch.autograd.grad(want, leaves, d_out)]
    out = run(*leaves, None)
    got = [out, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]
    eps = torch.finfo(out.dtype).eps
    for name, mine, yours in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        mine, yours = mine.detach(), yours.detach()
        # Sums of n products are off by up to n eps of what is added up; gradients chain three such sums.
        slack = 8 * n * eps * float(yours.abs().max().clamp(min=1))
        assert float((mine.double() - yours).abs().max()) <= slack, name
    return made


def check_future(method, n=160, tile=64, dtype=torch.float32) -> None:
    """Later tokens never change earlier outputs: bit for bit, as far as the method says that it looks.

    One that looks at the prompt is held to the choice it made; one that looks at its tile gets whole tiles.
    """
    case = Case.of(method)
    q, k, v = case.qkv(1, 4, 2, n, d=8, dtype=dtype)
    behind = n - q.shape[2]  # keys before the first query, which a method may have been made of
    chosen: Method | Plan = case.on(q, k)
    look = chosen.lookahead
    options = {"mask": "causal"}
    if look == "prompt":
        chosen, options = plan(chosen, q, k, mask="causal", v=v), {}
    cuts = [x for x in ((tile, n - n % tile) if look == "tile" else (1, 17, tile, n - 1)) if x > behind]
    assert cuts
    before = attend(q, k, v, chosen, engine="torch", **options)
    for first in cuts:
        later = [x.clone() for x in (q, k, v)]
        for x, own in zip(later, (first - behind, first, first), strict=True):
            x[:, :, own:] = 50 * torch.randn_like(x[:, :, own:])
        after = attend(*later, chosen, engine="torch", **options)
        assert torch.equal(before[:, :, : first - behind], after[:, :, : first - behind]), first


def check_dtypes(method, n=150) -> None:
    """Each format errs at most twice as much as the explicit formula evaluated in it."""
    case = Case.of(method)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = case.qkv(2, 4, 2, n, d=16, dtype=dtype)
        wide = [x.double() for x in (q, k, v)]
        made = plan(case.on(*wide[:2]), *wide[:2], mask="causal", v=wide[2])
        want = explicit(made, *wide)
        out = attend(q, k, v, made)
        assert out.dtype == dtype
        assert over_budget(out, explicit(made, q, k, v), want) is None, dtype
        for size in (1, 100):  # scores beyond what float16 holds
            got = attend(size * q, size * k, v, case.on(size * q, size * k), mask="causal")
            assert got.dtype == dtype and got.isfinite().all(), (dtype, size)


def check_full(method) -> None:
    """Set to compute everything, a method is dense attention under any mask."""
    case = method if isinstance(method, Case) else Case(method, method)
    for mask in MASKS.values():
        q, k, v = case.qkv(2, 4, 2, N)
        mask = narrowed(mask, q.shape[2])
        torch.testing.assert_close(
            attend(q, k, v, case.on(q, k, full=True), mask=mask),
            attend(q, k, v, mask=mask),
            rtol=1e-12,
            atol=1e-12,
        )


def check_lengths(method) -> None:
    """Every pair of lengths is computed, in low precision too, or refused: for its mode, or as the case says."""
    case, taken = Case.of(method), 0
    for n_q, n_k in LENGTHS:
        q, k, v = qkv(1, 2, 1, n_q, n_k, dtype=torch.float32)
        own = case.refuses.get((n_q, n_k))
        try:
            modes = case.on(q, k).modes
        except ValueError:
            modes = ()
        mode = mode_of(n_q, n_k)
        if own is not None or mode not in modes:
            with pytest.raises(ValueError, match=own or f"does not support {mode} .*supports"):
                attend(q, k, v, case.on(q, k), mask="causal")
            continue
        taken += 1
        made = plan(case.on(q, k), q, k, mask="causal", v=v)
        got = attend(q, k, v, made, return_lse=True)
        assert got.out.shape == q.shape and got.out.isfinite().all()
        low = [x.half() for x in (q, k, v)]
        assert attend(*low, case.on(*low[:2]), mask="causal").isfinite().all()
        if n_q and n_k:
            torch.testing.assert_close(got.out, explicit(made, q, k, v))
        assert (got.out[:, :, : max(0, n_q - n_k)] == 0).all()
        assert (got.lse[:, :, : max(0, n_q - n_k)] == -torch.inf).all()
    assert taken >= 4


def check_compiles(method) -> None:
    """One whole graph, equal to eager bit for bit, and another for all further lengths."""
    case = Case.of(method)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda q, k, v, method: attend(q, k, v, method, mask="causal"), fullgraph=True, backend=counter
    )
    for n in case.compiled:
        inputs = case.qkv(1, 4, 2, n, dtype=torch.float32)
        method = case.on(*inputs[:2])
        assert torch.equal(compiled(*inputs, method), attend(*inputs, method, mask="causal")), n
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def check_refuses_to_compile(method) -> None:
    """A method that cannot be part of a graph says so there; a plan made outside can be."""
    case = Case.of(method)
    inputs = case.qkv(1, 4, 2, 97, dtype=torch.float32)
    method = case.on(*inputs[:2])
    run = torch.compile(
        lambda q, k, v, method: attend(q, k, v, method, mask="causal"), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=f"{type(method).__name__} cannot be compiled"):
        run(*inputs, method)
    made = plan(method, *inputs[:2], mask="causal", v=inputs[2])
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, made), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), attend(*inputs, method, mask="causal"))
    torch._dynamo.reset()
