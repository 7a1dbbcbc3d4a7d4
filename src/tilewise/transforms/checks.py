"""Arguments of transforms, checked in one place."""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("backward", "ortho", "forward")
ORDERS = ("natural", "bit-reversed")


def check_dim(x: Tensor, dim: int, *, is_complex: bool = False) -> int:
    """The size of `x` along `dim`.

    Raises TypeError where `x` is no floating tensor (complex ones pass where `is_complex`), ValueError where
    it has no such dimension or none of its numbers lies along it.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not (x.is_floating_point() or (is_complex and x.is_complex())):
        kinds = "floating or complex" if is_complex else "floating"
        raise TypeError(f"x must be of a {kinds} dtype, got {x.dtype}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be in {-x.ndim}..{x.ndim - 1} for x of shape {list(x.shape)}, got {dim}")
    if x.shape[dim] == 0:
        raise ValueError(f"x must have a number along dim {dim}, got shape {list(x.shape)}")
    return x.shape[dim]


def check_choice(name: str, value: object, accepted: tuple[object, ...]) -> None:
    """Raises ValueError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def widened(x: Tensor) -> Tensor:
    """`x` in a format that PyTorch's FFT takes on every device: float32 for float16 and bfloat16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def nothing(x: Tensor, dim: int, size: int, dtype: torch.dtype) -> Tensor:
    """What a transform of no rows gives: `x`'s shape with `size` along `dim`, no numbers, differentiable.

    PyTorch's FFT takes no empty batch on CPUs: MKL refuses the plan.
    """
    shape = list(x.shape)
    shape[dim] = size
    return x.sum() * torch.zeros(shape, dtype=dtype, device=x.device)
