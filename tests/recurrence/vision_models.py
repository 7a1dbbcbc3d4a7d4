"""The small models that training/train_vision.py trains, by the names of their weights."""

from __future__ import annotations

from torch import nn

from tests.recurrence.pictures import GRID, Softmax, Transformer
from tilewise.recurrence import LINA, InLine, LiT

WIDTH, TOKENS = 32, GRID[0] * GRID[1]
# Mixers of the classifiers, and their perceptrons' width, which makes up for parameters within 1 %.
CLASSIFIERS = {
    "inline": (lambda: InLine(WIDTH, 2), 64),
    "inline-no-local": (lambda: InLine(WIDTH, 2, local=0), 147),
    "plain-linear": (lambda: LiT(WIDTH, 2, conv=0), 147),
}
DENOISERS = {
    "teacher": (lambda: Softmax(WIDTH, 4), 2),
    "lina": (lambda: LINA(WIDTH, 4, TOKENS), 1),
    "lina-subtract": (lambda: LINA(WIDTH, 4, TOKENS, normalize="subtract"), 1),
    "lina-no-conv": (lambda: LINA(WIDTH, 4, TOKENS, conv=0), 1),
    "lina-no-gate": (lambda: LINA(WIDTH, 4, gate=False), 1),
}


def classifier(name: str) -> nn.Module:
    make, hidden = CLASSIFIERS[name]
    return Transformer(make, WIDTH, hidden=hidden)


def denoiser(name: str, make=None) -> nn.Module:
    """`make` puts other mixers in."""
    mixer, channels = DENOISERS[name]
    return Transformer(make or mixer, WIDTH, layers=3, hidden=96, channels=channels)
