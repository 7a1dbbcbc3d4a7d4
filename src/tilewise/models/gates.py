"""Files of gates: safetensors with a small header, and the gates that come with the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tilewise.attention.gates import Gates
from tilewise.attention.gates.store import describe, fit_to, rebuild
from tilewise.errors import UserError


def load_gates(
    path: str | Path | None = None, *, model: PreTrainedModel | None = None, device: str = "cpu"
) -> Gates:
    """Trained gates, float32, without gradients.

    Args:
        path: a safetensors file as `save_gates` writes it; without one, SeerAttention's gates for the bundled
            model, trained with tiles of 64 bytes (`training/train_gates.py`).
        model: checked to have the layers, heads and head_dim that the gates are for; None checks nothing.
        device: where to hold them.

    Raises UserError when the file is missing, is no safetensors, does not hold gates or not all of their weights,
    or when they do not fit the model.
    """
    from safetensors import SafetensorError, safe_open

    from tilewise.models.load import bundled_model, check_device

    place = check_device(device)
    path = bundled_model() / "seer.safetensors" if path is None else Path(path)
    if not path.is_file():
        raise UserError(f"gates {str(path)!r} do not exist")
    try:
        with safe_open(path, framework="pt") as stored:
            header = json.loads((stored.metadata() or {})["gates"])
            gates = rebuild(header, {name: stored.get_tensor(name) for name in stored.keys()})
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{str(path)!r} does not hold gates: {error}") from error
    if model is not None:
        try:
            fit_to(gates, *_sizes(model))
        except ValueError as error:
            raise UserError(f"gates {str(path)!r} do not fit this {type(model).__name__}: {error}") from error
    return gates.to(place).requires_grad_(False).eval()


def save_gates(gates: Gates, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the weights, rounded to `dtype`, and the sizes as one safetensors file that `load_gates` reads."""
    from safetensors.torch import save_file

    weights = {
        name: value.detach().to("cpu", dtype).contiguous() for name, value in gates.state_dict().items()
    }
    save_file(weights, path, {"gates": json.dumps(describe(gates))})


def _sizes(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """Layers, query heads, kv heads and head_dim."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, heads, kv_heads, head_dim
