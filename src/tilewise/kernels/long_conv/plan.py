"""How a convolution is cut into transforms: windows of one length, a few at a time, or sums without any."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tilewise.kernels.long_conv.call import Call


@dataclass(frozen=True)
class Plan:
    """A cut of a call into overlapping windows (overlap-save).

    Window m covers the inputs from `m * step - lead` on, `length` of them, and gives the outputs from `m *
    step` on, `step` of them; the first `lead` of what its transform gives back are spoilt by the wrap.

    Attributes:
        length: of a transform; 0 where sums are taken directly. taps: of the kernel, that can be reached.
    """

    length: int
    lead: int
    step: int
    taps: int

    def windows(self, n: int) -> int:
        """How many give n outputs."""
        return -(-n // self.step)


# Beside the stages of its transform, a window is loaded, multiplied and stored: as much as so many stages.
AROUND = 6.0


def plan(
    call: Call,
    *,
    shortest: int,
    exact: Callable[[int], bool],
    direct: float = 0.0,
    rows: int = 1,
    length: int | None = None,
    longest: int | None = None,
) -> Plan:
    """The cheapest cut by the number of stages times numbers.

    Args:
        shortest: transform there is; others are powers of 2 times it. exact: whether there is one of a length
            for a circular convolution in one piece. direct: what a product of a tap costs of a number's
            stage; 0 never sums directly. rows: of the batch that one transform works on.
        length: take this one, whatever it costs (a prepared kernel's). longest: transform there is, None for any;
            it must hold the taps.
    """
    n, taps, b = call.x.shape[2], call.taps, call.x.shape[0]
    if not n:
        return Plan(shortest, 0, 1, taps)
    behind = call.before is not None or not call.causal
    lead = taps - 1 if behind else 0
    found: list[tuple[float, Plan]] = []

    def add(made: Plan) -> None:
        transforms = -(-b * made.windows(n) // rows)
        found.append((transforms * rows * made.length * (math.log2(made.length) + AROUND), made))

    if not call.causal and exact(n) and length in (None, n):
        add(Plan(n, 0, n, taps))
        if call.sparse:
            return found[0][1]
    size = shortest if length is None else length
    while True:
        if (length is None or size == length) and size >= taps:
            if size >= n + taps - 1:
                add(Plan(size, lead, n, taps))
            else:
                add(Plan(size, taps - 1, size - taps + 1, taps))
        if size >= n + taps - 1 or length is not None or size == longest:
            break
        size *= 2
    if direct:
        found.append((direct * b * n * taps, Plan(0, lead, n, taps)))
    return min(found, key=lambda one: one[0])[1]
