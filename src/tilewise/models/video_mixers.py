"""Video models that mix tokens otherwise than by attention, and what may be inherited from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from tilewise.models.video import VideoModel
from tilewise.models.video_attention import by_layer
from tilewise.models.video_layers import Block

OF_ATTENTION = ("qkv", "proj", "q_scale", "k_scale")


def with_mixers(
    model: VideoModel, make: Callable[[Block], nn.Module], layers: Iterable[int] | None = None
) -> VideoModel:
    """A copy of a video model whose blocks mix tokens by other modules; everything else keeps its weights.

    Args:
        model: left as it was.
        make: `make(block)`, called with the model's own block, gives a module that is called with the tokens
            `[B, N, width]`, normed and modulated, and the grid (T, H, W), and gives `[B, N, width]`, what
            attention with its output layer did. `projections(block)` is what it may inherit.
        layers: whose attention is replaced; all when None. What the model's `attention` says of them is idle.

    Raises ValueError for layers that do not exist, TypeError when `make` gives no module.
    """
    chosen = sorted(set(range(len(model.blocks)) if layers is None else layers))
    by_layer(dict.fromkeys(chosen, "dense"), len(model.blocks))  # refuses layers that do not exist
    made = copy.deepcopy(model)
    for layer in chosen:
        mixer = make(cast(Block, model.blocks[layer]))
        if not isinstance(mixer, nn.Module):
            raise TypeError(f"make must give a torch.nn.Module, got {type(mixer).__name__}")
        block = made.blocks[layer]
        for name in OF_ATTENTION:
            delattr(block, name)
        block.mixer = mixer.train(model.training)
    return made


def projections(block: Block) -> dict[str, nn.Linear]:
    """A block's layers "query", "key", "value" and "out", copied."""
    made = {}
    weights, biases = block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)
    for name, weight, bias in zip(("query", "key", "value"), weights, biases):
        made[name] = _linear(weight, bias)
    return made | {"out": _linear(block.proj.weight, block.proj.bias)}


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made
