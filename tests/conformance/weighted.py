"""What a plan means whose passes read means of keys, weighted samples or lists: one explicit softmax over it all.

And the checks that hold methods without a name to the conventions, which test_weighted.py runs over all of them.
The formula walks entry by entry and shares no code with the library.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.conformance.common import over_budget, qkv, repeat, run_or_refuse, tile_of
from tilewise.attention import Lists, Means, Pass, Plan, Sample, attend, plan
from tilewise.tiles import Causal, Documents, Padding, TokenMask, Window

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
    q, k, v = qkv(b, heads, kv_heads, n, d=d, d_v=6, seed=seed)
    made = plan(method, q, k, mask=mask)
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
    """Tokens of later tiles never change earlier outputs: bit for bit, with the plan made from both inputs."""
    q, k, v = qkv(1, 4, 2, n, d=8, dtype=dtype)
    chosen = plan(method, q, k, mask="causal") if method.lookahead == "prompt" else method
    options = {} if isinstance(chosen, Plan) else {"mask": "causal"}
    first = tile * (n // tile)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, first:] = 50 * torch.randn_like(x[:, :, first:])
    before, after = (attend(*x, chosen, engine="torch", **options)[:, :, :first] for x in ((q, k, v), later))
    assert torch.equal(before, after)


def check_dtypes(method, n=150) -> None:
    """Each format errs at most twice as much as the explicit formula evaluated in it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = qkv(2, 4, 2, n, d=16, dtype=dtype)
        made = plan(method, q.double(), k.double(), mask="causal")
        want = explicit(made, q.double(), k.double(), v.double())
        out = attend(q, k, v, made)
        assert out.dtype == dtype
        assert over_budget(out, explicit(made, q, k, v), want) is None, dtype


def check_full(method) -> None:
    """Set to compute everything, a method is dense attention under any mask."""
    for mask in MASKS.values():
        q, k, v = qkv(2, 4, 2, N)
        torch.testing.assert_close(
            attend(q, k, v, method, mask=mask), attend(q, k, v, mask=mask), rtol=1e-12, atol=1e-12
        )


def check_lengths(method, unequal=((33, 5), (40, 1), (7, 0), (0, 7))) -> None:
    for n_q, n_k in (*((n, n) for n in (0, 1, 2, 15, 17, 33, 129)), *unequal):
        q, k, v = qkv(1, 2, 1, n_q, n_k, dtype=torch.float32)
        made = plan(method, q, k, mask="causal")
        got = attend(q, k, v, made, return_lse=True)
        assert got.out.shape == q.shape and got.out.isfinite().all()
        if n_q and n_k:
            torch.testing.assert_close(got.out, explicit(made, q, k, v))
        assert (got.out[:, :, : max(0, n_q - n_k)] == 0).all()
        assert (got.lse[:, :, : max(0, n_q - n_k)] == -torch.inf).all()


def check_compiles(method, lengths: tuple[int, ...] = (64, 97, 257)) -> None:
    """One whole graph, equal to eager bit for bit, and another for all further lengths."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, method, mask="causal"), fullgraph=True, backend=counter
    )
    for n in lengths:
        inputs = qkv(1, 4, 2, n, dtype=torch.float32)
        assert torch.equal(compiled(*inputs), attend(*inputs, method, mask="causal")), n
    assert counter.frame_count <= 2
    torch._dynamo.reset()
