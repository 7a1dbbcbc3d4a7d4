"""The operators that training/train_operators.py trains on flows, by the names of their weights, and what is
asked."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tilewise.convolution import AFNO, FNO, T1
from tilewise.convolution.spectral.fno import with_places

WEIGHTS = Path(__file__).parent / "weights"
BRIEF = (1, 2)  # seeds
SIDE, SEED = 32, 1 << 20  # of test fields; training draws from seeds far below


class AFNONet(nn.Module):
    """AFNO in place of an FNO's layers: patches of 2 x 2, blocks with a perceptron each, patches back."""

    def __init__(self, width: int = 48, layers: int = 4, groups: int = 4, modes: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "mix": AFNO(width, groups, modes=modes),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.back = nn.ConvTranspose2d(width, 1, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(with_places(x, 1))
        sides = z.shape[2:]
        z = z.flatten(2).mT
        for block in self.blocks:
            normed = block["norm"](z)
            z = z + normed + block["mix"](normed, tuple(sides))
            z = z + block["down"](nn.functional.gelu(block["up"](block["norm2"](z))))
        return self.back(z.mT.unflatten(2, tuple(sides)))


class Local(AFNONet):
    """The same network with nothing in place of AFNO: patches see themselves alone."""

    def __init__(self) -> None:
        super().__init__(width=52)
        for block in self.blocks:
            block["mix"] = Nothing()


class Nothing(nn.Module):
    def forward(self, x: Tensor, grid: object) -> Tensor:
        return torch.zeros_like(x)


OPERATORS = {
    "fno": lambda: FNO(width=12, modes=6, layers=4),
    "t1": lambda: T1(transform="fourier", init="plain"),
    "afno": lambda: AFNONet(),
    "afno-none": lambda: Local(),
}
# Half a minute of training each, by name and seed.
OPERATORS |= {f"{name}-brief-{seed}": OPERATORS[name] for name in ("fno", "t1") for seed in BRIEF}


def seeded(name: str) -> tuple[str, int]:
    """A name without its seed, and that seed, 0 where it says none."""
    kind, _, seed = name.rpartition("-")
    return (kind, int(seed)) if seed.isdigit() else (name, 0)


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def relative(found: Tensor, want: Tensor) -> Tensor:
    """Norm of the error over that of the answer, mean over fields."""
    return ((found - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)).mean()


def load(name: str) -> nn.Module:
    model = OPERATORS[name]()
    found = load_file(WEIGHTS / f"operator-{name}.safetensors")
    model.load_state_dict({key: x.float() for key, x in found.items()})
    return model.eval().requires_grad_(False)


@cache
def held_out(n: int = SIDE, count: int = 100) -> tuple[Tensor, Tensor]:
    """Fresh fields and what the solver makes of them."""
    from training.navier_stokes import pairs

    return pairs(count, SEED, n)


@torch.no_grad()
def error(model: nn.Module, n: int = SIDE) -> float:
    fields, later = held_out(n)
    return float(relative(model(fields), later))
