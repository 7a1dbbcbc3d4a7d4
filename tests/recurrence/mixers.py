"""Small settings of every mixer, for tests/recurrence/test_mixers.py; a mixer that has none fails there."""

from __future__ import annotations

from typing import Any

WIDTH = 32

SETTINGS: dict[str, dict[str, Any]] = {
    "delta-net": {"heads": 2},
    "gated-delta-net": {"heads": 2, "reach": 2.0},
    "diagonal-attention": {"heads": 2, "block": 16},
    "gla": {"heads": 2, "rank": 4},
    "lightning": {"heads": 2, "lrpe": True},
    "mlstm-sig": {"heads": 2, "chunk": 64, "input_bias": -2.0},
    "norm-attention": {"heads": 2},
    "lact": {"heads": 2, "memories": 2, "chunk": 16, "rate": 0.1},
    "rat": {"heads": 4, "chunk": 8, "groups": 2},
}
