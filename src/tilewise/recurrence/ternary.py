"""Linear layers of weights -1, 0 and 1: trained as floats that are rounded, kept in two bits."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 1e-5  # what scales divide by at least
BYTE = (0, 2, 4, 6)  # where the four weights of a byte begin


def to_eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers -127 to 127 as floats, and the scale of each token by which they are multiplied, `[..., 1]`."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) / 127
    return (x / scale).round(), scale


def to_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """-1, 0 and 1 as floats, and the one scale by which they are multiplied: the mean magnitude."""
    scale = weight.abs().mean().clamp(min=LEAST)
    return (weight / scale).round().clamp(-1, 1), scale


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient of those before."""
    return x + (rounded - x).detach()


class BitLinear(nn.Linear):
    """A linear layer whose weights are rounded to -1, 0, 1 and whose inputs to eight bits (Zhu et al., 2024, arXiv
    2406.02528; Ma et al., 2024, arXiv 2402.17764).

    Inputs `[..., in_features]` are normalised (RMS, with learned scales), and each token rounded to 255 levels of
    its largest magnitude; all weights share one scale, their mean magnitude. Gradients pass the rounding as if it
    were not there. Nothing but the product with 0 and +-1 is left, which `packed` keeps in two bits a weight and
    does in integers. Arguments as `torch.nn.Linear`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options) -> None:
        super().__init__(in_features, out_features, bias=bias, **options)
        self.norm = nn.RMSNorm(in_features, eps=1e-8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        levels, scale = to_eight_bits(x)
        weights, common = to_ternary(self.weight)
        made = F.linear(_straight(x, levels * scale), _straight(self.weight, weights * common))
        return made if self.bias is None else made + self.bias


class PackedBitLinear(nn.Module):
    """What a `BitLinear` computes, from two bits a weight, without a floating product of matrices.

    Inputs become int8, the sums of those with weight 1 less those with weight -1 are int32, and two scales make
    floats of them again. For use, not for training: there is no gradient.

    Args:
        layer: the trained layer, which stays as it is.
    """

    def __init__(self, layer: BitLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.norm = copy.deepcopy(layer.norm).requires_grad_(False)
        with torch.no_grad():
            weights, scale = to_ternary(layer.weight)
            codes = (
                F.pad(weights + 1, (0, -self.in_features % 4), value=1).to(torch.uint8).unflatten(1, (-1, 4))
            )
            made = sum(codes[:, :, i] << shift for i, shift in enumerate(BYTE))
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", cast(Tensor, made))  # uint8 [out, ceil(in / 4)]
        self.register_buffer("scale", scale.detach().clone())
        self.bias = (
            None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        )

    def weights(self) -> Tensor:
        """-1, 0 and 1 as int8 `[out, in]`."""
        return self._padded()[:, : self.in_features]

    def _padded(self) -> Tensor:
        """With zeros up to whole bytes."""
        return torch.stack([(self.codes >> shift) & 3 for shift in BYTE], 2).flatten(1).to(torch.int8) - 1

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        levels, scale = to_eight_bits(self.norm(x))
        levels = F.pad(levels.flatten(0, -2).to(torch.int8), (0, -self.in_features % 4))
        # PyTorch's product of int8 matrices into int32: with weights of 0 and +-1, additions. Its results for
        # a single column are wrong in torch 2.13; there are always four.
        sums = torch._int_mm(levels, self._padded().mT)
        made = sums.unflatten(0, x.shape[:-1]) * (scale * self.scale)
        return (made if self.bias is None else made + self.bias).to(x.dtype)


def packed(model: nn.Module) -> nn.Module:
    """A copy of a model with every `BitLinear` in two bits a weight. Raises ValueError where there is none."""
    made = copy.deepcopy(model)
    if isinstance(made, BitLinear):
        return PackedBitLinear(made)
    found = [(module, name) for module in made.modules() for name, part in module.named_children()
             if isinstance(part, BitLinear)]  # fmt: skip
    if not found:
        raise ValueError("there is no BitLinear in the model: nothing can be packed")
    for module, name in found:
        setattr(module, name, PackedBitLinear(cast(BitLinear, getattr(module, name))))
    return made
