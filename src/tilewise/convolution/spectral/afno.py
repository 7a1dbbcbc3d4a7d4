"""AFNO: a small network on every Fourier mode, the same for all of them, block-diagonal over channels, made
sparse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tilewise.convolution.spectral.aff import ComplexGroups
from tilewise.convolution.spectral.grids import (
    check_count,
    check_grid,
    from_modes,
    kept_modes,
    laid_out,
    to_modes,
)


class AFNO(nn.Module):
    """The adaptive Fourier neural operator over lines and pictures.

    Tokens are transformed, each mode's channels run through the same two complex layers in `blocks` groups, a
    soft threshold sets what is small to 0, and the inverse transform gives the tokens' mix. Weights do not
    grow with the number of modes or tokens, and a quarter of the blocks' size is a quarter of the weights.

    Args:
        width: channels. blocks: groups of channels. hidden: times as wide between the layers. threshold: of
            the soft threshold. modes: only modes of fewer waves along each side are kept, the others become
            0; None for all.
        resolution_free: take Fourier coefficients of the function (means over the grid) in place of
            orthonormal ones. Then the same function on a finer grid gets the same output, if `modes` stay
            below half of the coarser grid's sides: what the paper claims of the operator. Orthonormal ones,
            as in the authors' code, grow with the grid, against thresholds and biases that do not.

    `forward(x [B, N, width], grid=None)`: N places of a line, or of a grid (H, W), row-major; any dtype,
    computed in float32 at least. Raises ValueError for settings and inputs that do not fit.

    After Guibas et al., 2021 (arXiv 2111.13587). The residual (their "bias") is the block's; modes of both
    signs are kept alike, where the authors' code keeps all of the first side.
    """

    def __init__(
        self,
        width: int,
        blocks: int = 8,
        *,
        hidden: int = 1,
        threshold: float = 0.01,
        modes: int | None = None,
        resolution_free: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.network = ComplexGroups(width, blocks, hidden, threshold)
        self.modes = None if modes is None else check_count("modes", modes)
        self.norm = "forward" if resolution_free else "ortho"

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        sides = check_grid(x, grid, self.width)
        if not x.numel():
            return x
        z = to_modes(laid_out(x, sides), self.norm)
        kept = [places.to(x.device) for places in kept_modes(sides, self.modes)]
        index: tuple[slice | Tensor, ...] = (slice(None), *torch.meshgrid(*kept, indexing="ij"))
        mixed = z.new_zeros(z.shape)
        mixed[index] = self.network(z[index])
        return from_modes(mixed, sides, self.norm).reshape(x.shape).to(x.dtype)
