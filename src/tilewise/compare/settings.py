"""What a comparison is asked to do, checked before anything is measured."""

from __future__ import annotations

import ast
import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewise import papers
from tilewise.attention import Method, as_method, named
from tilewise.attention.written import check_plans
from tilewise.errors import UserError
from tilewise.models.gates import load_gates
from tilewise.models.recipes import ModelRecipe, is_recipe, read_recipe

TASKS = ("perplexity", "recall", "passkey")
METHODS = ("sage2", "sink-window", "moba", "xattention", "pbs", "flexprefill")  # what runs when nobody says
ALL = "all"
GATED = "seer-attention"  # no name as a method: it needs gates, which only the bundled model brings
Choice = Method | ModelRecipe


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Args:
        model: a directory, a hub id, or None for the bundled model. text: a file, or None for the bundled sample.
        tokens: tokens of the text to run on; None is the model's context, at most 8,192.
        methods: names, each with settings if wanted ("moba:block=64:top_k=4"), or recipe files that
            `tilewise tune` wrote; "all" stands for every name, and for the gates that come with the bundled model.
            dense always runs first.
        device, dtype: where and how the model is held. tasks: of TASKS.
        out, json: the page and the file to write; None writes none. seed: of tasks and everything random.
        repeats: timed rounds per method, after one that is not timed.
    """

    model: str | None = None
    text: Path | None = None
    tokens: int | None = None
    methods: tuple[str, ...] = METHODS
    device: str = "cpu"
    dtype: str = "float32"
    tasks: tuple[str, ...] = TASKS
    out: Path | None = None
    json: Path | None = None
    seed: int = 0
    repeats: int = 3

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise UserError(f"tasks must be of {', '.join(TASKS)}, got {', '.join(unknown) or 'none'}")
        if self.tokens is not None and self.tokens < 2:
            raise UserError(f"tokens must be at least 2, got {self.tokens}")
        for path in (self.out, self.json):
            if path is not None:
                check_writable(Path(path))
        if self.out is not None and self.out == self.json:
            raise UserError(f"the page and the JSON need a file each, got {str(self.out)!r} for both")

    def configured(self) -> dict[str, Choice]:
        """The methods by the name given, dense first. Raises UserError for unknown names and bad settings."""
        chosen: dict[str, Choice] = {"dense": as_method("dense")}
        for text in self.methods:
            if text == ALL:
                chosen |= {name: as_method(name) for name in named() if name not in chosen}
                if self.model is None:
                    chosen[GATED] = gated()
            elif text == GATED:
                if self.model is not None:
                    raise UserError(
                        f"{GATED} needs gates trained for this model; those at hand are the bundled model's"
                    )
                chosen[GATED] = gated()
            elif is_recipe(text):
                chosen[Path(text).stem] = read_recipe(text)
            else:
                chosen[text] = parse_method(text)
        return chosen


def gated() -> ModelRecipe:
    """SeerAttention by the bundled model's own gates, eight tiles of 64 in each row."""
    methods = load_gates().methods(papers.resolve(papers.find(GATED)), top_k=8)
    return ModelRecipe(max(methods) + 1, methods)


def parse_method(text: str) -> Method:
    """A method from "name" or "name:setting=value:setting=value"."""
    name, *pairs = text.split(":")
    try:
        method = as_method(name)
        if not pairs:
            return method
        fields = {f.name for f in dataclasses.fields(method)}  # type: ignore[arg-type]
        given: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if key not in fields or not equals:
                raise ValueError(f"its settings are {', '.join(sorted(fields)) or 'none'}, got {pair!r}")
            given[key] = _value(value)
        method = dataclasses.replace(method, **given)  # type: ignore[type-var]
        check_plans(method)
        return method
    except (ValueError, TypeError, ArithmeticError) as error:
        prefix = f"method {text!r}: " if pairs else ""
        raise UserError(prefix + str(error)) from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # the method says what it accepts instead


def check_writable(path: Path) -> None:
    """Raise UserError unless a file can be written at `path`; leaves what is there untouched."""
    if path.is_dir():
        raise UserError(f"output {str(path)!r} is a directory; give a file")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
