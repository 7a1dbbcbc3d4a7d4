"""Dense attention: every visible tile, exactly."""

from __future__ import annotations

from dataclasses import dataclass

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan


@dataclass(frozen=True)
class Dense(Method):
    """Every visible tile, exactly. The method that all others are compared with."""

    name = "dense"

    def plan(self, q, k, view, scale) -> Plan:
        return Plan((Pass(view),), view)
