"""Checks of what the functions of this room take; each error says what was given and what is accepted."""

from __future__ import annotations

from torch import Tensor

from tilewise.convolution.frequency import FrequencySparsity


def check_kernel(kernel: Tensor) -> None:
    """TypeError and ValueError unless it is a floating `[C, K]`."""
    if not isinstance(kernel, Tensor) or not kernel.is_floating_point():
        raise TypeError(
            "kernel must be a floating tensor or what prepare made of one, got"
            f" {getattr(kernel, 'dtype', type(kernel).__name__)}"
        )
    if kernel.ndim != 2 or not kernel.shape[1]:
        raise ValueError(f"kernel must be [C, K] with K >= 1, got shape {tuple(kernel.shape)}")


def check_sparsity(
    sparsity: FrequencySparsity | None, causal: bool, n: int
) -> tuple[int, tuple[int, ...], float]:
    """Rows, those kept and the band; ValueError where they do not fit the call."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False (circular), got {causal!r}")
    if sparsity is None:
        return 1, (0,), 1.0
    if not isinstance(sparsity, FrequencySparsity):
        raise TypeError(f"sparsity must be None or a FrequencySparsity, got {type(sparsity).__name__}")
    if causal:
        raise ValueError(
            "sparsity is of circular convolutions (causal=False): without some of its frequencies a kernel"
            " reaches tokens to come"
        )
    if n % sparsity.rows:
        raise ValueError(f"rows of sparsity must divide the length, got {sparsity.rows} and {n}")
    return (sparsity.rows, sparsity.kept, sparsity.band) if n else (1, (0,), 1.0)
