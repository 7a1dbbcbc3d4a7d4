"""Small settings of every mixer, for tests/recurrence/test_mixers.py; a mixer that has none fails there."""

from __future__ import annotations

from typing import Any

WIDTH = 32

SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"heads": 4, "kv_heads": 2},
    "delta-net": {"heads": 2},
    "diagonal-attention": {"heads": 2, "block": 16},
    "elman": {"heads": 1, "inputs": "heads"},
    "gated-delta-net": {"heads": 2, "reach": 2.0},
    "gla": {"heads": 2, "rank": 4, "conv": 3},
    "gru": {"heads": 4, "conv": 2},
    "h3": {"states": 6, "shift": 5, "head": 2},
    "kda": {"heads": 2},
    "lact": {"heads": 2, "memories": 2, "chunk": 16, "window": 7, "rate": 0.1},
    "lightning": {"heads": 2, "lrpe": True},
    "linear": {"heads": 2, "conv": 3},
    "long-conv": {"taps": 20, "smooth": 3},
    "long-vq": {"heads": 2, "codes": 6, "window": 11, "averages": 2},
    "mamba": {"states": 5},
    "lstm": {"heads": 2},
    "mla": {"heads": 2, "rope_dim": 4, "latent": 12},
    "mlgru": {},
    "mlstm": {"heads": 2, "input_bias": 0.0},
    "mlstm-sig": {"heads": 2, "chunk": 64, "input_bias": -2.0},
    "norm-attention": {"heads": 2},
    "rat": {"heads": 4, "chunk": 8, "groups": 2},
    "tnt": {"memories": 2, "far": 32, "near": (2, 8), "shard": 16, "rate": 2.0},
    "s4d": {"states": 6},
    "sliding-window": {"heads": 2, "window": 11},
    "slstm": {"heads": 2, "inputs": "heads", "conv": 3},
}
