"""Swapping a pretrained model's attention for a method, within a block."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tilewise.attention import Method, as_method
from tilewise.errors import UserError
from tilewise.models.bridge import Bridge, Event
from tilewise.models.recipes import ModelRecipe, is_recipe, read_recipe
from tilewise.models.registering import registered

_numbers = itertools.count()


@contextmanager
def patch(
    model: PreTrainedModel,
    attention: Method | str | os.PathLike[str] | ModelRecipe | Mapping[int, Method | str],
    *,
    decode: Method | str | ModelRecipe | Mapping[int, Method | str] = "dense",
    layers: Iterable[int] | None = None,
    engine: str = "auto",
    check: bool = True,
    observer: Callable[[Event], None] | None = None,
) -> Iterator[Bridge]:
    """Use `attention` in a Hugging Face causal language model inside the `with` block.

    Only this instance is changed, through transformers' attention and mask interfaces; on leaving, its
    configuration is what it was and its outputs are bit for bit what they were.

    Args:
        model: any model whose attention goes through the attention interface.
        attention: a method for prompts (calls of several queries), or a mapping from layer index to method,
            or a recipe for the whole model, itself or the file it is in (a path, or a text that ends in .json).
        decode: the method for calls of one query, in the layers that are changed, or a mapping from layer index to
            method, or a recipe, other layers being dense. A method that carries a state (`Method.carry`) has one in
            each layer, from the prompt that was read last in this block.
        layers: indices of the layers to change, all when None; the others stay dense.
        engine: as in `attend`.
        check: run the leak check: changing later tokens must leave earlier logits as they are. Two short
            forward passes. Methods that choose tiles by looking ahead are checked with their choice held.
        observer: called with an `Event` after every attention call.

    Yields:
        The `Bridge`, whose `observer` may be set or cleared inside the block.

    Raises:
        TypeError: not a transformers model.
        UserError: (a ValueError) the model's attention cannot be swapped, is already patched, a layer index does
            not exist, a method is unknown or does not decode, a recipe is missing, damaged or for another number of
            layers, or the leak check failed.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if not model._can_set_attn_implementation():
        raise UserError(
            f"the attention of {type(model).__name__} does not go through the attention interface"
        )
    configs: list[Any] = list(
        {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    )
    if any(str(config._attn_implementation).startswith("tilewise:patch") for config in configs):
        raise UserError(f"this {type(model).__name__} is already patched; leave that block first")
    bridge = Bridge(_per_layer(model, attention, layers), _decoders(model, decode), engine)
    name = f"tilewise:patch-{next(_numbers)}"
    before = [(config, config._attn_implementation_internal) for config in configs]
    with registered(name, bridge):
        try:
            for config, _ in before:
                config._attn_implementation_internal = name
            if check:
                check_leak(model, bridge)
            bridge.observer = observer
            yield bridge
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation


def check_leak(model: PreTrainedModel, bridge: Bridge, seed: int = 0) -> None:
    """Raise UserError when changing later tokens changes earlier logits of the patched model.

    Methods with a lookahead keep the plan of the unchanged tokens: the check is of values and masks, the
    lookahead of the choice is the method's declared property.
    """
    context = getattr(model.config, "max_position_embeddings", None) or 256
    n = min(256, context)
    keep = n // 2
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, (2, n), generator=generator)
    tokens[1, :keep] = tokens[0, :keep]
    methods = bridge.prefill.values() if isinstance(bridge.prefill, Mapping) else [bridge.prefill]
    hold = any(method.lookahead != "none" for method in methods)
    modes = {module: module.training for module in model.modules()}
    observer, bridge.observer = bridge.observer, None
    bridge.plans = {} if hold else None
    model.eval()
    try:
        first, second = (_logits(model, row.unsqueeze(0))[:, :keep] for row in tokens)
    finally:
        bridge.plans, bridge.observer = None, observer
        bridge.states.clear()
        for module, training in modes.items():
            module.training = training
    if not torch.equal(first, second):
        worst = float((first - second).abs().max())
        raise UserError(
            f"leak check failed for {type(model).__name__}: changing tokens from {keep} on changed earlier logits"
            f" by up to {worst:.3g}; this model's masks do not reach the attention (check=False skips this check)"
        )


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens.to(model.device), use_cache=False).logits


def _per_layer(model: PreTrainedModel, attention, layers: Iterable[int] | None) -> dict[int, Method]:
    count = model.config.get_text_config().num_hidden_layers
    if is_recipe(attention):
        attention = read_recipe(attention)
    if isinstance(attention, ModelRecipe):
        if attention.layers not in (None, count):
            raise UserError(f"the recipe is for a model of {attention.layers} layers, this one has {count}")
        attention = attention.methods
    if not isinstance(attention, Mapping):
        attention = dict.fromkeys(range(count) if layers is None else layers, attention)
    elif layers is not None:
        attention = {layer: attention[layer] for layer in layers if layer in attention}
    for layer in attention:
        if not isinstance(layer, int) or not 0 <= layer < count:
            raise UserError(f"layers must be indices in 0..{count - 1}, got {layer!r}")
    return {layer: _method(method) for layer, method in attention.items()}


def _method(method: Method | str) -> Method:
    try:
        return as_method(method)
    except ValueError as error:
        raise UserError(str(error)) from error


def _decoders(model: PreTrainedModel, decode: Any) -> dict[int, Method] | Method:
    if not isinstance(decode, (Mapping, ModelRecipe)):
        return _decoder(decode)
    return {layer: _decoder(method) for layer, method in _per_layer(model, decode, None).items()}


def _decoder(method: Method | str) -> Method:
    chosen = _method(method)
    if "decode" not in chosen.modes:
        raise UserError(f"{chosen.name or chosen} does not decode; it supports {', '.join(chosen.modes)}")
    return chosen
