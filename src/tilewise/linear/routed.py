"""SPT's routed feed-forward layer: a router activates some blocks of neurons for each token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RoutedFFN(nn.Module):
    """A feed-forward layer cut into blocks of neurons, of which each token computes `active` (Gui et al., 2023,
    arXiv 2312.10365).

    A linear router gives each block a probability; the likeliest are computed, and what they give is added up as
    the plain layer would add it. Tokens are gathered by block, so that products stay dense. `balance` after a
    call is the loss that spreads tokens over blocks; add it to the training loss, times a small number.

    Differs from the authors' code, in which the probabilities take no part in the answer and the router learns from
    the balance alone: here each block is multiplied by `p / stop_gradient(p)`, which is 1, so that the answer is
    theirs and the loss has a gradient for the router of the blocks that were chosen. It does not say which others
    would have been better; `calibrate` starts the router from what blocks give on real inputs, where the authors
    start at random.

    Args:
        width: of the input and output. neurons: of the hidden layer, a multiple of `blocks`. blocks: how many.
        active: blocks per token, in 1..blocks. activation: of the hidden layer. bias: whether both maps have one.

    `forward`: `[..., width]` to the same. Raises ValueError for settings that do not fit.
    """

    def __init__(
        self,
        width: int,
        neurons: int,
        blocks: int = 8,
        active: int = 4,
        *,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("neurons", neurons), ("blocks", blocks)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if neurons % blocks:
            raise ValueError(f"neurons must be a multiple of {blocks} blocks, got {neurons}")
        if not isinstance(active, int) or not 1 <= active <= blocks:
            raise ValueError(f"active must be an integer in 1..{blocks}, got {active!r}")
        self.blocks, self.active, self.activation = blocks, active, activation
        self.up = nn.Linear(width, neurons, bias=bias)
        self.down = nn.Linear(neurons, width, bias=bias)
        self.router = nn.Linear(width, blocks)
        self.balance = torch.zeros(())

    @classmethod
    def from_dense(
        cls,
        up: nn.Linear,
        down: nn.Linear,
        blocks: int = 8,
        active: int = 4,
        *,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> RoutedFFN:
        """A routed layer with copies of a trained layer's two maps and a router that knows nothing yet."""
        biased = up.bias is not None
        made = cls(up.in_features, up.out_features, blocks, active, activation=activation, bias=biased)
        made.to(device=up.weight.device, dtype=up.weight.dtype)
        made.up.load_state_dict(up.state_dict())
        made.down.load_state_dict(down.state_dict())
        return made

    @torch.no_grad()
    def calibrate(self, x: Tensor, ridge: float = 1e-3) -> None:
        """Start the router from inputs `[..., width]`: a ridge regression of how much each block gives.

        `ridge` is relative to the mean square of the inputs. The scores are made to vary by about 1 within a token.
        """
        x = x.reshape(-1, x.shape[-1]).double()
        up, down = self.up.weight.double(), self.down.weight.double()
        hidden = x @ up.T + (0 if self.up.bias is None else self.up.bias.double())
        hidden = self.activation(hidden).unflatten(1, (self.blocks, -1))
        given = torch.stack(
            [(h @ d.T).norm(dim=1) for h, d in zip(hidden.unbind(1), down.chunk(self.blocks, 1))], 1
        )
        given = given - given.mean(1, keepdim=True)
        given = given / given.std().clamp(min=1e-12)
        wide = F.pad(x, (0, 1), value=1.0)
        square = wide.T @ wide / len(wide)
        square.diagonal().add_(ridge * float(square.diagonal().mean()))
        found = torch.linalg.solve(square, wide.T @ given / len(wide))
        self.router.weight.copy_(found[:-1].T)
        self.router.bias.copy_(found[-1])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        p = self.router(flat).softmax(-1)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(self.active, 1).indices, True)
        passed = p / p.detach()
        out = torch.zeros_like(flat)
        ups, downs = self.up.weight.chunk(self.blocks), self.down.weight.chunk(self.blocks, 1)
        biases = [None] * self.blocks if self.up.bias is None else self.up.bias.chunk(self.blocks)
        for block in range(self.blocks):
            tokens = chosen[:, block].nonzero().squeeze(1)
            hidden = self.activation(F.linear(flat[tokens], ups[block], biases[block]))
            given = F.linear(hidden, downs[block]) * passed[tokens, block, None]
            out = out.index_add(0, tokens, given)
        if self.down.bias is not None:
            out = out + self.down.bias
        # Equal shares of tokens and of probability make this 1, its least.
        share = chosen.to(p.dtype).mean(0) / self.active if len(flat) else p.sum(0)
        self.balance = self.blocks * (share * p.mean(0)).sum() if len(flat) else p.sum()
        return out.view(x.shape)

    @property
    def work(self) -> float:
        """Multiplications per token over those of the plain layer."""
        width, neurons = self.up.in_features, self.up.out_features
        return self.active / self.blocks + self.blocks / (2 * neurons) if width else 0.0
