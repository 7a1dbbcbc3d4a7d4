"""Every Python block of the pages runs, and every public name is on the API page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tilewise

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NO_RUN = 0  # blocks marked `no-run` in all pages; raise it on purpose only


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in FENCE.finditer(text):
        mark, code = block.groups()
        assert mark in ("", " no-run"), f"{page.name}: unknown mark {mark!r} on a Python block"
        if not mark:
            line = text[: block.start(2)].count("\n")
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_blocks_not_run_are_counted() -> None:
    marks = [mark for page in PAGES for mark, _ in FENCE.findall(page.read_text(encoding="utf-8"))]
    assert marks.count(" no-run") == NO_RUN


def test_public_names_are_on_the_api_page() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in set(tilewise.__all__) - {"__version__"}:
        assert re.search(rf"^::: tilewise\.{name}$", page, re.MULTILINE), (
            f"{name} is missing from docs/api.md"
        )
