"""Key-value recall by a memory alone, for training/train_lact.py and tests/recurrence/test_lact.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence import FastWeights, read_chunk

DIM = 32


def pairs(sequences: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[S, 1, count, DIM]`, directions drawn at random."""
    drawn = torch.randn(2, sequences, 1, count, DIM, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn[0], dim=-1), F.normalize(drawn[1], dim=-1)


class Memory(nn.Module):
    """Reads pairs a chunk at a time, one update each, and answers its keys; 3 x 32 x 32 numbers of state.

    `kind` "swiglu" is the fast-weight network, "muon" the same with orthogonalised updates, "linear" a matrix over
    96 learned features of a key, corrected by what it got wrong. First weights and rates are learned.
    """

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        self.kind = kind
        drawn = torch.randn(3, DIM, DIM, generator=torch.Generator().manual_seed(seed)) * DIM**-0.5
        self.gate, self.up, self.down = (nn.Parameter(w.clone()) for w in drawn)
        self.rates = nn.Parameter(torch.full((3,), -1.0))
        self.sharpness = nn.Parameter(torch.tensor(2.0))

    def forward(self, k: Tensor, v: Tensor, chunk: int) -> Tensor:
        """Logits `[S, count, count]`: which value each key calls for."""
        rates = F.softplus(self.rates)
        read = self._linear if self.kind == "linear" else self._swiglu
        return (self.sharpness.exp() * F.normalize(read(k, v, chunk, rates), dim=-1) @ v.mT)[:, 0]

    def _swiglu(self, k: Tensor, v: Tensor, chunk: int, rates: Tensor) -> Tensor:
        first = FastWeights(*(w.expand(len(k), 1, -1, -1) for w in (self.gate, self.up, self.down)))
        weights, lengths = first, first.lengths
        for start in range(0, k.shape[2], chunk):
            part = slice(start, start + chunk)
            weights = read_chunk(
                weights, k[:, :, part], v[:, :, part], rates.expand(len(k), 1, k[:, :, part].shape[2], 3),
                lengths=lengths, muon=self.kind == "muon",
            )  # fmt: skip
        return weights(k)

    def _linear(self, k: Tensor, v: Tensor, chunk: int, rates: Tensor) -> Tensor:
        features = F.silu(k @ torch.cat((self.gate, self.up, self.down)).mT)
        features = F.normalize(features, dim=-1)
        state = k.new_zeros(len(k), 1, 3 * DIM, DIM)
        for start in range(0, k.shape[2], chunk):
            key, value = features[:, :, start : start + chunk], v[:, :, start : start + chunk]
            state = state + rates[0] * key.mT @ (value - key @ state)
        return features @ state


def recalled(logits: Tensor) -> float:
    """Share of keys whose value comes first."""
    return (logits.argmax(-1) == torch.arange(logits.shape[2])).float().mean().item()
