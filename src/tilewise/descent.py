"""Steps against a gradient, which all that is trained here shares: they can be interrupted, saved and resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Descent:
    """An optimiser's steps on a module and the losses they had; saved and loaded, it goes on bit for bit.

    Args:
        module: whose parameters are saved. optimiser: of those that are trained; its rates are the highest.
        clip: largest norm of the gradient; None leaves it.

    Attributes:
        losses: of all steps taken, those before a resumption included.
    """

    def __init__(
        self, module: nn.Module, optimiser: torch.optim.Optimizer, clip: float | None = None
    ) -> None:
        self.module, self.optimiser, self.clip = module, optimiser, clip
        self.rates = [group["lr"] for group in optimiser.param_groups]
        self.losses: list[float] = []

    def step(self, loss: Tensor, share: float = 1.0, shown: float | None = None) -> float:
        """Take one step, at `share` of the rates, and return its loss, or `shown` where another is to be kept.

        Raises FloatingPointError when the loss is not finite; the module is then as after the last good step.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {len(self.losses)} is {value}; try a smaller rate")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip is not None:
            held = [p for group in self.optimiser.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(held, self.clip)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimiser.step()
        self.losses.append(value if shown is None else shown)
        return self.losses[-1]

    def state_dict(self) -> dict[str, Any]:
        """With it a new `Descent` of the same arguments goes on."""
        return {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "losses": list(self.losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises RuntimeError or ValueError for another module's."""
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.losses[:] = state["losses"]


def cosine(done: float) -> float:
    """Half a wave from 1 to 0: the share of the first rate when this share of the steps is done."""
    return 0.5 + 0.5 * math.cos(math.pi * done)
