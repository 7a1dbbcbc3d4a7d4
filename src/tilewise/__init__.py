"""Long sequences for less: published methods as compositions of tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilewise import attention, convolution, recurrence, tiles
from tilewise.attention import attend, explain
from tilewise.version import __version__

if TYPE_CHECKING:
    from tilewise.models import patch, register


def __getattr__(name: str) -> Any:
    # Patching needs transformers, which `import tilewise` must not import.
    if name in ("patch", "register"):
        from tilewise import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "__version__",
    "attend",
    "attention",
    "convolution",
    "explain",
    "patch",
    "recurrence",
    "register",
    "tiles",
]
