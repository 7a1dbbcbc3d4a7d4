"""Conformance 11 and 13, read from the sources: 64-bit offsets in kernels, and every public option in a test."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tilewise
from tilewise import attention, tiles

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "tilewise"

# 64-bit offsets. In Triton `program_id` is 32 bits wide, and so is every product with it; in C++ so is `int`.
PROGRAM_ID = re.compile(r"tl\.program_id\([^)]*\)")
NARROW_OFFSET = re.compile(
    r"\b(?:int|unsigned|unsigned int|int32_t|uint32_t)\s+\w*(?:offset|stride|base|index|row|start)\w*\s*[=;,)]"
)


def narrow_offsets(path: Path, text: str) -> list[str]:
    """Lines in which an offset is computed in 32 bits, with the reason."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        code = line.split("//")[0] if path.suffix in (".cpp", ".h") else line.split("#")[0]
        if path.suffix == ".py" and any(
            not code[hit.end() :].startswith(".to(tl.int64)") for hit in PROGRAM_ID.finditer(code)
        ):
            found.append(f"{path.name}:{number}: program_id without .to(tl.int64)")
        if path.suffix in (".cpp", ".h") and NARROW_OFFSET.search(code):
            found.append(f"{path.name}:{number}: an offset in 32 bits, make it int64_t")
    return found


def kernel_sources() -> list[Path]:
    return sorted({*SOURCES.rglob("*.cpp"), *SOURCES.rglob("*.h"), *SOURCES.rglob("triton*.py")})


def test_offsets_are_64_bits_wide(record_property):
    sources = kernel_sources()
    print(f"{len(sources)} Triton and C++ sources read")
    record_property("sources", len(sources))
    assert [hit for path in sources for hit in narrow_offsets(path, path.read_text())] == []


@pytest.mark.parametrize(
    ("name", "line", "bad"),
    [
        ("triton.py", "row = tl.program_id(0) * stride", True),
        ("triton.py", "row = tl.program_id(0).to(tl.int64) * stride", False),
        ("triton.py", "# tl.program_id(0) is 32 bits wide", False),
        ("triton.py", "a, b = tl.program_id(0).to(tl.int64), tl.program_id(axis=1)", True),
        ("native.cpp", "int offset = i * n;", True),
        ("native.cpp", "const int key_stride = k.stride(2);", True),
        ("native.cpp", "for (int row = 0; row < n; ++row)", True),
        ("native.cpp", "int64_t offset = i * n;  // int offset = would overflow", False),
        ("native.cpp", "void f(int32_t base, float x)", True),
        ("native.cpp", "for (int lane = 0; lane < 8; ++lane)", False),
    ],
)
def test_the_offset_lint_sees_what_it_should(name, line, bad):
    assert bool(narrow_offsets(Path(name), line)) == bad


# Options


def _public() -> Iterator[tuple[str, Callable]]:
    for module in (attention, tiles):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                yield name, thing


# Made by the library and handed to users, never by users; and bases without settings.
MADE_BY_THE_LIBRARY = {"Explanation", "Visibility", "Method", "Mask", "Recipe"}


def options() -> dict[str, list[str]]:
    """The parameters of every public function, and of every public class's constructor."""
    found = {}
    for name, thing in _public():
        if name in MADE_BY_THE_LIBRARY:
            continue
        parameters = inspect.signature(thing).parameters.values()
        found[name] = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    found["attend"] = list(inspect.signature(tilewise.attend).parameters)
    found["explain"] = list(inspect.signature(tilewise.explain).parameters)
    found["from_mask"] = list(inspect.signature(tiles.TileMap.from_mask).parameters)
    found["from_bounds"] = list(inspect.signature(tiles.Tiling.from_bounds).parameters)
    return found


def named_in(source: str) -> dict[str, set[str]]:
    """Keywords by the last name of what is called."""
    found: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name is not None:
                found[name] |= {k.arg for k in node.keywords if k.arg}
    return found


def missing_options(sources: list[str]) -> dict[str, list[str]]:
    """Public options that no source gives by name."""
    seen: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        for name, keywords in named_in(source).items():
            seen[name] |= keywords
    missing = {name: [p for p in parameters if p not in seen[name]] for name, parameters in options().items()}
    return {name: parameters for name, parameters in missing.items() if parameters}


def test_every_public_option_appears_in_a_test():
    """By keyword, so that renaming one fails here too."""
    sources = [path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))]
    missing = missing_options(sources)
    assert missing == {}, f"add tests that give these by name: {missing}"


def test_an_option_without_a_test_is_noticed():
    missing = missing_options(["attend(q=1, k=2, v=3)", "tilewise.attend(scale=0.1)"])
    assert (
        "softcap" in missing["attend"] and "scale" not in missing["attend"] and "q" not in missing["attend"]
    )
    assert missing["MoBA"] == ["block", "top_k"]
