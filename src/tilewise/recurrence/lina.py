"""LINA's attention: divided by the sum of weights, local by a convolution, with a gate for each place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewise.recurrence.mixer import from_heads
from tilewise.recurrence.vision import Grid, LocalConv, VisionMixer, features_of
from tilewise.recurrence.whole import whole_attention

EPS = 1e-6  # added to features and to denominators, as the authors do


class LINA(VisionMixer):
    """Bidirectional linear attention for generating images (Wang et al., 2026, arXiv 2601.22630).

    Queries and keys are turned, mapped by ReLU and lifted by 1e-6; a depthwise convolution of the layer's
    input is added before the output layer. The KV gate weighs what each place writes to the memory: a factor
    for its key and one for its value in every head, learned, the same for all inputs.

    Args:
        width, heads, qk_norm, rope, extra, bias: as of `VisionMixer`.
        tokens: N, with the extra ones, which a gate has one entry for; None only without gate.
        gate: whether there is one. conv: side of the convolution's window, 0 for none.
        features: map of queries and keys. normalize: "divide", the paper's choice for generating, or
            "subtract".

    Raises ValueError for settings that do not fit and for other numbers of tokens than the gate's. Differs
    from the
    paper: any grid and padding.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        tokens: int | None = None,
        *,
        gate: bool = True,
        conv: int = 5,
        features: str | None = "relu",
        normalize: str = "divide",
        **options,
    ) -> None:
        super().__init__(width, heads, **options)
        if normalize not in ("divide", "subtract"):
            raise ValueError(f"normalize must be 'divide' or 'subtract', got {normalize!r}")
        if gate and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
            raise ValueError(f"tokens must be an integer >= 1 where there is a gate, got {tokens!r}")
        self.features, self.normalize = features_of(features), normalize
        self.conv = LocalConv(width, conv, self.extra) if conv else None
        self.key_gate = nn.Parameter(torch.ones(heads, tokens or 0, 1)) if gate else None
        self.value_gate = nn.Parameter(torch.ones(heads, tokens or 0, 1)) if gate else None

    def forward(self, x: Tensor, grid: Grid | None = None, *, mask: Tensor | None = None) -> Tensor:
        x = self.check(x, grid, mask, needs_grid=self.conv is not None)
        q, k, v = self.parts(x)
        q, k = (self.features(self.turned(part, grid)) + EPS for part in (q, k))
        if self.key_gate is not None and self.value_gate is not None:
            if x.shape[1] != self.key_gate.shape[1]:
                raise ValueError(f"x must have the gate's {self.key_gate.shape[1]} tokens, got {x.shape[1]}")
            k, v = k * self.key_gate, v * self.value_gate
        eps = EPS if self.normalize == "divide" else 0.0
        out = from_heads(whole_attention(q, k, v, normalize=self.normalize, eps=eps, mask=mask))
        if self.conv is not None and grid is not None:
            out = out + self.conv(x, grid)
        return self.finish(out, mask)
