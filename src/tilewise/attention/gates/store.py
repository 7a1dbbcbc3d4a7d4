"""Gates as a header and named weights, and back: what a file of them holds. Files are read in `tilewise.models`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tilewise.attention.gates.block_gate import BlockGate
from tilewise.attention.gates.boundary import BoundaryPredictor
from tilewise.attention.gates.chunks import ChunkAdapters
from tilewise.attention.gates.fit import Gates
from tilewise.attention.recipes.sla import SLA
from tilewise.attention.recipes.spt import SPT

KINDS: dict[str, type[nn.Module]] = {
    kind.kind: kind for kind in (BlockGate, BoundaryPredictor, ChunkAdapters, SLA, SPT)
}


def describe(gates: Gates) -> dict[str, Any]:
    """The header: kind, layers and settings, all plain numbers and texts. Raises ValueError for unknown modules."""
    gate: Any = gates[gates.layers[0]]
    kind = next((name for name, known in KINDS.items() if isinstance(gate, known)), None)
    if kind is None:
        raise ValueError(
            f"gates must be of {', '.join(k.__name__ for k in KINDS.values())}, got {type(gate).__name__}"
        )
    return {"kind": kind, "layers": list(gates.layers), "settings": gate.settings()}


def rebuild(header: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Gates:
    """Gates from what `describe` and `Gates.state_dict` gave.

    Raises ValueError for an unknown kind, for settings that are none, and for weights that are missing, too many or
    of other sizes, naming them.
    """
    kind = KINDS.get(str(header.get("kind")))
    layers, settings = header.get("layers"), header.get("settings")
    if kind is None or not isinstance(layers, list) or not isinstance(settings, Mapping):
        raise ValueError(
            f"kind must be one of {', '.join(KINDS)}, with layers and settings, got {dict(header)!r}"
        )
    try:
        gates = Gates({int(layer): kind(**settings) for layer in layers})
    except TypeError as error:
        raise ValueError(f"the settings are not those of {kind.__name__}: {error}") from error
    want = {name: tuple(x.shape) for name, x in gates.state_dict().items()}
    have = {name: tuple(x.shape) for name, x in weights.items()}
    for what, names in (
        ("lack", want.keys() - have.keys()),
        ("have beside what is known", have.keys() - want.keys()),
    ):
        if names:
            raise ValueError(f"the weights {what} {', '.join(sorted(names))}")
    for name, shape in want.items():
        if have[name] != shape:
            raise ValueError(f"{name} is {list(have[name])}, the settings say {list(shape)}")
    gates.load_state_dict({name: x.float() for name, x in weights.items()})
    return gates


def fit_to(gates: Gates, layers: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError unless gates suit a model of these sizes, naming the first that differs."""
    if gates.layers[-1] >= layers:
        raise ValueError(f"there is a gate for layer {gates.layers[-1]}, the model has {layers} layers")
    gate = gates[gates.layers[0]]
    for name, have in (("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if (want := getattr(gate, name, have)) != have:
            raise ValueError(f"the gates are for {name} {want}, the model has {have}")
