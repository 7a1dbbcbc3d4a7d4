"""Latent attention whose latent is sliced over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tilewise.attention.latent.mla import MLA, LatentState, attend_latent, check_input, rotate
from tilewise.attention.latent.transforms import LatentTransform, reparameterize

SCORES = ("part", "share")


class TPLA(nn.Module):
    """One rank's part of tensor-parallel latent attention (Tang et al., 2025, arXiv 2508.15881), from an `MLA`.

    Under tensor parallelism every rank of MLA holds the whole latent of every token. Here a rank holds a slice of
    it (and the small rotated key), attends with that slice for all heads, and outputs are added up over the ranks.
    Two approximations make that possible, and an orthogonal change of the latent's basis keeps them small:

    - RMSNorm: the squares of the whole latent are estimated as those of the slice divided by the slice's *share*,
      the part of the squares that it is expected to hold: as large as the slice without a transform and for
      Hadamard, by the eigenvalues for PCA.
    - softmax: a rank's scores are the products with its own slice plus the exact rotated part, and it takes its
      softmax of these.

    PCA is the paper's choice: the first slice then holds nearly all that scores depend on, and the others, whose
    softmax is poor, have little to say. Supports prefill, chunked prefill and decoding, not training: weights are
    copies without gradients. A prompt can be read by the unsliced `reparameterize(mla, transform)`, which
    approximates nothing, and its state handed over with `take_over` (the paper's prefill-decode separation).

    Where this differs from the paper: its equation 25 gives the share where equations 18 and 22 need the reciprocal
    (as in its Hadamard example); we take the reciprocal. For scores it is not the default, because it multiplies a
    small slice's scores, which say next to nothing of the others', by 20 and more: see `scores`.

    Args:
        mla: the trained module. transform: the basis, see `LatentTransform`.
        columns: the slice of the latent, in the new basis, that this part holds; heads: the heads it computes.
        scores: what stands for the product with the whole latent. "part": the product with the slice, the best
            estimate when slices are uncorrelated, as PCA's are. "share": that, divided by the share (equation 22).
        group: the process group over which outputs are added up; None is the default one.
    """

    # What register_buffer makes of the weights, for type checkers.
    q_down: Tensor | None
    q_gain: Tensor
    q_up: Tensor
    kv_down: Tensor
    k_up: Tensor
    v_up: Tensor
    out: Tensor

    def __init__(
        self,
        mla: MLA,
        transform: LatentTransform,
        columns: slice,
        heads: slice,
        *,
        scores: str = "part",
        group: Any = None,
    ) -> None:
        super().__init__()
        if scores not in SCORES:
            raise ValueError(f"scores must be one of {', '.join(map(repr, SCORES))}, got {scores!r}")
        first, last, _ = _range(columns, mla.latent, "columns")
        some, end, _ = _range(heads, mla.heads, "heads")
        made = reparameterize(mla, transform)
        self.columns, self.heads = columns, end - some
        self.head_dim, self.rope_dim, self.latent = mla.head_dim, mla.rope_dim, mla.latent
        self.scale, self.rope_base, self.eps, self.group = mla.scale, mla.rope_base, mla.eps, group
        self.share = transform.share(columns)
        self.boost = 1.0 if scores == "part" else 1 / self.share
        self.parts: int | None = None
        q_up = made.q_up.weight.unflatten(0, (mla.heads, -1))[some:end].flatten(0, 1)
        out = made.out.weight.unflatten(1, (mla.heads, -1))[:, some:end].flatten(1)
        down = made.kv_down.weight
        weights = {
            "q_down": None if made.q_down is None else made.q_down.weight,
            "q_gain": None if made.q_norm is None else made.q_norm.weight,
            "q_up": q_up,
            "kv_down": torch.cat([down[first:last], down[mla.latent :]]),
            "k_up": made.k_up[some:end, first:last],
            "v_up": made.v_up[some:end, first:last],
            "out": out,
        }
        for name, weight in weights.items():
            self.register_buffer(name, None if weight is None else weight.detach().clone())

    @classmethod
    def shard(
        cls,
        mla: MLA,
        transform: LatentTransform,
        *,
        slices: int = 2,
        scores: str = "part",
        group: Any = None,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> TPLA:
        """The part of one rank: slice `rank % slices` of the latent, part `rank // slices` of the heads.

        Args:
            slices: how many parts the latent is cut in (2 in the paper); divides the ranks and the latent.
            rank, ranks: which part of how many; None takes those of `group`. All ranks need the same `transform`.

        Raises ValueError when something does not divide.
        """
        rank = dist.get_rank(group) if rank is None else rank
        ranks = dist.get_world_size(group) if ranks is None else ranks
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be in 0..{ranks - 1}, got {rank}")
        if slices < 1 or ranks % slices or mla.latent % slices:
            raise ValueError(
                f"slices must divide the ranks ({ranks}) and the latent ({mla.latent}), got {slices}"
            )
        if mla.heads % (ranks // slices):
            raise ValueError(f"{mla.heads} heads cannot be split over {ranks // slices} ranks per slice")
        width, heads = mla.latent // slices, mla.heads // (ranks // slices)
        column, head = (rank % slices) * width, (rank // slices) * heads
        made = cls(
            mla,
            transform,
            slice(column, column + width),
            slice(head, head + heads),
            scores=scores,
            group=group,
        )
        made.parts = ranks
        return made

    def forward(self, x: Tensor, state: LatentState | None = None) -> tuple[Tensor, LatentState]:
        """Attention of new tokens over themselves and those of `state`, added up over the ranks.

        Args:
            x: `[B, N, dim]`, the same on every rank. state: this rank's, from an earlier call or `take_over`.
        Returns:
            `[B, N, dim]`, the same on every rank, and this rank's state including the new tokens.
        """
        ranks = dist.get_world_size(self.group)
        if self.parts not in (None, ranks):
            raise ValueError(
                f"group must have the {self.parts} ranks that the parts were made for, got {ranks}"
            )
        out, state = self.partial(x, state)
        dist.all_reduce(out, group=self.group)
        return out, state

    def partial(self, x: Tensor, state: LatentState | None = None) -> tuple[Tensor, LatentState]:
        """What this part adds to the output, before the sum over ranks; as `forward` otherwise."""
        check_input(x, self.kv_down.shape[1], state)
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("TPLA does not support training; x must not need a gradient")
        start = 0 if state is None else state.length
        low = x
        if self.q_down is not None:
            low = nn.functional.rms_norm(x @ self.q_down.mT, (len(self.q_down),), self.q_gain, self.eps)
        q = (low @ self.q_up.mT).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        plain, turned = q.split([self.head_dim, self.rope_dim], -1)
        queries = torch.einsum("bhnd,hcd->bhnc", plain, self.k_up) * self.boost
        new = self._keep(x, start)
        state = new if state is None else state.then(new)
        mixed = attend_latent(queries, rotate(turned, start, self.rope_base), state, self.scale)
        heads = torch.einsum("bhnc,hcd->bhnd", mixed, self.v_up)
        return heads.transpose(1, 2).flatten(2) @ self.out.mT, state

    def take_over(self, state: LatentState) -> LatentState:
        """This part's share of a state that `reparameterize(mla, transform)` returned, as a copy."""
        if state.latent.shape[2] != self.latent:
            raise ValueError(f"state must hold latents of {self.latent}, got {state.latent.shape[2]}")
        return LatentState(state.latent[..., self.columns].clone(), state.rope)

    def _keep(self, x: Tensor, start: int) -> LatentState:
        """This slice of new tokens' latents, normalised by what it says of the whole."""
        part, rope = (x @ self.kv_down.mT).split([self.k_up.shape[1], self.rope_dim], -1)
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        squares = part.to(kind).square().sum(-1, keepdim=True) / self.share
        latent = (part.to(kind) * (squares / self.latent + self.eps).rsqrt()).to(x.dtype)
        return LatentState(latent, rotate(rope, start, self.rope_base))


def _range(part: slice, n: int, name: str) -> tuple[int, int, int]:
    """First, last and step of a slice of n. Raises ValueError for an empty one or one with gaps."""
    first, last, step = part.indices(n)
    if step != 1 or last <= first:
        raise ValueError(f"{name} must be a slice without gaps that holds some of 0..{n - 1}, got {part}")
    return first, last, step
