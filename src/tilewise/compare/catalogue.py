"""What can be compared on a language model, by name, and why other papers of the register cannot.

A name is that of a named method, or the key of a method in the register that needs nothing but a call, or of one
that reads by gates: those need a file, which only the bundled model brings.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from pathlib import Path
from typing import Any

from torch import nn

from tilewise import papers
from tilewise.attention import Method, as_method, named
from tilewise.attention.written import check_plans
from tilewise.errors import UserError
from tilewise.models import ModelRecipe, bundled_gates, gated, gated_names, load_gates, serves

Choice = Method | ModelRecipe
GATES = ".safetensors"  # how files of gates end
# Settings that suit a prompt of a language model, where the default suits something else.
PROMPT: dict[str, dict[str, Any]] = {"hyper-attention": {"causal": True}}
# What runs on a prompt when it is named, but is made for something else.
BY_NAME = {
    "svg-ear": "runs if named; made for no mask: a causal one cuts nearly all tiles of scattered tokens",
    "svg2": "runs if named; made for no mask: a causal one cuts nearly all tiles of scattered tokens",
}
# Why a paper's object is no method to give a language model, where its kind does not say it.
REASONS = {
    "ada-spa": "works over the steps of a sampler",
    "block-rank": "a mask for ranking prompts: documents that do not see one another",
    "fast-attention": "exact: keeps keys and values in two tiers",
    "flash-block": "works over the steps in which a block is denoised",
    "flash-decoding-plus": "exact: another way to run decoding",
    "flashbias": "exact: a bias given as factors",
    "flashinfer": "exact: keys and values in pages",
    "io-cost": "counts, nothing is computed",
    "lean-attention": "exact: another way to run decoding",
    "tensor-attention": "attends to pairs of keys, which a model must be made for",
    "token-ring": "exact: a sequence over several machines",
}


def unnamed() -> dict[str, Method]:
    """Methods of the register that have no name and need nothing but a call, by key, with their defaults."""
    found = {}
    for paper in papers.load():
        kind = papers.resolve(paper) if paper.room == "attention" else None
        if isinstance(kind, type) and issubclass(kind, Method) and not kind.name and kind.needs == "nothing":
            found[paper.key] = kind(**PROMPT.get(paper.key, {}))
    return dict(sorted(found.items()))


def everything(bundled: bool) -> dict[str, Choice]:
    """What "all" stands for: with the bundled model also what its gates serve."""
    found: dict[str, Choice] = {name: as_method(name) for name in named()}
    found |= {name: method for name, method in unnamed().items() if name not in BY_NAME}
    if bundled:
        found |= {name: gated(load_gates(bundled_gates(name))) for name in gated_names()}
    return found


def left_out() -> dict[str, str]:
    """Why each other paper of the register's room of attention is no part of "all", by key."""
    reached = {type(method) for name, method in everything(bundled=False).items()}
    out = {}
    for paper in papers.load():
        if paper.room != "attention" or paper.key in (*named(), *gated_names()):
            continue
        found = papers.resolve(paper)
        if found in reached:
            continue
        if paper.key in BY_NAME:
            why = BY_NAME[paper.key]
        elif isinstance(found, type) and issubclass(found, Method):
            why = f"needs {found.needs}"
        elif isinstance(found, type) and issubclass(found, nn.Module):
            why = "a layer with weights of its own, to train a model with"
        else:
            why = "not a method that decides what attention reads"
        out[paper.key] = REASONS.get(paper.key, why)
    return out


def choose(text: str, bundled: bool) -> Choice:
    """What "name", "name:setting=value:...", "name:gates=FILE:..." or "FILE.safetensors:..." stands for.

    Args: bundled: whether the model is the bundled one, so that gates need no file.

    Raises UserError for names, settings and files that are none.
    """
    name, *pairs = text.split(":")
    if name.endswith(GATES):
        return _gated(text, name, None, pairs)
    if name not in gated_names():
        return parse_method(text)
    files = [pair.partition("=")[2] for pair in pairs if pair.startswith("gates=")]
    pairs = [pair for pair in pairs if not pair.startswith("gates=")]
    if len(files) > 1:
        raise UserError(f"method {text!r}: gates must be one file, got {len(files)}")
    if not files and not bundled:
        raise UserError(
            f"{name} needs gates trained for this model: {name}:gates=FILE{GATES}; those at hand are the bundled"
            " model's"
        )
    return _gated(text, files[0] if files else str(bundled_gates(name)), name, pairs)


def _gated(text: str, path: str, name: str | None, pairs: list[str]) -> ModelRecipe:
    gates = load_gates(path)
    try:
        if name not in (None, serves(gates)):
            raise ValueError(f"{path!r} holds gates of {serves(gates)}")
        return gated(gates, **_pairs(pairs))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"method {text!r}: {error}") from error


def parse_method(text: str) -> Method:
    """A method from "name" or "name:setting=value:setting=value"."""
    name, *pairs = text.split(":")
    method = _find(name)
    if not pairs:
        return method
    fields = {f.name for f in dataclasses.fields(method) if f.repr}  # type: ignore[arg-type]
    try:
        if unknown := [pair for pair in pairs if pair.partition("=")[0] not in fields or "=" not in pair]:
            raise ValueError(f"its settings are {', '.join(sorted(fields)) or 'none'}, got {unknown[0]!r}")
        method = dataclasses.replace(method, **_pairs(pairs))  # type: ignore[type-var]
        check_plans(method)
        return method
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"method {text!r}: {error}") from error


def _find(name: str) -> Method:
    if name in named():
        return as_method(name)
    if name in (others := unnamed()):
        return others[name]
    known = sorted([*named(), *others, *gated_names()])
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known methods: {', '.join(known)}"
    raise UserError(f"unknown attention method {name!r}; {hint}")


def _pairs(pairs: list[str]) -> dict[str, Any]:
    """Settings by name, from "name=value"."""
    given = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"settings are given as name=value, got {pair!r}")
        given[key] = _value(value)
    return given


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # the method says what it accepts instead


def label(text: str) -> str:
    """What a choice is called in tables: as it was given, files without their folder and ending."""
    name, colon, rest = text.partition(":")
    if name.endswith((GATES, ".json")):
        name = Path(name).stem
    return name + colon + rest
