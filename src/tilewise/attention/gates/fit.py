"""Training small parts beside a frozen model: what its layers did is data, and only gates have gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tilewise.attention.gates.sizes import positive
from tilewise.attention.method import Method
from tilewise.descent import Descent, cosine

Lessons = Mapping[int, Any]


class Gates(nn.Module):
    """A trained part for each of some layers of a model.

    Args:
        by_layer: module by index of the layer; at least one, all of one kind and of one size.
    """

    def __init__(self, by_layer: Mapping[int, nn.Module]) -> None:
        super().__init__()
        if not by_layer or any(not isinstance(layer, int) or layer < 0 for layer in by_layer):
            raise ValueError(f"by_layer must map indices of layers >= 0 to modules, got {dict(by_layer)!r}")
        if len({(type(gate), str(_settings(gate))) for gate in by_layer.values()}) > 1:
            raise ValueError("by_layer must hold modules of one kind with the same settings")
        self.gates = nn.ModuleDict({str(layer): by_layer[layer] for layer in sorted(by_layer)})

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a gate, rising."""
        return tuple(int(layer) for layer in self.gates)

    def __getitem__(self, layer: int) -> Any:
        if str(layer) not in self.gates:
            raise ValueError(f"there are gates for the layers {list(self.layers)}, not for {layer!r}")
        return self.gates[str(layer)]

    def items(self) -> Iterator[tuple[int, Any]]:
        """Layer and gate, one after the other."""
        return ((int(layer), gate) for layer, gate in self.gates.items())

    def methods(self, make: Callable[..., Method], **settings: Any) -> dict[int, Method]:
        """A method for each layer, `make(gate, **settings)`: what `tilewise.patch` takes."""
        return {layer: make(gate, **settings) for layer, gate in self.items()}


def _settings(gate: nn.Module) -> Any:
    settings = getattr(gate, "settings", None)
    return settings() if callable(settings) else None


class Fit:
    """Training of gates on lessons, in a given number of steps; can be interrupted, saved and resumed.

    A step takes one lesson, adds up the loss of its layers and moves the gates by Adam, at a rate that falls to
    nothing along a cosine. Lessons are taken in an order drawn anew for each round from `seed`. Nothing but the
    gates is in the optimiser: no weight of the model is in reach.

    Args:
        gates: what is trained, in place.
        lessons: of one text each, a lesson by layer; made without gradient, once (such as `block_lesson`). Any
            sequence: one that makes its items when asked need not hold them all. Layers without a gate are left.
        loss: `loss(gate, lesson)`, a scalar. steps: in all. rate: of the first step. seed: of the order.
    """

    def __init__(
        self,
        gates: Gates,
        lessons: Sequence[Lessons],
        loss: Callable[[Any, Any], Tensor],
        *,
        steps: int,
        rate: float = 1e-2,
        seed: int = 0,
    ) -> None:
        positive(steps=steps)
        if not len(lessons):
            raise ValueError("lessons must hold at least one, got none")
        if not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise ValueError(f"rate must be a number > 0, got {rate!r}")
        self.gates, self.lessons, self.loss = gates, lessons, loss
        self.steps, self.seed = steps, seed
        self.descent = Descent(gates, torch.optim.Adam(gates.parameters(), lr=rate, betas=(0.9, 0.98)))

    @property
    def losses(self) -> list[float]:
        """Of all steps so far, means over layers."""
        return self.descent.losses

    def run(
        self, until: int | None = None, progress: Callable[[int, float], None] | None = None
    ) -> list[float]:
        """Take steps up to the number `until`, by default all; `progress(step, loss)` is called after each.

        Returns the losses of all steps so far, means over layers. Raises ValueError when a lesson has none of the
        layers, FloatingPointError when a loss is not finite; the gates are then as after the last good step.
        """
        for step in range(len(self.losses), self.steps if until is None else min(until, self.steps)):
            lesson = self.lessons[self._which(step)]
            layers = [layer for layer in self.gates.layers if layer in lesson]
            if not layers:
                raise ValueError(f"a lesson has none of the layers {list(self.gates.layers)}")
            with torch.enable_grad():
                total = torch.stack([self.loss(self.gates[layer], lesson[layer]) for layer in layers]).sum()
                mean = self.descent.step(
                    total, cosine(step / self.steps), float(total.detach()) / len(layers)
                )
            if progress is not None:
                progress(step, mean)
        return self.losses

    def _which(self, step: int) -> int:
        """The lesson of a step: every round has an order of its own."""
        turn, place = divmod(step, len(self.lessons))
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return int(torch.randperm(len(self.lessons), generator=g)[place])

    def state_dict(self) -> dict[str, Any]:
        """Gates, optimiser and what was found: with it a new `Fit` of the same arguments goes on bit for bit."""
        return self.descent.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.descent.load_state_dict(state)


def fit(
    gates: Gates,
    lessons: Sequence[Lessons],
    loss: Callable[[Any, Any], Tensor],
    *,
    steps: int,
    rate: float = 1e-2,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train gates in one go: `Fit(...).run(progress=progress)`, whose arguments these are. Returns the losses."""
    return Fit(gates, lessons, loss, steps=steps, rate=rate, seed=seed).run(progress=progress)
