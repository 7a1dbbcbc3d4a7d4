"""Attention residuals: against sums written out, phases against one, what is kept and sent, trained networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from tilewise.attention import attention_residuals
from tilewise.attention.attention_residuals import AttentionResiduals, attend_depth, key_scale
from tilewise.tiles import Partial

SHAPES = [(1, 1), (1, 3), (1, 7), (2, 2), (2, 4), (3, 3), (4, 4), (7, 7), (9, 9)]  # block, group; of 7 layers


@pytest.fixture(autouse=True)
def one_thread():
    """Small products gain nothing from threads, and wait for them where other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(layers: int, dim: int, dtype=torch.float64) -> list[nn.Module]:
    """Layers whose outputs differ in size, so that a key without its norm shows."""
    made = []
    for number in range(layers):
        linear = nn.Linear(dim, dim).to(dtype)
        made.append(nn.Sequential(linear, nn.Tanh()))
        with torch.no_grad():
            linear.weight.mul_(1 + number % 3)
    return made


def residuals(layers: int, dim: int, block: int, group: int | None = None, dtype=torch.float64):
    """With queries and gains that are not what they start as."""
    made = AttentionResiduals(layers, dim, block, group=group).to(dtype)
    with torch.no_grad():
        made.query.normal_()
        made.gain.uniform_(0.5, 2)
    return made


def definition(made: AttentionResiduals, x: Tensor, layers) -> Tensor:
    """The paper's equations, one token's sources listed anew for every layer."""
    outputs = [x]

    def read(layer: int) -> Tensor:
        whole, size = layer // made.block, made.block
        sources = [x] + [sum(outputs[1 + b * size : 1 + (b + 1) * size]) for b in range(whole)]
        if layer % size:
            sources.append(sum(outputs[1 + whole * size :]))
        keys = [F.rms_norm(v, (made.dim,), made.gain[layer], made.eps) for v in sources]
        scores = torch.stack([(k * made.query[layer]).sum(-1) for k in keys])
        weights = scores.exp() / scores.exp().sum(0)
        return sum(w.unsqueeze(-1) * v for w, v in zip(weights, sources))

    for number, layer in enumerate(layers):
        outputs.append(layer(read(number)))
    return read(len(layers))


def gradients(made, x, layers, run) -> list[Tensor]:
    made.zero_grad()
    nn.ModuleList(layers).zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weight).sum().backward()
    return [
        out.detach(),
        x.grad,
        made.query.grad,
        made.gain.grad,
        *(layer[0].weight.grad for layer in layers),
    ]


@pytest.mark.evidence
@pytest.mark.parametrize(("block", "group"), SHAPES)
def test_two_phases_equal_one_and_the_definition(block, group, monkeypatch):
    """Outputs and all gradients. Control: phases joined by halves, without their log-sums, give something else."""
    layers = network(7, 12)
    made = residuals(7, 12, block, group)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    want = gradients(made, x, layers, lambda y: definition(made, y, layers))
    # Seven layers of sums over at most 12 numbers and 8 sources, each rounded to 2^-53 and passed on with a factor
    # of at most 3 (the largest weight) per layer.
    tolerance = 7 * (12 + 8) * 2.0**-53 * 3**7
    for two_phase in (False, True):
        got = gradients(made, x, layers, lambda y, two=two_phase: made(y, layers, two_phase=two))
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))

    def halves(parts):
        return Partial(sum(p.out for p in parts) / len(parts), parts[0].lse)

    monkeypatch.setattr(attention_residuals, "merge", halves)
    off = (made(x, layers, two_phase=True) - want[0]).abs().max()
    assert off > 1e-3 or group == 1, "the control must differ"


@pytest.mark.evidence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_two_phases_round_no_more_than_one(dtype):
    """Against float64, phases may cost at most the error of direct reading once more."""
    layers = network(8, 32, torch.float64)
    made = residuals(8, 32, 2, 4)
    x = torch.randn(64, 32, dtype=torch.float64).to(dtype)
    wide = [lambda h, f=f: f(h.double()).to(dtype) for f in layers]
    with torch.no_grad():
        exact = made(x.double(), layers)
        errors = [float((made(x, wide, two_phase=two).double() - exact).norm()) for two in (False, True)]
    assert errors[1] <= 2 * errors[0] and errors[0] > 0
    assert errors[0] <= 16 * torch.finfo(dtype).eps * float(exact.norm())


@pytest.mark.evidence
def test_representations_read(monkeypatch):
    """What is read, counted; and the paper's table: 22 d a layer for 128 layers in 8 groups, 127 d in one phase."""
    counted = 0
    attend = attention_residuals.attend_depth

    def count(queries, sources, scales):
        nonlocal counted
        counted += len(sources)
        return attend(queries, sources, scales)

    monkeypatch.setattr(attention_residuals, "attend_depth", count)
    for layers, block, group in [(7, 1, 3), (7, 2, 4), (8, 1, 1), (12, 3, 6), (5, 9, 9)]:
        made = AttentionResiduals(layers, 4, block, group=group)
        for two_phase in (False, True):
            counted = 0
            made(torch.randn(2, 4), [torch.tanh] * layers, two_phase=two_phase)
            assert counted == made.reads(two_phase=two_phase), (layers, block, group, two_phase)

    made = AttentionResiduals(layers=128, dim=1, block=1, group=16)
    # The paper counts a key and a value for each and leaves out the embedding and the output's reading.
    others = 8 + 1 + 128
    assert 2 * (made.reads(two_phase=True) - others) / 128 == (8 - 1) + (16 - 1)
    assert 2 * (made.reads() - 2 * 128 - 1) / 128 == 127
    block = AttentionResiduals(128, 1, 16)
    assert block.reads(two_phase=True) < made.reads(two_phase=True) / 8 < made.reads() / 8


@pytest.mark.evidence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_representations_kept(dtype):
    """The full form keeps one per layer, the block form one per block; training keeps no copies of them.

    Control: a reading that stacks its sources keeps all of them again for every layer.
    """
    tokens, dim, depth = 50, 16, 12
    layers = [lambda h: h.sin()] * depth

    def vectors_saved(run) -> float:
        """Vectors of all tokens that the backward pass holds, in the input's dtype, shared ones once."""
        held: dict[int, Tensor] = {}
        with saved_tensors_hooks(lambda t: held.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
            out = run()
        size = sum(t.untyped_storage().nbytes() for t in held.values() if t.numel() >= tokens * dim)
        del out
        return size / (tokens * dim * torch.empty((), dtype=dtype).element_size())

    for block in (1, 3, 4, 12):
        made = residuals(depth, dim, block, dtype=torch.float32)
        state = made.start(torch.randn(tokens, dim, dtype=dtype))
        for number, layer in enumerate(layers):
            assert state.kept == made.kept(number) == 1 + math.ceil(number / block)
            state = made.write(state, layer(made.read(state)))
        assert state.kept == 1 + depth // block
        x = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
        # Sources, sums under way (float32), and what sin() keeps: its input, one per layer.
        assert vectors_saved(lambda m=made, x=x: m(x, layers)) <= made.kept(depth) + 3 * depth + 3

    made = residuals(depth, dim, 1, dtype=torch.float32)
    x = torch.randn(tokens, dim, requires_grad=True)
    stacked = vectors_saved(lambda: definition_by_stacks(made, x, layers))
    if dtype == torch.float32:
        assert stacked > depth * depth / 2


def definition_by_stacks(made, x, layers) -> Tensor:
    sources = [x]
    for number in range(len(layers) + 1):
        v = torch.stack(sources)
        weights = (F.rms_norm(v, (made.dim,)) @ made.query[number]).softmax(0)
        h = (weights.unsqueeze(-1) * v).sum(0)
        if number < len(layers):
            sources.append(layers[number](h))
    return h


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("ranks", "turns", "per_stage"), [(4, 2, 1), (4, 3, 2), (2, 5, 1), (3, 1, 2), (1, 4, 1)]
)
def test_representations_sent(ranks, turns, per_stage):
    """The paper's sums, and a walk through the pipeline with every rank's memory written out."""
    stages = ranks * turns
    made = AttentionResiduals(stages * per_stage, 1, 1)

    def walk(cache: bool) -> int:
        memory: list[set] = [set() for _ in range(ranks)]
        finished, sent = {"embedding"}, 0
        for stage in range(stages):
            rank = stage % ranks
            if stage == 0:
                memory[0] = set(finished)
            elif ranks > 1:
                sent += len(finished - memory[rank] if cache else finished)
                memory[rank] = set(finished)
            finished = finished | {(stage, i) for i in range(per_stage)}
        return sent

    assert made.transfers(ranks, turns, cache=False) == walk(False)
    assert made.transfers(ranks, turns) == walk(True)
    if ranks > 1:
        naive = stages * (stages - 1) // 2 * per_stage  # the paper's sums leave out the embedding
        cached = (ranks * (ranks - 1) // 2 + (turns - 1) * ranks**2) * per_stage
        assert made.transfers(ranks, turns, cache=False) == naive + stages - 1
        assert made.transfers(ranks, turns) == cached + ranks - 1


@pytest.mark.evidence
def test_the_paper_s_pipeline_saves_six_transfers():
    """Its figure: 4 ranks, 2 turns, a block in every two stages. The block form sends less than the full one."""
    made = AttentionResiduals(8, 1, 2)
    assert made.transfers(4, 2, cache=False) - made.transfers(4, 2) == 6
    assert made.transfers(4, 2) < AttentionResiduals(8, 1, 1).transfers(4, 2)


class Plain(nn.Module):
    """A layer that normalises its input, as all do in PreNorm networks."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim, bias=False)
        nn.init.normal_(self.down.weight, std=hidden**-0.5)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        normal = F.rms_norm(x, (x.shape[-1],), eps=1e-12)
        return self.down(F.relu(self.up(torch.cat([normal, *more], -1))))


@pytest.mark.evidence
@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_equal_weights_are_the_plain_network(block):
    """From zero queries: the mean of the sources, so the plain sum by their number. Control: other queries."""
    layers = [Plain(10, 12).double() for _ in range(8)]
    made = AttentionResiduals(8, 10, block).double()
    x = torch.randn(5, 10, dtype=torch.float64)
    h = x
    for layer in layers:
        h = h + layer(h)
    for two_phase in (False, True):
        got = made(x, layers, two_phase=two_phase)
        torch.testing.assert_close(got * made.kept(8), h, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        made.query.normal_()
    assert (made(x, layers) * made.kept(8) - h).abs().max() > 0.1

    equal = torch.randn(3, 10, dtype=torch.float64)
    sources = [equal * factor for factor in (0.5, 1, 2)]  # one direction, so equal keys, whatever the query
    got = attend_depth(torch.randn(4, 10), sources, [key_scale(v, 1e-30) for v in sources])
    torch.testing.assert_close(got.out, (equal * 3.5 / 3).expand(4, -1, -1), rtol=1e-9, atol=1e-9)


class Mixed(nn.Module):
    """A small network whose layers are joined by a sum, by learned fixed weights, or by attention residuals."""

    def __init__(
        self, kind: str, depth: int, dim: int, hidden: int, more: int, out: int, block: int = 1
    ) -> None:
        super().__init__()
        self.kind, self.depth = kind, depth
        self.layers = nn.ModuleList(Plain(dim, hidden) for _ in range(depth))
        for layer in self.layers:
            layer.up = nn.Linear(dim + more, hidden)
        self.head = nn.Linear(dim, out)
        self.weights = nn.Parameter(torch.zeros(depth + 1, depth + 1)) if kind == "fixed" else None
        self.residuals = AttentionResiduals(depth, dim, block) if kind == "attention" else None

    def forward(self, x: Tensor, more: Tensor | None = None, trace: list | None = None) -> Tensor:
        trace = [] if trace is None else trace
        given = [() if more is None else (more[:, n],) for n in range(self.depth)]
        if self.residuals is not None:
            state = self.residuals.start(x)
            for layer, extra in zip(self.layers, given):
                trace.append(self.residuals.read(state))
                state = self.residuals.write(state, layer(trace[-1], *extra))
            trace.append(self.residuals.read(state))
        else:
            sources = [x]
            for number in range(self.depth + 1):
                if self.weights is None:
                    trace.append(sum(sources))
                else:
                    shares = self.weights[number, : len(sources)].softmax(0)
                    trace.append(sum(share * v for share, v in zip(shares, sources)))
                if number < self.depth:
                    sources.append(self.layers[number](trace[-1], *given[number]))
        return self.head(F.rms_norm(trace[-1], (trace[-1].shape[-1],)))


def train(net: nn.Module, batch, steps: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        *given, want = batch()
        loss = F.mse_loss(net(*given), want)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.evidence
@pytest.mark.parametrize("seed", [0, 1])
def test_depth_is_searched_by_content(seed):
    """Each layer is handed a payload and a score; the output is the payload with the highest score.

    Which layer holds it depends on the token, so weights must depend on content. Controls, trained alike: the plain
    sum (which equal weights are, see above) and learned weights that are the same for all tokens. Blocks of two
    layers, which sum what only one of them should give, come between.
    """
    depth, wide, dim = 6, 8, 16

    def batch(g: torch.Generator, count: int = 256):
        payload = F.rms_norm(torch.randn(count, depth, wide, generator=g), (wide,))
        rank = torch.rand(count, depth, generator=g).argsort(-1)
        score = 2 * (
            (rank + depth * torch.rand(count, 1, generator=g)) / depth - 1
        )  # no threshold tells the best
        best = payload[torch.arange(count), rank.argmax(-1)]
        return embedding.expand(count, -1), torch.cat([payload, score.unsqueeze(-1)], -1), best

    embedding = torch.randn(dim, generator=torch.Generator().manual_seed(5))
    errors = {}
    for name, kind, block in (
        ("sum", "sum", 1),
        ("fixed", "fixed", 1),
        ("full", "attention", 1),
        ("block", "attention", 2),
    ):
        torch.manual_seed(seed)
        net = Mixed(kind, depth, dim, 16, wide + 1, wide, block)
        g = torch.Generator().manual_seed(seed)
        train(net, lambda g=g: batch(g), 300)
        *given, want = batch(g, 2000)
        with torch.no_grad():
            errors[name] = float(F.mse_loss(net(*given), want))
    assert errors["full"] < min(errors["sum"], errors["fixed"]) / 3, errors
    assert errors["full"] < errors["block"] < 0.75 * min(errors["sum"], errors["fixed"]), errors


@pytest.mark.evidence
def test_states_do_not_grow_with_depth():
    """Half of the tokens ask for their own content back, half for one of four fixed answers; trained for both.

    The plain sum outgrows the embedding to hide it; attention residuals of either form do not, and answer no worse.
    """
    dim, content = 32, 28
    answers = F.rms_norm(torch.randn(4, content, generator=torch.Generator().manual_seed(5)), (content,))
    asks = 2 * torch.eye(4)[:2]

    def batch(g: torch.Generator, count: int = 256):
        x = F.rms_norm(torch.randn(count, content, generator=g), (content,))
        ask = torch.randint(2, (count,), generator=g)
        want = torch.where(ask.unsqueeze(1) == 0, x, answers[x[:, :4].argmax(-1)])
        return torch.cat([x, asks[ask]], 1), want

    grown, errors = {}, {}
    for name, kind, block in (("sum", "sum", 1), ("full", "attention", 1), ("block", "attention", 4)):
        torch.manual_seed(0)
        net = Mixed(kind, 8, dim, 8, 0, content, block)
        g = torch.Generator().manual_seed(0)
        train(net, lambda g=g: batch(g), 200)
        x, want = batch(g, 1000)
        trace: list[Tensor] = []
        with torch.no_grad():
            errors[name] = float(F.mse_loss(net(x, None, trace), want))
        sizes = [float(h.norm(dim=-1).mean()) for h in trace]
        grown[name] = max(sizes[1:]) / sizes[0]
    assert grown["full"] < 1 and grown["block"] < 1.5, grown
    assert grown["sum"] > 2 * grown["block"], grown
    assert max(errors["full"], errors["block"]) < 1.2 * errors["sum"], errors


@pytest.mark.evidence
@pytest.mark.parametrize("block", [1, 3])
def test_no_state_is_larger_than_the_largest_source(block):
    """Weights are a convex combination, for every token. Control: the sum of the same sources is larger."""
    layers = network(9, 16)
    made = residuals(9, 16, block)
    state = made.start(torch.randn(40, 16, dtype=torch.float64))
    for layer in layers:
        h = made.read(state)
        sources = torch.stack([*state.sources, *([] if state.partial is None else [state.partial])])
        assert (h.norm(dim=-1) <= sources.norm(dim=-1).amax(0) * (1 + 1e-12)).all()
        state = made.write(state, layer(h))
    assert (sources.sum(0).norm(dim=-1) > sources.norm(dim=-1).amax(0)).float().mean() > 0.5


@pytest.mark.parametrize("two_phase", [False, True])
def test_a_network_can_be_cut_anywhere(two_phase):
    """A state can be read again, and a network continued from it twice, with the same result."""
    layers = network(7, 12)
    made = residuals(7, 12, 2, 4)
    x = torch.randn(3, 12, dtype=torch.float64)
    whole = made(x, layers, two_phase=two_phase)
    state = made.start(x, two_phase=two_phase)
    for number, layer in enumerate(layers):
        kept = state
        made.write(kept, torch.ones_like(x))  # another future of the same state
        again = kept
        for later in layers[number:]:
            again = made.write(again, later(made.read(again)))
        assert torch.equal(made.read(again), whole)
        state = made.write(state, layer(made.read(state)))
    assert state.bytes >= state.kept * x.numel() * 8


@pytest.mark.parametrize("block", [1, 2, 5])
def test_weights_are_what_is_read_by(block):
    layers = network(5, 8)
    made = residuals(5, 8, block)
    state = made.start(torch.randn(4, 8, dtype=torch.float64))
    for layer in layers:
        weights = made.weights(state)
        sources = torch.stack([*state.sources, *([] if state.partial is None else [state.partial])])
        torch.testing.assert_close(weights.sum(0), torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close((weights.unsqueeze(-1) * sources).sum(0), made.read(state))
        state = made.write(state, layer(made.read(state)))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (2, 0, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("two_phase", [False, True])
def test_any_shape(shape, two_phase):
    made = residuals(4, 8, 2, dtype=torch.float32)
    x = torch.randn(shape)
    out = made(x, [torch.tanh] * 4, two_phase=two_phase)
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("two_phase", [False, True])
def test_dtypes_and_their_gradients(dtype, two_phase):
    made = residuals(6, 16, 2, dtype=torch.float32)
    layers = [torch.tanh] * 6
    exact = residuals(6, 16, 2)
    exact.load_state_dict(made.state_dict())
    x = torch.randn(5, 16).to(dtype).requires_grad_()
    y = x.detach().double().requires_grad_()
    out, want = made(x, layers, two_phase=two_phase), exact(y, layers)
    assert out.dtype == dtype
    out.sum().backward()
    want.sum().backward()
    # Six layers and as many sums, each rounded once, in values up to about 4.
    close = 6 * 2 * 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (out.double() - want).abs().max() < close
    for a, b in ((x.grad, y.grad), (made.query.grad, exact.query.grad), (made.gain.grad, exact.gain.grad)):
        assert (a.double() - b).abs().max() < 4 * close * max(1.0, float(b.abs().max()))


def test_gradcheck():
    made = residuals(3, 4, 1, 3)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(y, query, gain):
        given = {"query": query, "gain": gain}
        return torch.func.functional_call(made, given, (y, [torch.tanh] * 3), {"two_phase": True})

    assert torch.autograd.gradcheck(run, (x, made.query, made.gain))


def test_a_source_of_zeros_gives_no_nan():
    made = residuals(2, 4, 1, dtype=torch.float32)
    x = torch.zeros(3, 4, requires_grad=True)
    made(x, [torch.zeros_like, torch.tanh]).sum().backward()
    assert x.grad.isfinite().all() and made.query.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(dtype):
    made = residuals(4, 8, 2, dtype=torch.float32)
    x = torch.randn(3, 8).to(dtype)
    layers = [torch.tanh] * 4
    run = torch.compile(lambda y: made(y, layers, two_phase=True), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(x), made(x, layers, two_phase=True))


def test_starts_at_zero_queries():
    made = AttentionResiduals(5, 8, 2, group=4, eps=1e-5)
    assert not made.query.any() and (made.gain == 1).all()
    assert made.query.shape == made.gain.shape == (6, 8)
    assert "block=2, group=4, eps=1e-05" in repr(made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "layers must be an integer >= 1, got 0"),
        ({"dim": 2.0}, "dim must be an integer >= 1, got 2.0"),
        ({"block": 0}, "block must be an integer >= 1, got 0"),
        ({"group": 3}, "group must be a multiple of block 2, got 3"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionResiduals(**{"layers": 4, "dim": 8, "block": 2, **arguments})


def test_bad_input():
    made = AttentionResiduals(2, 8)
    x = torch.randn(3, 8)
    with pytest.raises(
        ValueError, match=r"x must be a floating tensor \[..., 8\], got torch.float32 \[3, 7\]"
    ):
        made.start(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"got torch.int64 \[8\]"):
        made.start(torch.arange(8))
    with pytest.raises(ValueError, match="layers must be 2 functions, got 1"):
        made(x, [torch.tanh])
    with pytest.raises(
        ValueError, match=r"like the embedding, torch.float32 \[3, 8\], got torch.float32 \[1, 8\]"
    ):
        made.write(made.start(x), x[:1])
    with pytest.raises(ValueError, match="got torch.float64"):
        made.write(made.start(x), x.double())
    done = made.write(made.write(made.start(x), x), x)
    with pytest.raises(ValueError, match="all 2 layers have written"):
        made.write(done, x)
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=r"layer must be in 0\.\.2"):
            made.kept(layer)
    for ranks, turns in ((3, 1), (0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must divide 2 layers"):
            made.transfers(ranks, turns)
