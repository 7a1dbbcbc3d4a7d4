"""The register of papers: reads `papers.toml`, searches it, and imports what an entry names."""

from __future__ import annotations

import datetime
import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tilewise.errors import UserError

_TYPES: dict[str, type] = {"id": int, "date": datetime.date, "evidence": list}  # every other field is text


@dataclass(frozen=True)
class Paper:
    """One entry of the register; `papers.toml` says what each field means."""

    key: str
    id: int
    title: str
    date: datetime.date
    url: str
    room: str
    object: str
    evidence: tuple[str, ...]


@cache
def load() -> tuple[Paper, ...]:
    """All papers, in the order of the register; a wrong entry raises `ValueError` naming it and the field."""
    return parse(resources.files("tilewise").joinpath("papers.toml").read_text(encoding="utf-8"))


def parse(text: str) -> tuple[Paper, ...]:
    """The papers of a register given as TOML text."""
    return tuple(_paper(key, entry) for key, entry in tomllib.loads(text).items())


def _paper(key: str, entry: dict[str, Any]) -> Paper:
    names = [field.name for field in fields(Paper) if field.name != "key"]
    missing, unknown = [n for n in names if n not in entry], [n for n in entry if n not in names]
    if missing or unknown:
        raise ValueError(
            f"papers.toml [{key}]: missing {missing}, unknown {unknown}; the fields are {', '.join(names)}"
        )
    for name in names:
        wanted = _TYPES.get(name, str)
        if type(entry[name]) is not wanted or (wanted is not int and not entry[name]):
            raise ValueError(f"papers.toml [{key}]: {name} = {entry[name]!r} should be a {wanted.__name__}")
    return Paper(key=key, **{**entry, "evidence": tuple(entry["evidence"])})


def search(words: Sequence[str]) -> list[Paper]:
    """Papers with every word somewhere in key, title, room, object or id, in any case; all for no words."""
    wanted = [word.casefold() for word in words]

    def text(paper: Paper) -> str:
        return f"{paper.key} {paper.title} {paper.room} {paper.object} {paper.id}".casefold()

    return [paper for paper in load() if all(word in text(paper) for word in wanted)]


def find(key: str) -> Paper:
    """The paper with this key. Raises `UserError` naming the nearest keys."""
    by_key = {paper.key: paper for paper in load()}
    if key not in by_key:
        near = difflib.get_close_matches(key, by_key, n=3) or sorted(by_key)
        raise UserError(f"no paper {key!r} in the register; nearest: {', '.join(near)}")
    return by_key[key]


def resolve(paper: Paper) -> Any:
    """What `paper.object` names. Raises `ImportError` naming the entry when the path leads nowhere."""
    module, _, name = paper.object.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(
            f"papers.toml [{paper.key}]: object {paper.object!r} cannot be imported: {error}"
        ) from error
