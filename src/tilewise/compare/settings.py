"""What a comparison is asked to do, checked before anything is measured."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tilewise.attention import as_method
from tilewise.compare.catalogue import Choice, choose, everything, label
from tilewise.errors import UserError
from tilewise.models.recipes import is_recipe, read_recipe

TASKS = ("perplexity", "recall", "passkey")
METHODS = ("sage2", "sink-window", "moba", "xattention", "pbs", "flexprefill")  # what runs when nobody says
ALL = "all"


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Args:
        model: a directory, a hub id, or None for the bundled model. text: a file, or None for the bundled sample.
        tokens: tokens of the text to run on; None is the model's context, at most 8,192.
        methods: names, each with settings if wanted ("moba:block=64:top_k=4"), recipe files that `tilewise tune`
            wrote, or files of gates that `save_gates` wrote ("gates.safetensors:top_k=16", or with the name of what
            they serve, "seer-attention:gates=FILE"); "all" stands for everything that has a name here, and with the
            bundled model for what its gates serve. dense always runs first.
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
        bundled = self.model is None
        for text in self.methods:
            if text == ALL:
                chosen |= {name: m for name, m in everything(bundled).items() if name not in chosen}
            elif is_recipe(text):
                chosen[label(text)] = read_recipe(text)
            else:
                chosen[label(text)] = choose(text, bundled)
        return chosen


def check_writable(path: Path) -> None:
    """Raise UserError unless a file can be written at `path`; leaves what is there untouched."""
    if path.is_dir():
        raise UserError(f"output {str(path)!r} is a directory; give a file")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
