"""MkDocs hook: plain fences for blocks that are not run, and no page that loads anything from elsewhere."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

# What a browser fetches by itself; an ordinary link to another site is fine.
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*\bhref=\"?(?:https?:)?//"
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Drop the mark that tests/test_docs.py reads; the highlighter does not know it."""
    return markdown.replace("```python no-run", "```python")


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Raise if the finished page would fetch a script, style, font or picture over the network."""
    for match in _FETCHED.finditer(output):
        tag = output[match.start() : output.index(">", match.start()) + 1]
        if 'rel="canonical"' not in tag:
            raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {tag}")
    return output
