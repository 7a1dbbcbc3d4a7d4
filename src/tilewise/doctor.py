"""What this machine has, which engines work on it, and whether they compute the right thing."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch

from tilewise.machine import compiler, cpu_name
from tilewise.version import __version__

# What an engine that does not run here may raise.
_FAILURES = (RuntimeError, ValueError, TypeError, ImportError, OSError)


@dataclass(frozen=True)
class Check:
    """How one engine did against the float64 definition; errors are relative to the size of the answer.

    `refused` says why the engine does not run here, which is no fault; `failure` what it raised when it
    should have run. `speed` is what it reached when timed, in GFLOP/s (see `speed_of`).
    """

    operator: str
    engine: str
    error: float = float("nan")
    allowed: float = float("nan")
    refused: str | None = None
    failure: str | None = None
    speed: float | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong: the engine refused, or its error is within bounds (a NaN is not)."""
        return self.refused is not None or self.error <= self.allowed

    def line(self) -> str:
        """The check in one line."""
        if self.refused:
            return f"{self.operator}, {self.engine}: not here, {self.refused}"
        result = self.failure or f"error {self.error:.1e}, allowed {self.allowed:.1e}"
        speed = "" if self.speed is None else f", {self.speed:.0f} GFLOP/s"
        return f"{self.operator}, {self.engine}: {'works' if self.passed else 'FAILED'}, {result}{speed}"


def self_test() -> Iterator[Check]:
    """Every engine of every operator against its definition in float64, on a length no tile divides.

    Causal attention with grouped heads, the delta rule with a decay for each channel, and LSTMs in heads, in
    float32. An engine may err twice as much as the definition itself does in float32. One that is right is
    timed as well. Yields each check when it is done; engines that compile themselves take seconds.
    """
    import tilewise
    from tilewise import kernels
    from tilewise.kernels import gated_rnn, scan

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 32, generator=generator) for heads in (4, 2, 2))
    decay, beta = -torch.rand(1, 2, 300, 32, generator=generator), torch.rand(1, 2, 300, generator=generator)
    unit = torch.nn.functional.normalize(k, dim=-1)

    def attention(engine: str, dtype: torch.dtype) -> torch.Tensor:
        return _tensor(tilewise.attend(q.to(dtype), k.to(dtype), v.to(dtype), mask="causal", engine=engine))

    def recurrence(engine: str, dtype: torch.dtype) -> torch.Tensor:
        gates: dict[str, Any] = {"decay": decay.to(dtype), "beta": beta.to(dtype), "rule": "delta"}
        return _tensor(
            tilewise.recurrence.scan(q.to(dtype), unit.to(dtype), v.to(dtype), engine=engine, **gates)
        )

    yield from _checks("attention", attention, kernels.engines(), speed_of)
    gates, weights = (torch.randn(1, 2, *s, 32, generator=generator) for s in ((300, 4), (4, 32)))

    def gated(engine: str, dtype: torch.dtype) -> torch.Tensor:
        return _tensor(
            tilewise.recurrence.gated_rnn(gates.to(dtype), weights[0].to(dtype) / 6, engine=engine)
        )

    yield from _checks("recurrence", recurrence, list(scan.ENGINES), scan_speed_of)
    yield from _checks("gated networks", gated, list(gated_rnn.ENGINES), gated_speed_of)


def _tensor(out: Any) -> torch.Tensor:
    return (out if isinstance(out, torch.Tensor) else out[0]).double()


def _checks(
    operator: str,
    run: Callable[[str, torch.dtype], torch.Tensor],
    engines: Sequence[str],
    speed: Callable[[str], float],
) -> Iterator[Check]:
    """Each engine of an operator, run by `run(engine, dtype)`."""
    from tilewise import kernels

    exact = run("definition", torch.float64)

    def error(engine: str) -> float:
        return ((run(engine, torch.float32) - exact).norm() / exact.norm()).item()

    allowed = 2 * error("definition")
    for engine in engines:
        check = Check(operator, engine, allowed=allowed)
        try:
            check = replace(check, error=error(engine))
            if check.passed:
                check = replace(check, speed=speed(engine))
        except kernels.EngineRefused as refusal:
            check = replace(check, refused=str(refusal))
        except _FAILURES as failure:
            check = replace(check, failure=f"{type(failure).__name__}: {failure}".partition("\n")[0])
        yield check


def speed_of(engine: str, n: int = 1024) -> float:
    """GFLOP/s of attention without a mask, 8 heads of 64, float32, on the CPU: the best of a few runs."""
    import tilewise

    q, k, v = (torch.randn(1, 8, n, 64) for _ in range(3))
    return 4 * 8 * n * n * 64 / _best(lambda: tilewise.attend(q, k, v, engine=engine)) / 1e9


def scan_speed_of(engine: str, n: int = 1024) -> float:
    """GFLOP/s of additive linear attention, 8 heads of 64, float32, on its 4 x 64 x 64 operations for a
    token."""
    from tilewise.recurrence import scan

    q, k, v = (torch.randn(1, 8, n, 64) for _ in range(3))
    return 4 * 8 * n * 64 * 64 / _best(lambda: scan(q, k, v, engine=engine)) / 1e9


def gated_speed_of(engine: str, n: int = 256) -> float:
    """GFLOP/s of an LSTM, 8 heads of 64, 8 sequences, float32, on its 8 x 64 x 64 operations for a token and
    head."""
    from tilewise.recurrence import gated_rnn

    x, weights = torch.randn(8, 8, n, 4, 64), torch.randn(8, 4, 64, 64) / 8
    return 8 * 8 * 8 * n * 64 * 64 / _best(lambda: gated_rnn(x, weights, engine=engine)) / 1e9


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs."""
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def facts() -> dict[str, str]:
    """What the machine and the installation are, by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "tilewise": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "cpu": cpu_name(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} used by torch",
        "vector width": torch.backends.cpu.get_cpu_capability(),
        "C++ compiler": compiler() or "missing",
        "cuda": ", ".join(gpus) or "no device",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "present, version unknown" if importlib.util.find_spec(package) else "missing"
