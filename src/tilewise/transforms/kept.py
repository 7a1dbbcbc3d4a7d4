"""Constant tensors (matrices, orders) made once and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def kept(make: Callable[..., Tensor], *arguments: object) -> Tensor:
    """What `make(*arguments)` gives, made once for hashable arguments; never to be written to.

    In torch.compile it is made in the graph, where the compiler folds or moves it as it likes.
    """
    return make(*arguments) if torch.compiler.is_compiling() else _made(make, *arguments)


@lru_cache(maxsize=128)
def _made(make: Callable[..., Tensor], *arguments: object) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could never be saved for a backward pass
        return make(*arguments)
