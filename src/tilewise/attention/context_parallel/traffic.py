"""What ranks send one another: the messages themselves, and their count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

WAYS = {1: "up", -1: "down"}


class Message(NamedTuple):
    """One tensor that this rank sent.

    Attributes:
        phase: "forward" or "backward" of the operator.
        step: number of the exchange in its phase; what has the same number travels at the same time.
        kind: what it holds: "q", "k", "v", "out", "lse", "d_q", ..., or "sizes".
        source, target: ranks in the group; -1 is everybody.
        way: "up" towards higher ranks around the ring, "down" the other way, "all" for what goes to everybody.
        bytes: its size.
    """

    phase: str
    step: int
    kind: str
    source: int
    target: int
    way: str
    bytes: int


@dataclass
class Traffic:
    """What one rank sent and computed, entered by the code that sends and computes.

    Give one to `context_parallel_attend`; it is filled in by the call and, later, by its backward pass.

    Attributes:
        messages: everything sent, in order.
        scores: scores computed by this rank's forward pass, summed over batch and heads; whole tiles, as the
            kernel computes them (see `TileMap.cost`).
    """

    messages: list[Message] = field(default_factory=list)
    scores: int = 0

    def bytes(
        self,
        *,
        phase: str | None = None,
        step: int | None = None,
        kind: str | None = None,
        way: str | None = None,
        target: int | None = None,
    ) -> int:
        """Bytes sent, of the messages that fit all that is given."""
        wanted = {"phase": phase, "step": step, "kind": kind, "way": way, "target": target}
        asked = {name: value for name, value in wanted.items() if value is not None}
        return sum(
            m.bytes for m in self.messages if all(getattr(m, name) == value for name, value in asked.items())
        )

    def steps(self, phase: str = "forward") -> list[int]:
        """Numbers of the exchanges in which this rank sent something to another rank."""
        return sorted({m.step for m in self.messages if m.phase == phase and m.way != "all"})

    def __str__(self) -> str:
        lines = ["phase     step         up       down  holding"]
        for phase in ("forward", "backward"):
            for step in self.steps(phase):
                up, down = (self.bytes(phase=phase, step=step, way=way) for way in ("up", "down"))
                kinds = [
                    m.kind for m in self.messages if (m.phase, m.step) == (phase, step) and m.way != "all"
                ]
                lines.append(f"{phase:8} {step:5} {up:10} {down:10}  {', '.join(dict.fromkeys(kinds))}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Ring:
    """The ranks of a group, each with a next and a previous one."""

    group: Any
    rank: int
    ranks: int
    traffic: Traffic | None

    def at(self, offset: int) -> int:
        """The rank `offset` places up from this one."""
        return (self.rank + offset) % self.ranks

    def exchange(self, phase: str, step: int) -> Exchange:
        """A new exchange of messages."""
        return Exchange(self, phase, step)


class Exchange:
    """Messages that travel at the same time: name them, `post` them, compute, then `wait`.

    All ranks name the messages between two of them in the same order. Empty ones are never sent.
    """

    def __init__(self, ring: Ring, phase: str, step: int) -> None:
        self.ring, self.phase, self.step = ring, phase, step
        self._ops: list[dist.P2POp] = []
        self._works: list[Any] = []

    def send(self, tensors: Mapping[str, Tensor], target: int, way: int) -> None:
        """Send these tensors to a rank of the group; `way` is +1 for up and -1 for down."""
        for kind, tensor in tensors.items():
            if not tensor.numel():
                continue
            self._add(dist.isend, tensor.contiguous(), target)
            if self.ring.traffic is not None:
                size = tensor.numel() * tensor.element_size()
                message = Message(self.phase, self.step, kind, self.ring.rank, target, WAYS[way], size)
                self.ring.traffic.messages.append(message)

    def receive(self, tensors: Mapping[str, Tensor], source: int) -> None:
        """Fill these tensors with what the rank `source` sends."""
        for tensor in tensors.values():
            if tensor.numel():
                self._add(dist.irecv, tensor, source)

    def post(self) -> None:
        """Start everything; returns at once."""
        if self._ops:
            self._works = dist.batch_isend_irecv(self._ops)

    def wait(self) -> None:
        """Wait until everything sent has left and everything expected is here."""
        for work in self._works:
            work.wait()
        self._ops.clear()

    def _add(self, op, tensor: Tensor, peer: int) -> None:
        self._ops.append(dist.P2POp(op, tensor, group=self.ring.group, group_peer=peer))


def gather_sizes(numbers: list[int], ring: Ring, device: torch.device | str) -> list[list[int]]:
    """What every rank wrote in `numbers` (as many on each), by rank."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(ring.ranks)]
    dist.all_gather(everyone, mine, group=ring.group)
    if ring.traffic is not None:
        size = mine.numel() * mine.element_size()
        ring.traffic.messages.append(Message("forward", -1, "sizes", ring.rank, -1, "all", size))
    return [x.tolist() for x in everyone]
