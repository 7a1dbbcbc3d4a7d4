"""The register of papers holds what it says: objects import, evidence is collected, rooms exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tilewise import papers
from tilewise.errors import UserError

ROOT = Path(__file__).parent.parent
ENTRY = """
[a_paper]
id = 1
title = "A title"
date = 2025-01-02
url = "https://example.org"
room = "attention"
object = "tilewise.errors.UserError"
evidence = ["tests/test_papers.py::test_ids_are_unique"]
"""


@pytest.fixture(scope="module")
def collected() -> list[str]:
    """Ids of all tests marked `evidence` in the files that the register names."""
    files = sorted({name.partition("::")[0] for paper in papers.load() for name in paper.evidence})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "evidence",
    ]
    done = subprocess.run([*command, *files], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("paper", papers.load(), ids=lambda paper: paper.key)
def test_entry_names_what_exists(paper: papers.Paper) -> None:
    assert callable(papers.resolve(paper))
    assert (ROOT / "src/tilewise" / paper.room / "__init__.py").is_file()
    assert paper.object.startswith(f"tilewise.{paper.room}.")


@pytest.mark.parametrize("paper", papers.load(), ids=lambda paper: paper.key)
def test_evidence_is_collected_and_marked(paper: papers.Paper, collected: list[str]) -> None:
    for name in paper.evidence:
        assert any(line == name or line.startswith(f"{name}[") for line in collected), name


def test_ids_are_unique() -> None:
    ids = [paper.id for paper in papers.load()]
    assert len(ids) == len(set(ids))
    objects = [paper.object for paper in papers.load()]
    assert len(objects) == len(set(objects))


def test_search_wants_every_word_in_any_case() -> None:
    assert [paper.key for paper in papers.search(["antidiagonal", "BLOCK"])] == ["xattention"]
    assert papers.search(["antidiagonal", "permutation"]) == []
    assert papers.search([]) == list(papers.load())


def test_find_offers_the_nearest_names() -> None:
    assert papers.find("moba").id == 15
    with pytest.raises(UserError, match=r"'xatention'.*nearest: xattention"):
        papers.find("xatention")
    with pytest.raises(UserError, match=", ".join(sorted(paper.key for paper in papers.load()))):
        papers.find("q")


def test_entry_is_read() -> None:
    (paper,) = papers.parse(ENTRY)
    assert (paper.key, paper.date.year, paper.evidence) == (
        "a_paper",
        2025,
        ("tests/test_papers.py::test_ids_are_unique",),
    )
    assert papers.resolve(paper) is UserError


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('room = "attention"\n', "", r"\[a_paper\]: missing \['room'\]"),
        ("url =", "link =", r"missing \['url'\], unknown \['link'\]"),
        ("id = 1", 'id = "1"', "id = '1' should be a int"),
        ("id = 1", "id = true", "id = True should be a int"),
        ("date = 2025-01-02", 'date = "2025-01-02"', "should be a date"),
        ('["tests/test_papers.py::test_ids_are_unique"]', "[]", r"evidence = \[\] should be"),
    ],
)
def test_wrong_entry_is_named(old: str, new: str, message: str) -> None:
    assert old in ENTRY
    with pytest.raises(ValueError, match=message):
        papers.parse(ENTRY.replace(old, new))


@pytest.mark.parametrize("path", ["tilewise.errors.Nothing", "tilewise.nowhere.Thing", "Thing"])
def test_object_that_leads_nowhere_is_named(path: str) -> None:
    (paper,) = papers.parse(ENTRY.replace("tilewise.errors.UserError", path))
    with pytest.raises(ImportError, match=rf"\[a_paper\].*{path}"):
        papers.resolve(paper)
