"""Files of gates: safetensors with a small header; the gates of the bundled model, and the methods they serve."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

import tilewise.recurrence  # noqa: F401  its layers make themselves known to `rebuild`
from tilewise import papers
from tilewise.attention import Method
from tilewise.attention.gates import Gates
from tilewise.attention.gates.store import describe, fit_to, rebuild
from tilewise.errors import UserError
from tilewise.models.load import bundled_model, check_device
from tilewise.models.recipes import ModelRecipe

# The kinds of gates by what their files say: the method they serve, as the register knows it, and its settings
# where its paper leaves them to the user.
SERVES: dict[str, tuple[str, dict[str, Any]]] = {
    "block": ("seer-attention", {"top_k": 8}),
    "boundary": ("dhsa", {}),
    "chunk": ("chunk-llm", {}),
    "linear": ("sla", {}),
    "codes": ("spt", {}),
    "lawcat": ("lawcat", {}),
}


def gated_names() -> tuple[str, ...]:
    """The methods that read by trained gates, as the register knows them."""
    return tuple(name for name, _ in SERVES.values())


def serves(gates: Gates) -> str:
    """The method that gates are for, as the register knows it."""
    return SERVES[describe(gates)["kind"]][0]


def bundled_gates(name: str) -> Path:
    """The file of the gates that come with the bundled model for a method of `gated_names`."""
    if name not in gated_names():
        raise ValueError(f"name must be one of {', '.join(gated_names())}, got {name!r}")
    return bundled_model() / f"{name}.safetensors"


def gated(gates: Gates, **settings: Any) -> ModelRecipe:
    """The method that gates serve, in every layer that has one.

    `settings` are the method's, the same for all layers; without any, its paper's. Raises ValueError for settings
    that it does not have or does not take.
    """
    name, defaults = SERVES[describe(gates)["kind"]]
    if hasattr(gates[gates.layers[0]], "method"):
        made = {layer: gate.method() for layer, gate in gates.items()}
    else:
        kind = cast("type[Method]", papers.resolve(papers.find(name)))
        made = {layer: kind(gate, **defaults) for layer, gate in gates.items()}  # type: ignore[call-arg]
    known = _settings(next(iter(made.values())))
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"the settings of {name} are {', '.join(known)}, got {', '.join(unknown)}")
    # Of two settings that exclude each other the default gives way.
    instead = {"top_k": None} if "threshold" in settings and defaults else {}
    try:
        made = {layer: dataclasses.replace(m, **instead | settings) for layer, m in made.items()}
    except TypeError as error:
        raise ValueError(f"{name} does not take these settings: {error}") from error
    decodes = all("decode" in method.modes for method in made.values())
    return ModelRecipe(None, made, decodes=decodes)


def _settings(method: Method) -> list[str]:
    """The settings that may be given by hand: those that hold no trained part, no state and no order of tokens."""
    plain = (bool, int, float, str, tuple, type(None))
    return sorted(
        f.name
        for f in dataclasses.fields(method)  # type: ignore[arg-type]
        if f.repr and f.name != "value_dim" and isinstance(getattr(method, f.name), plain)
    )


def load_gates(
    path: str | Path | None = None, *, model: PreTrainedModel | None = None, device: str = "cpu"
) -> Gates:
    """Trained gates, float32, without gradients.

    Args:
        path: a safetensors file as `save_gates` writes it; without one, SeerAttention's gates for the bundled
            model, trained with tiles of 64 bytes (`training/train_gates.py`); `bundled_gates` names its others.
        model: checked to have the layers, heads and head_dim that the gates are for; None checks nothing.
        device: where to hold them.

    Raises UserError when the file is missing, is no safetensors, does not hold gates or not all of their weights,
    or when they do not fit the model.
    """
    from safetensors import SafetensorError, safe_open

    place = check_device(device)
    path = bundled_gates("seer-attention") if path is None else Path(path)
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
