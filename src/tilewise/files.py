"""Writing files so that nothing is lost: whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a file whole or not at all: an older one stays as it was if anything fails."""
    path = Path(path)
    # Beside the target, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
