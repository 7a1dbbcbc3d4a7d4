"""What is measured on: the model, the tokens of the text, and facts about both and the machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewise.compare.settings import Settings
from tilewise.errors import UserError
from tilewise.machine import cpu_name
from tilewise.models import load_model

LONGEST = 8192  # tokens used when the caller does not say and the model's context is longer
PREVIEW = 240  # characters of the text shown on the page


@dataclass(frozen=True, eq=False)
class Material:
    """A loaded model and the tokens to run on.

    Attributes:
        tokens: int64 `[1, N]`. text: the characters they stand for. bytes_per_token: of this text.
        filler: ASCII text of the same kind, to hide things in.
    """

    model: Any
    tokenizer: Any
    tokens: Tensor
    text: str
    context: int
    bytes_per_token: float
    filler: bytes

    @property
    def device(self) -> torch.device:
        return self.tokens.device


def prepare(settings: Settings) -> Material:
    """Load the model and cut the text. Raises UserError when the text is too short or the context too small."""
    model, tokenizer = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    config = model.config.get_text_config()
    context = (
        getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or LONGEST
    )
    wanted = min(context, LONGEST) if settings.tokens is None else settings.tokens
    if wanted > context:
        raise UserError(f"tokens is {wanted}, but the model's context is {context}")
    text = read_text(settings.text)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    if ids.shape[1] < wanted:
        if settings.tokens is not None or ids.shape[1] < 128:
            raise UserError(
                f"the text has {ids.shape[1]} tokens, {max(wanted if settings.tokens else 128, 2)} are needed"
            )
        wanted = ids.shape[1]
    used = tokenizer.decode(ids[0, :wanted].tolist())
    size = len(text.encode())
    filler = " ".join(text.encode("ascii", "ignore").decode().split()).encode() or b"nothing to read here "
    return Material(
        model, tokenizer, ids[:, :wanted].to(model.device), used, context, size / ids.shape[1], filler
    )


def read_text(path: Path | None) -> str:
    """The text of a file, or the bundled sample. Raises UserError when it cannot be read as UTF-8."""
    if path is None:
        return resources.files("tilewise.data").joinpath("sample.txt").read_text(encoding="utf-8")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read text {str(path)!r}: {reason}") from error


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and versions, for the report."""
    import transformers

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": None if pages is None else round(pages / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def described(settings: Settings, material: Material) -> dict[str, Any]:
    """The settings as they came to be used, for the report."""
    config = material.model.config.get_text_config()
    heads = config.num_attention_heads
    return {
        "model": settings.model or "bundled",
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "context": material.context,
        "text": str(settings.text) if settings.text else "bundled sample",
        "text_preview": material.text[:PREVIEW],
        "tokens": material.tokens.shape[1],
        "dtype": settings.dtype,
        "seed": settings.seed,
        "repeats": settings.repeats,
        "warmup": 1,
        "threads": torch.get_num_threads(),
        "tasks": list(settings.tasks),
    }
