"""Imports run down one way, and `import tilewise` needs torch and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewise import kernels, papers

SOURCE = Path(__file__).parent.parent / "src/tilewise"

# Lowest first. A module may import those before it and its own room; the rooms stand in the order of the README.
BASE = ["errors", "files", "version", "machine", "papers", "descent"]
ROOMS = (
    "transforms attention recurrence convolution linear quantize prune cache decode serve train "
    "generate vision scene explain data"
).split()
COMMAND = ["doctor", "commands", "cli", "__main__"]
ORDER = [
    *BASE,
    "tiles",
    "kernels",
    *ROOMS,
    "models",
    "compare",
    "tune",
    "convert",
    "",
    *COMMAND,
]  # "" is the package itself
ENGINES = {"definition", "torch", "native", "triton", "flex", "sdpa"}

MODULES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name inside the package: "" for the package itself, "tiles.masks", "kernels.attend_tiles"."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {name_of(path) for path in MODULES}


def imports(path: Path, text: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Modules of Tilewise that a file imports anywhere in it, with the name taken from each, if one is."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "tilewise":
                    yield alias.name.partition(".")[2], None
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = (*path.relative_to(SOURCE).parts,)[: -node.level]
                module = ".".join([*base, *filter(None, [node.module])])
            elif (node.module or "").partition(".")[0] == "tilewise":
                module = (node.module or "").partition(".")[2]
            else:
                continue
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                yield (inner, None) if inner in KNOWN else (module, alias.name)


def complaint(path: Path, text: str | None = None) -> str | None:
    """What is wrong with the imports of a file, or None."""
    name = name_of(path)
    room, *inner = name.split(".")
    recipes = {paper.object.rpartition(".")[2]: paper.room for paper in papers.load()}
    for module, taken in imports(path, text):
        target, *target_inner = module.split(".")
        if target != room and ORDER.index(target) > ORDER.index(room):
            return f"{name or 'tilewise'} imports {module or 'tilewise'}, which stands above it"
        if taken in recipes and room not in (recipes[taken], ""):
            return f"{name} imports the recipe {taken} by name; papers.toml finds it"
        engines = room == target == "kernels" and inner[1:] and inner[1] in ENGINES
        if engines and target_inner[1:] and target_inner[1] in ENGINES - {inner[1]}:
            return f"{name} imports {module}; engines import neither one another nor the definition"
    return None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path) or "tilewise")
def test_imports_run_down(path: Path) -> None:
    assert name_of(path).partition(".")[0] in ORDER, "a new room: give it its place in ORDER"
    assert complaint(path) is None


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("tiles/masks.py", "def f():\n    from tilewise.attention import attend"),
        ("tiles/masks.py", "import tilewise.kernels"),
        ("tiles/masks.py", "from ..models import patch"),
        ("attention/parts.py", "from tilewise import attend"),
        ("attention/parts.py", "from tilewise.cache import paged"),
        ("models/patch.py", "from tilewise.attention import MoBA"),
        ("kernels/attend_tiles/torch.py", "from tilewise.kernels.attend_tiles.definition import run"),
        ("kernels/attend_tiles/torch.py", "from tilewise.kernels.attend_tiles import definition"),
    ],
)
def test_a_wrong_import_is_seen(where: str, text: str) -> None:
    assert complaint(SOURCE / where, text)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("tiles/masks.py", "from .visibility import Visibility"),
        ("attention/parts.py", "from tilewise import papers"),
        ("compare/run.py", "from tilewise.models import patch"),
        ("doctor.py", "import tilewise"),
        ("kernels/attend_tiles/__init__.py", "from tilewise.kernels.attend_tiles import definition"),
    ],
)
def test_a_right_import_passes(where: str, text: str) -> None:
    assert complaint(SOURCE / where, text) is None


def test_all_engines_are_known() -> None:
    assert set(kernels.engines()) <= ENGINES


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["plain", "-O"])
def test_import_needs_only_torch(flags: list[str]) -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import tilewise; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", *flags, "-c", script], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) - sys.stdlib_module_names - {"torch"} == {"tilewise"}
