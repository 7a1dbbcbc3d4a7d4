"""The hot loops. Each operator is a folder: `definition` says what it means, engines make it fast.

Engines implement the same call. An engine named by the caller runs or raises; "auto" takes the first in order
of preference that accepts the call. Engines import neither one another nor the definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """One implementation of an operator."""

    def refuse(self, call: Any) -> str | None:
        """Why this engine cannot run `call`, or None when it can."""

    def run(self, call: Any) -> Any:
        """Run `call`; only asked when `refuse` said None."""


@dataclass(frozen=True)
class Choice:
    """Which engine was taken for a call, and why each other one was not."""

    engine: str
    refused: Mapping[str, str]


class EngineRefused(ValueError):
    """A named engine cannot run the call."""


def choose(engines: Mapping[str, Engine], call: Any, engine: str) -> Choice:
    """Choose an engine for `call`: the named one, or for "auto" the first that accepts.

    Raises ValueError for an unknown name and EngineRefused when the named engine (or, for "auto", every one)
    cannot run the call.
    """
    if engine == "auto":
        refused: dict[str, str] = {}
        for name, candidate in engines.items():
            if name == "definition":
                refused[name] = "is the meaning, kept for tests; runs only when named"
                continue
            if reason := candidate.refuse(call):
                refused[name] = reason
                continue
            later = {
                other: f"{name} comes first" for other in engines if other not in refused and other != name
            }
            return Choice(name, refused | later)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise EngineRefused(f"no engine can run this call ({reasons})")
    if engine not in engines:
        raise ValueError(f"engine must be 'auto' or one of {sorted(engines)}, got {engine!r}")
    if reason := engines[engine].refuse(call):
        raise EngineRefused(f"engine {engine!r} cannot run this call: {reason}")
    return Choice(engine, {name: f"{engine} was asked for" for name in engines if name != engine})


def engines() -> list[str]:
    """Names of the engines of the attention operator, in the order in which "auto" tries them."""
    from tilewise.kernels.attend_tiles import ENGINES

    return list(ENGINES)


# Kernels with a native engine.
NATIVE = ("attend_tiles", "choose_keys", "fwht", "gated_rnn", "scan", "selective_scan")


def natives() -> dict[str, Sequence[Path]]:
    """The sources of every native engine, by the name of its library."""
    libraries = [import_module(f"tilewise.kernels.{name}.native").LIBRARY for name in NATIVE]
    return {library.name: library.sources for library in libraries}
