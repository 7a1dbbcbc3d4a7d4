"""Long convolutions side by side: against the usual composition of torch.fft, and against themselves where
less is asked for.

    python benchmarks/convolution.py [--quick] [training inference partial sparse decode memory]

The work is a gated causal convolution of 4 sequences of 64 channels, each with a kernel as long as the
sequence, in
float32: `gate_out * (conv(gate_in * x) + skip * (gate_in * x))`. Rates count what the transforms of two real
rows at a time take, 5 L log2 L for each of length L, whoever does them how.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.conformance.test_memory import allocations
from tilewise.convolution import FrequencySparsity, long_conv, prepare

B, C = 4, 64
NAMES = ("x", "kernel", "gate_in", "gate_out", "skip")


def tensors(n: int, taps: int | None = None, b: int = B) -> dict[str, Tensor]:
    """Random inputs and fading kernels."""
    torch.manual_seed(0)
    taps = n if taps is None else taps
    kernel = torch.randn(C, taps) * torch.exp(-4 * torch.arange(taps) / taps)
    x, gate_in, gate_out = (torch.randn(b, C, n) for _ in range(3))
    return {"x": x, "kernel": kernel, "gate_in": gate_in, "gate_out": gate_out, "skip": torch.randn(C)}


def usual(
    x: Tensor,
    kernel: Tensor,
    gate_in: Tensor,
    gate_out: Tensor,
    skip: Tensor,
    causal: bool = True,
    spectrum: Tensor | None = None,
) -> Tensor:
    """The usual composition; `spectrum` is the kernel's transform where it is kept."""
    n = x.shape[2]
    size = 2 * n if causal else n
    u = gate_in * x
    spectrum = torch.fft.rfft(kernel, n=size) if spectrum is None else spectrum
    z = torch.fft.irfft(torch.fft.rfft(u, n=size) * spectrum, n=size)[..., :n]
    return gate_out * (z + skip.unsqueeze(1) * u)


def native(x: Tensor, kernel: Tensor, **gates: Tensor) -> Tensor:
    """This library's, on its native engine."""
    return long_conv(x, kernel, engine="native", **gates)  # type: ignore[return-value, arg-type]


def torch_engine(x: Tensor, kernel: Tensor, **gates: Tensor) -> Tensor:
    """This library's, on its torch engine."""
    return long_conv(x, kernel, engine="torch", **gates)  # type: ignore[return-value, arg-type]


CONTENDERS: dict[str, Callable[..., Tensor]] = {"torch.fft": usual, "native": native, "torch": torch_engine}


def work(n: int, transforms: float, size: int | None = None) -> float:
    """Operations of so many transforms of each pair of rows."""
    size = 2 * n if size is None else size
    return transforms * B / 2 * C * 5 * size * math.log2(size)


def training(lengths: list[int]) -> list[harness.Row]:
    rows = []
    for n in lengths:
        given = {name: x.requires_grad_() for name, x in tensors(n).items()}
        forward = {name: partial(run, **given) for name, run in CONTENDERS.items()}
        rate, rounds = dict.fromkeys(forward, work(n, 2)), 7 if n < 16384 else 5
        rows += harness.race(f"training forward, N={n}", forward, rate, rounds)
        backward = {}
        d_out = torch.randn(B, C, n)
        for name, run in CONTENDERS.items():
            out = run(**given)
            backward[name] = partial(torch.autograd.grad, out, list(given.values()), d_out, retain_graph=True)
        rate = dict.fromkeys(backward, work(n, 4))
        rows += harness.race(f"training backward, N={n}", backward, rate, rounds)
    return rows


@torch.no_grad()
def untracked(run: Callable[..., Tensor], **given: Tensor) -> Tensor:
    return run(**given)


def inference(lengths: list[int]) -> list[harness.Row]:
    """A kernel that stays as it is."""
    rows = []
    for n in lengths:
        given = tensors(n)
        fixed = prepare(given["kernel"], n)
        kept = torch.fft.rfft(given["kernel"], n=2 * n)
        contenders = {
            "torch.fft": partial(untracked, usual, **given),
            "torch.fft, kernel's kept": partial(untracked, usual, **given, spectrum=kept),
            "native, prepared": partial(untracked, native, **given | {"kernel": fixed}),  # type: ignore[dict-item]
            "native": partial(untracked, native, **given),
        }
        want = usual(**given)
        torch.testing.assert_close(
            contenders["native, prepared"](), want, rtol=1e-3, atol=1e-3 * float(want.std())
        )
        rows += harness.race(f"fixed kernel, N={n}", contenders, dict.fromkeys(contenders, work(n, 2)))
    return rows


def partials(lengths: list[int]) -> list[harness.Row]:
    """Kernels of an eighth of the length."""
    rows = []
    for n in lengths:
        full, short = tensors(n), tensors(n, n // 8)
        for kind in ("forward", "forward and backward"):
            through = untracked if kind == "forward" else trained
            contenders = {
                "native, K = N": partial(through, native, **full),
                "native, K = N / 8": partial(through, native, **short),
                "torch.fft, K = N / 8": partial(through, usual, **short),
            }
            rows += harness.race(f"partial kernel {kind}, N={n}", contenders, {})
    return rows


def trained(run: Callable[..., Tensor], **given: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    return torch.autograd.grad(run(**leaves).sum(), list(leaves.values()))


def sparse(lengths: list[int]) -> list[harness.Row]:
    """A quarter of the frequencies, of circular convolutions without gates and a kernel that stays as it
    is."""
    rows = []
    for n in lengths:
        given = tensors(n)
        x, kernel = given["x"], given["kernel"]
        quarter = FrequencySparsity(16, (0, 1, 8, 15))
        contenders: dict[str, Callable[[], object]] = {}
        for name, sparsity in (("native, all", None), ("native, a quarter", quarter)):
            fixed = prepare(kernel, n, causal=False, sparsity=sparsity)
            contenders[name] = partial(long_conv, x, fixed, causal=False, sparsity=sparsity, engine="native")
        contenders["torch.fft, all"] = partial(bare, x, kernel)
        rows += harness.race(f"frequencies, N={n}", contenders, {})
    return rows


def bare(x: Tensor, kernel: Tensor) -> Tensor:
    """A circular convolution and no more."""
    n = x.shape[2]
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(kernel), n=n)


def decode(taps: list[int]) -> list[harness.Row]:
    """One token for 16 sequences: bytes of the state that is read."""
    rows = []
    for count in taps:
        given = tensors(1, count, b=16)
        _, state = long_conv(torch.randn(16, C, count), given["kernel"], return_state=True)
        options = {name: x for name, x in given.items() if name in ("gate_in", "gate_out", "skip")}
        contenders: dict[str, Callable[[], object]] = {}
        for engine in ("torch", "native"):
            contenders[engine] = partial(
                untracked,
                long_conv,
                x=given["x"],
                kernel=given["kernel"],
                **options,
                state=state,
                engine=engine,
            )
        bytes_ = dict.fromkeys(contenders, 4.0 * 16 * C * count)
        rows += harness.race(f"a token, K={count}", contenders, bytes_, unit="GB/s")
    return rows


def memory(lengths: list[int]) -> list[dict[str, object]]:
    """The most that is held at once in a training step, beside inputs and their gradients."""
    found: list[dict[str, object]] = []
    for n in lengths:
        for name, run in CONTENDERS.items():
            given, d_out = tensors(n), torch.randn(B, C, n)
            leaves = {key: x.requires_grad_() for key, x in given.items()}
            made: list[object] = []

            def step(run=run, leaves=leaves, d_out=d_out, made=made) -> None:
                made.extend(torch.autograd.grad(run(**leaves), list(leaves.values()), d_out))

            peak = allocations(step)[1]
            gradients = sum(x.nbytes for x in given.values())
            found.append({"n": n, "provider": name, "bytes": peak, "gradients": gradients})
            print(
                f"memory, N={n:<8}{name:<12}{peak / 1e6:>9.1f} MB, of which gradients {gradients / 1e6:.1f}",
                flush=True,
            )
    return found


LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
SECTIONS: dict[str, Callable[[bool], list[harness.Row]]] = {
    "training": lambda quick: training([1024] if quick else LENGTHS),
    "inference": lambda quick: inference([1024] if quick else LENGTHS),
    "partial": lambda quick: partials([1024] if quick else [1024, 4096, 16384, 65536]),
    "sparse": lambda quick: sparse([1024] if quick else [1024, 4096, 16384, 65536]),
    "decode": lambda quick: decode([1024] if quick else [1024, 16384]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences; nothing is kept")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join([*SECTIONS, 'memory'])}")
    options = parser.parse_args()
    every = [*SECTIONS, "memory"]
    chosen = options.sections or every
    if unknown := [name for name in chosen if name not in every]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(every)}")
    tests = ["tests/kernels/test_long_conv.py", "-k", "lengths or every_cut or left_out"]
    if not options.quick and not harness.tests_pass(*tests):
        print("the tests of the kernel fail: no figures")
        return 1
    rows = [row for name in chosen if name in SECTIONS for row in SECTIONS[name](options.quick)]
    held = memory([1024] if options.quick else [4096, 65536]) if "memory" in chosen else []
    if not options.quick and chosen == every:
        harness.save("convolution", rows, {"memory": held})
    return 0


if __name__ == "__main__":
    sys.exit(main())
