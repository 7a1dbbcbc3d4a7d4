"""Recurrence: the running state. Linear attention, delta rules, gated networks: one scan, in linear time."""

from tilewise.recurrence.api import empty_state, explain, scan
from tilewise.recurrence.state import State

__all__ = ["State", "empty_state", "explain", "scan"]
