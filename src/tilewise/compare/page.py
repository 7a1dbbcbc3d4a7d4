"""The result of `tilewise compare` as one HTML page that needs nothing but a browser.

The page carries the result as JSON and draws it with its own script (`page.js`); there is no plotting library
in it, so it stays small, prints well and follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from pathlib import Path
from string import Template
from typing import Any

from tilewise.files import write_text

_HERE = Path(__file__).parent


def render(result: dict[str, Any]) -> str:
    """Return the report of one `tilewise compare` run as a self-contained HTML page.

    `result` is what `tilewise compare --json` writes. Numbers that are None or not finite are shown as a dash
    with their reason. Raises ValueError if `result` has no list of methods.
    """
    if not isinstance(result, dict) or not isinstance(result.get("methods"), list):
        given = sorted(result) if isinstance(result, dict) else type(result).__name__
        raise ValueError(f"result: expected a compare result with a list under 'methods', got {given}")
    script = _read("page.js")
    # The policy lets this one script run and nothing load: even a flaw in escaping could not reach out.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_read("page.html")).substitute(
        digest=digest, css=_read("page.css"), script=script, result=_embed(result)
    )


def write(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page to `path`, whole or not at all: an older file stays as it was if anything fails."""
    write_text(render(result), path)


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _embed(result: dict[str, Any]) -> str:
    """JSON that can stand inside a <script> element: no character in it can end or open a tag or a comment."""
    text = json.dumps(finite(result), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def finite(value: Any) -> Any:
    """JSON has no nan or infinity; a page that fails to open because of one would lose the whole run."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
