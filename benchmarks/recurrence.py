"""Recurrences side by side: against attention, other packages, this library's own torch engine, and the
machine.

    python benchmarks/recurrence.py [--quick] [additive flat rules ceiling decode selective gated]

Causal attention computes something else: the comparison says what a linear recurrence costs in its place. Other
packages are raced where they are installed (flash-linear-attention, mlstm_kernels, mambapy); what is not there is
said. Rates count the operations of the recurrence itself, 4 D_k D_v for a token and head, which no chunking can do
without. Gated networks are raced as layers, from tokens to outputs: the linear layer of their gates' inputs, which
torch.nn's have as well, is part of their time and of their rate.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.kernels.scan import Call
from tilewise.kernels.scan import scan as kernel
from tilewise.recurrence import State, gated_rnn, scan, selective_scan
from tilewise.recurrence.flash_rnn import GateInputs
from tilewise.recurrence.gated import GATES

HEADS, D = 8, 64
# Decay and rule of the operators that are compared; betas are 1 for rule "add".
KINDS = {
    "additive": (None, "add"),
    "scalar decay": ("scalar", "add"),
    "channel decay": ("channel", "add"),
    "delta": (None, "delta"),
    "gated delta": ("scalar", "delta"),
    "delta, channel decay": ("channel", "delta"),
}


def tensors(n: int, d: int = D, b: int = 1, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys of length 1 and values `[b, heads, n, d]`."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, heads, n, d) for _ in range(3))
    return q, F.normalize(k, dim=-1), v


def gates(n: int, kind: str | None, rule: str) -> dict[str, Any]:
    """Decays and betas of an operator of KINDS."""
    shape = {"scalar": (1, HEADS, n), "channel": (1, HEADS, n, D)}.get(kind or "")
    decay = None if shape is None else -0.1 * torch.rand(shape)
    return {"decay": decay, "beta": torch.rand(1, HEADS, n) if rule == "delta" else None, "rule": rule}


def work(n: int, d: int = D) -> float:
    """Operations of the recurrence: what is added to the state and what is read from it."""
    return 4.0 * HEADS * n * d * d


def peer(name: str, path: str, *arguments: object, **options: object) -> dict[str, Callable[[], object]]:
    """A function of another package with its arguments, where it is installed and runs."""
    module, _, function = path.rpartition(".")
    try:
        run = partial(getattr(importlib.import_module(module), function), *arguments, **options)
        run()
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        print(f"{name}: not raced ({type(error).__name__}: {str(error).partition(chr(10))[0]})", flush=True)
        return {}
    return {name: run}


def additive(lengths: list[int]) -> list[harness.Row]:
    rows = []
    for n in lengths:
        q, k, v = tensors(n)
        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        contenders: dict[str, Callable[[], object]] = {
            "causal sdpa": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
            "native": partial(scan, q, k, v, engine="native"),
            "torch": partial(scan, q, k, v, engine="torch"),
        } | peer("fla, naive chunk", "fla.ops.linear_attn.naive.naive_chunk_linear_attn", *turned)
        rates = {name: work(n) for name in contenders} | {"causal sdpa": 2.0 * HEADS * n * n * D}
        rows += harness.race(f"additive forward, N={n}", contenders, rates)
        entry, forget = torch.randn(1, HEADS, n), 3 + torch.randn(1, HEADS, n)
        given = {"decay": F.logsigmoid(forget), "log_beta": entry, "normalize": "bounded"}
        mlstm = peer(
            "mlstm_kernels, native",
            "mlstm_kernels.torch.chunkwise.native.mlstm_chunkwise__native_autograd",
            *(q, k, v, entry, forget),
        )
        mlstm |= {engine: partial(scan, q, k, v, engine=engine, **given) for engine in ("torch", "native")}
        rows += harness.race(f"mLSTM forward, N={n}", mlstm, dict.fromkeys(mlstm, work(n)), rounds=5)
    return rows


def flat(lengths: list[int]) -> list[harness.Row]:
    """One setting: every length is a contender, its rate tokens of all heads in a second."""
    contenders, rates = {}, {}
    for n in lengths:
        contenders[f"N={n}"] = partial(scan, *tensors(n), engine="native")
        rates[f"N={n}"] = 1e9 * n / 1e6
    return harness.race("additive forward, million tokens a second", contenders, rates, unit="M/s")


def rules(lengths: list[int]) -> list[harness.Row]:
    rows = []
    for n in lengths:
        for name, (kind, rule) in KINDS.items():
            q, k, v = tensors(n)
            given = gates(n, kind, rule)
            forward = {e: partial(scan, q, k, v, engine=e, **given) for e in ("torch", "native")}
            rows += harness.race(f"{name} forward, N={n}", forward, dict.fromkeys(forward, work(n)), rounds=5)
            leaves = [x.requires_grad_() for x in (q, k, v, *given.values()) if isinstance(x, Tensor)]
            backward = {}
            for engine in ("torch", "native"):
                out = scan(q, k, v, engine=engine, **given)
                assert isinstance(out, Tensor)
                backward[engine] = partial(
                    torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True
                )
            rows += harness.race(
                f"{name} backward, N={n}", backward, dict.fromkeys(backward, 2.5 * work(n)), rounds=5
            )
    return rows


def ceiling(lengths: list[int]) -> list[harness.Row]:
    """Scalar decays against large matrix products: the rate of each on the operations it has to do."""
    rows = []
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    for n in lengths:
        for d in (64, 128):
            q, k, v = tensors(n, d)
            decay = -0.1 * torch.rand(1, HEADS, n)
            contenders = {
                "matmul 2048": partial(torch.matmul, left, right),
                "native": partial(scan, q, k, v, decay=decay, engine="native"),
            }
            rates = {"matmul 2048": 2.0 * 2048**3, "native": work(n, d)}
            rows += harness.race(f"scalar decay forward, head_dim {d}, N={n}", contenders, rates)
    return rows


def decode() -> list[harness.Row]:
    """One token for many sequences: bytes of the state read and written, beside a plain copy of as much."""
    rows = []
    for rule in ("add", "delta"):
        b, heads, d = 24, 16, 128
        torch.manual_seed(0)
        q, k, v = tensors(1, d, b, heads)
        state = State(torch.randn(b, heads, d, d), rule=rule)
        other = torch.empty_like(state.matrix)
        decay = -0.1 * torch.rand(b, heads, 1)
        beta = torch.rand(b, heads, 1)
        call = Call(q, k, v, decay, beta, state.matrix, None, rule, 0.1)
        contenders = {
            "copy": partial(other.copy_, state.matrix),
            "native": partial(kernel, call, "native"),
            "torch": partial(kernel, call, "torch"),
        }
        moved = 2.0 * state.matrix.nbytes
        name = f"decode step, rule {rule}, {b} x {heads} states of {d} x {d}"
        rows += harness.race(name, contenders, dict.fromkeys(contenders, moved), rounds=15, unit="GB/s")
    return rows


def selective(lengths: list[int]) -> list[harness.Row]:
    """Mamba's scan at its usual shapes, forward and backward: engines, the step loop, and a parallel scan in
    PyTorch."""
    rows = []
    batch, channels, states = 1, 512, 16
    for n in lengths:
        torch.manual_seed(0)
        x, rates = torch.randn(batch, n, channels), -torch.rand(channels, states) - 0.1
        delta = F.softplus(torch.randn(batch, n, channels) - 3)
        to_state, to_out = torch.randn(batch, n, states), torch.randn(batch, n, states)
        given = [one.requires_grad_() for one in (x, delta, rates, to_state, to_out)]
        engines: dict[str, Callable[..., Tensor]] = {
            "step loop": partial(selective_scan, engine="definition"),
            "torch": partial(selective_scan, engine="torch"),
            "native": partial(selective_scan, engine="native"),
        } | parallel_scan(given)
        done = (
            9.0 * batch * n * channels * states
        )  # exponential, two products and sums, and the sum over states
        forward = {name: partial(untracked, run, *given) for name, run in engines.items()}
        rows += harness.race(
            f"selective scan forward, N={n}", forward, dict.fromkeys(forward, done), rounds=5
        )
        backward = {name: through(run, given) for name, run in engines.items()}
        rows += harness.race(
            f"selective scan forward and backward, N={n}",
            backward,
            dict.fromkeys(backward, 3 * done),
            rounds=5,
        )
    return rows


def parallel_scan(given: list[Tensor]) -> dict[str, Callable[..., Tensor]]:
    """The scan of mambapy, where it is installed, over `[batch, N, channels, states]` as its model calls it."""
    try:
        pscan = importlib.import_module("mambapy.pscan").pscan
    except ImportError as error:
        print(f"mambapy: not raced ({error})", flush=True)
        return {}

    def run(x: Tensor, delta: Tensor, rates: Tensor, to_state: Tensor, to_out: Tensor) -> Tensor:
        factors = (delta.unsqueeze(3) * rates).exp()
        states = pscan(factors, (delta * x).unsqueeze(3) * to_state.unsqueeze(2))
        return (states @ to_out.unsqueeze(3)).squeeze(3)

    want = selective_scan(*given)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(run(*given), want, rtol=1e-3, atol=1e-3)
    return {"mambapy": run}


@torch.no_grad()
def untracked(run: Callable[..., Tensor], *given: Tensor) -> Tensor:
    return run(*given)


def through(run: Callable[..., Tensor], given: list[Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(run(*given).sum(), given)


class Gated(nn.Module):
    """What torch.nn.LSTM and GRU are, in heads: gates' inputs and the network, on one engine."""

    def __init__(self, width: int, heads: int, cell: str, dense: bool = True, engine: str = "native") -> None:
        super().__init__()
        gates, d = GATES[cell], width // heads
        self.inputs, self.cell, self.engine = GateInputs(width, heads, gates, dense), cell, engine
        self.weights = nn.Parameter(torch.randn(heads, gates, d, d) * d**-0.5)
        self.bias = nn.Parameter(torch.zeros(heads, gates, d))

    def forward(self, x: Tensor) -> Tensor:
        options = {"cell": self.cell, "engine": self.engine}
        return gated_rnn(self.inputs(x), self.weights, self.bias, **options)  # type: ignore[return-value]

    def work(self, tokens: int) -> float:
        """Operations of a forward pass."""
        return 2.0 * tokens * (self.inputs.weight.numel() + self.weights.numel())


def gated(sizes: list[tuple[int, int, int]]) -> list[harness.Row]:
    """Layers of equal width, at (sequences, tokens, width); the backward row is a whole training step's two
    passes."""
    rows = []
    for cell, other in (("lstm", nn.LSTM), ("gru", nn.GRU)):
        for b, n, width in sizes:
            torch.manual_seed(0)
            x = torch.randn(b, n, width)
            layers: dict[str, nn.Module] = {
                "torch.nn": other(width, width, batch_first=True),
                "one head": Gated(width, 1, cell),
                "8 heads": Gated(width, 8, cell),
                "8 heads, own inputs": Gated(width, 8, cell, dense=False),
            }
            if width == sizes[0][2]:
                layers["one head, torch"] = Gated(width, 1, cell, engine="torch")
            for training in (False, True):
                contenders = {name: partial(passes, layer, x, training) for name, layer in layers.items()}
                times = {name: made.work(b * n) for name, made in layers.items() if isinstance(made, Gated)}
                rates = times | {"torch.nn": times["one head"]}
                rates = {name: rate * (3 if training else 1) for name, rate in rates.items()}
                kind = "forward and backward" if training else "forward"
                setting = f"{cell} {kind}, {b} x {n} tokens, width {width}"
                rows += harness.race(setting, contenders, rates, rounds=5)
    return rows


def passes(layer: nn.Module, x: Tensor, training: bool) -> None:
    """A forward pass, and where it trains a backward pass to the tokens and all weights."""
    with torch.set_grad_enabled(training):
        out = layer(x.requires_grad_(training))
        out = out[0] if isinstance(out, tuple) else out
        if training:
            out.sum().backward()


SECTIONS: dict[str, Callable[[bool], list[harness.Row]]] = {
    "additive": lambda quick: additive([512] if quick else [2048, 8192]),
    "flat": lambda quick: flat([512, 1024] if quick else [4096, 16384, 65536]),
    "rules": lambda quick: rules([512] if quick else [8192]),
    "ceiling": lambda quick: ceiling([512] if quick else [8192]),
    "decode": lambda quick: decode(),
    "selective": lambda quick: selective([128] if quick else [2048]),
    "gated": lambda quick: gated([(4, 64, 128)] if quick else [(16, 256, 256), (16, 256, 512)]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences; nothing is kept")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    options = parser.parse_args()
    chosen = options.sections or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    kernels = ("scan", "selective_scan", "gated_rnn")
    tests = [*(f"tests/kernels/test_{kernel}.py" for kernel in kernels), "-k", "lengths or chunks"]
    if not options.quick and not harness.tests_pass(*tests):
        print("the tests of the kernels fail: no figures")
        return 1
    rows = [row for name in chosen for row in SECTIONS[name](options.quick)]
    if not options.quick and chosen == list(SECTIONS):
        harness.save("recurrence", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
