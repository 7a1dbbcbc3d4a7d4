"""Which method each layer of a model uses, as a file that `patch` and `tilewise compare` take."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tilewise.attention import Method, as_data, from_data
from tilewise.attention.method import LOOKAHEADS, MODES
from tilewise.attention.written import check_plans
from tilewise.errors import UserError
from tilewise.files import write_text
from tilewise.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class ModelRecipe:
    """A method for each layer of a model; layers that are not named stay dense.

    Args:
        layers: how many layers the model has; None for any model with the layers that are named.
        methods: by layer index.
        about: what the recipe was made with and what it was found to do, as plain data; kept in the file.
        decodes: whether it is meant for calls of one query as well; `tilewise compare` then decodes with it.

    Raises ValueError for a count below 1 and for layers outside the model.
    """

    layers: int | None
    methods: Mapping[int, Method]
    about: Mapping[str, Any] = field(default_factory=dict)
    decodes: bool = False
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.layers is None:
            return
        if not isinstance(self.layers, int) or isinstance(self.layers, bool) or self.layers < 1:
            raise ValueError(f"layers must be an integer >= 1, got {self.layers!r}")
        outside = [layer for layer in self.methods if not 0 <= layer < self.layers]
        if outside:
            raise ValueError(f"methods must be for layers 0..{self.layers - 1}, got {outside[0]}")

    @property
    def modes(self) -> tuple[str, ...]:
        """What every layer's method can do; decoding stays dense unless the recipe is meant for it."""
        wanted = [mode for mode in MODES if mode != "decode" or self.decodes]
        return tuple(mode for mode in wanted if all(mode in m.modes for m in self.methods.values()))

    @property
    def reads(self) -> str:
        return "; ".join(dict.fromkeys(method.reads for method in self.methods.values())) or "nothing"

    @property
    def needs(self) -> str:
        """What its methods need; those that need nothing have been searched for."""
        wanted = dict.fromkeys(m.needs for m in self.methods.values() if m.needs != "nothing")
        return "; ".join(wanted) or "a search"

    @property
    def lookahead(self) -> str:
        """The farthest look of its methods."""
        return max((m.lookahead for m in self.methods.values()), key=LOOKAHEADS.index, default="none")

    def parameters(self) -> dict[str, Any]:
        """The methods, for reports: as plain data where they can be written, else in words."""
        return {str(layer): _shown(method) for layer, method in sorted(self.methods.items())}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all. Raises TypeError for methods that hold trained weights, ValueError
        without a number of layers."""
        if self.layers is None:
            raise ValueError("layers must be the number of the model's layers to write a recipe")
        data = {
            "tilewise": __version__,
            "format": FORMAT,
            "layers": self.layers,
            "methods": {str(layer): as_data(method) for layer, method in sorted(self.methods.items())},
            "about": dict(self.about),
            **({"decodes": True} if self.decodes else {}),
        }
        write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", path)


def _shown(method: Method) -> Any:
    try:
        return as_data(method)
    except TypeError:  # it holds trained weights
        return type(method).__name__


def read_recipe(path: str | os.PathLike[str]) -> ModelRecipe:
    """The recipe in a file. Raises UserError when there is none, or it is not one that this version understands."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read recipe {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"recipe {str(path)!r} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} is no recipe of format {FORMAT}; `tilewise tune` writes one")
    try:
        methods = {int(layer): from_data(method) for layer, method in data["methods"].items()}
        for method in methods.values():
            check_plans(method)
        recipe = ModelRecipe(data["layers"], methods)
        about, decodes = dict(data.get("about", {})), bool(data.get("decodes", False))
        return dataclasses.replace(recipe, about=about, decodes=decodes)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"recipe {str(path)!r} is damaged: {error}") from error


def is_recipe(name: object) -> bool:
    """Whether a method was given as a recipe's file."""
    return isinstance(name, os.PathLike) or (isinstance(name, str) and name.endswith(".json"))
