"""Small settings of every mixer, for tests/recurrence/test_mixers.py; a mixer that has none fails there."""

from __future__ import annotations

from typing import Any

WIDTH = 32

SETTINGS: dict[str, dict[str, Any]] = {
    "delta-net": {"heads": 2},
    "gated-delta-net": {"heads": 2, "reach": 2.0},
    "gla": {"heads": 2, "rank": 4},
}
