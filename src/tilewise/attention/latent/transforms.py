"""Orthogonal changes of the latent's basis, which latent attention does not notice until it is cut in slices."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.latent.mla import MLA


@dataclass(frozen=True, eq=False)
class LatentTransform:
    """A basis for the latent.

    Attributes:
        matrix: orthogonal `[d, d]`, float64; a latent c becomes c @ matrix.
        energy: `[d]`, float64, the share of the latent's squares that each new coordinate is expected to hold.
    """

    matrix: Tensor
    energy: Tensor

    @classmethod
    def identity(cls, d: int) -> LatentTransform:
        """No change; squares are taken to be spread evenly."""
        _check_size(d)
        return cls(torch.eye(d, dtype=torch.float64), torch.full((d,), 1 / d, dtype=torch.float64))

    @classmethod
    def hadamard(cls, d: int, seed: int = 0) -> LatentTransform:
        """Random signs, then a Hadamard matrix: every coordinate comes to hold an equal share of the squares.

        For d = 2^a m with m odd it is the Kronecker product of the Sylvester matrix of 2^a and the orthonormal
        cosine transform of m, orthogonal for every d: nothing is padded or cut off. A power of 2 is the paper's.
        """
        _check_size(d)
        odd = d
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while odd % 2 == 0:
            odd //= 2
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(
                2
            )
        signs = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        mixed = torch.kron(matrix, _cosines(odd))
        return cls(signs.to(torch.float64).unsqueeze(1) * mixed, torch.full((d,), 1 / d, dtype=torch.float64))

    @classmethod
    def pca(cls, latents: Tensor) -> LatentTransform:
        """Principal axes of sample latents `[..., d]`, those that hold most of the squares first.

        Every sample is first divided by its root mean square, as RMSNorm does before attention sees it. Axes are
        those of the second moments, the mean included, for it is squares that RMSNorm and scores are made of.
        """
        flat = latents.detach().flatten(0, -2).to(torch.float64)
        if not flat.numel():
            raise ValueError("latents must hold at least one sample, got none")
        size = flat.square().mean(1, keepdim=True).sqrt()
        flat = flat / size.masked_fill(size == 0, 1)
        moments = flat.mT @ flat / len(flat)
        values, axes = torch.linalg.eigh(moments)
        # Axes that the samples never use keep a trace: shares are divided by.
        values = values.flip(0).clamp(min=1e-12 * float(values.max()))
        return cls(axes.flip(1), values / values.sum())

    def share(self, columns: slice) -> float:
        """The share of the squares expected in these coordinates."""
        return float(self.energy[columns].sum())


def reparameterize(mla: MLA, transform: LatentTransform) -> MLA:
    """The same function with its latents in another basis, as a new module.

    The scale of RMSNorm moves into W_UK and W_UV, and the basis into W_DKV and both; RMSNorm without scale does not
    notice an orthogonal transform. Weights are computed in float64 and rounded once to their dtype.
    """
    d = mla.latent
    if transform.matrix.shape != (d, d):
        raise ValueError(f"the transform is for latents of {len(transform.matrix)}, the module has {d}")
    changed = copy.deepcopy(mla)
    matrix = transform.matrix.to(mla.k_up.device)
    with torch.no_grad():
        down = changed.kv_down.weight  # [latent + rope, dim]
        down[:d] = (matrix.mT @ down[:d].to(torch.float64)).to(down.dtype)
        for up in (changed.k_up, changed.v_up):
            scaled = mla.kv_norm.weight.to(torch.float64).unsqueeze(1) * up.to(torch.float64)
            up.copy_((matrix.mT @ scaled).to(up.dtype))
        changed.kv_norm.weight.fill_(1)
    return changed


def _cosines(m: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of size m."""
    row, column = torch.arange(m, dtype=torch.float64).unsqueeze(1), torch.arange(m, dtype=torch.float64)
    made = torch.cos(math.pi * row * (2 * column + 1) / (2 * m)) * math.sqrt(2 / m)
    made[0] /= math.sqrt(2)
    return made


def _check_size(d: int) -> None:
    if not isinstance(d, int) or d < 1:
        raise ValueError(f"d must be an integer >= 1, got {d!r}")
