"""Loading models: local directories or hub ids, safetensors only, never code."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tilewise.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bundled_model() -> Path:
    """The directory of the small byte-level model that comes with the package."""
    return Path(__file__).parent / "bundled"


def load_model(
    name: str | Path | None = None, *, device: str = "cpu", dtype: str = "float32"
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode and its tokenizer.

    Args:
        name: a directory, a hub id, or None for the bundled model. device, dtype: where and how to hold it.

    Raises:
        UserError: unknown dtype, a device that is not there, a directory that is missing or incomplete, weights
        that are not safetensors (nothing is ever unpickled) or do not fit the model, a model that needs its own
        code (never run).
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = check_device(device)
    path = bundled_model() if name is None else Path(name)
    local = path.is_dir()
    if local:
        _check_directory(path)
    elif name is not None and (str(name).startswith((".", "/", "~")) or path.exists()):
        raise UserError(
            f"model directory {str(name)!r} does not exist; give a directory with config.json or a hub id"
        )
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(path) if local else str(name)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    wrong_value = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)
    try:
        with _silence():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            # Without these two, weights that are missing or misshapen would be random, with a warning at most.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (*wrong_value, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load model {source!r}: {_reason(error)}") from error
    model, found = loaded
    for kind in ("missing", "mismatched"):
        if names := sorted(str(key if kind == "missing" else key[0]) for key in found[f"{kind}_keys"]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            does = "lack" if kind == "missing" else "do not fit the model at"
            raise UserError(f"cannot load model {source!r}: its weights {does} {names[0]}{more}")
    return model.to(place).eval(), tokenizer


@contextmanager
def _silence() -> Iterator[None]:
    """No bars and no advice from transformers: loading is a moment here, and what is wrong is said in one line."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):  # transformers offers to run it, tilewise never does
        return "it needs code of its own, which is never run; give a model of an architecture in transformers"
    return textwrap.shorten(str(error), 240) or type(error).__name__


def check_device(device: str) -> torch.device:
    """The device, if it is there. Raises UserError naming what is."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device must be like cpu, cuda or cuda:1, got {device!r}") from error
    there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    wanted = f"cuda:{place.index or 0}" if place.type == "cuda" else str(place)
    if wanted not in there:
        raise UserError(f"device {device!r} is not on this machine; there is {', '.join(there)}")
    return place


def _check_directory(path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise UserError(f"{str(path)!r} is no model directory: config.json is missing")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(config)!r} is not valid JSON: {error}") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise UserError(f"{str(config)!r} does not name a model_type")
    if not any(path.glob("*.safetensors")):
        others = ", ".join(
            sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern))
        )
        found = f"found only {others}, which are never unpickled" if others else "found none"
        raise UserError(f"{str(path)!r} needs weights as *.safetensors; {found}")
