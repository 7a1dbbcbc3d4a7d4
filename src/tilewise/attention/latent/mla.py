"""Multi-head latent attention: keys and values of all heads read from one small vector per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tilewise.attention.api import attend
from tilewise.attention.plans import Pass, Plan
from tilewise.tiles import Causal, Mask

FORMS = ("auto", "expanded", "absorbed")


@dataclass(frozen=True, eq=False)
class LatentState:
    """What latent attention keeps of the tokens it has seen: training, prefill and decoding alike.

    Attributes:
        latent: `[B, N, d]`, normalised latents; all of them, or a rank's slice.
        rope: `[B, N, rope_dim]`, the rotated key that all heads share.
    """

    latent: Tensor
    rope: Tensor

    @property
    def length(self) -> int:
        """Tokens kept."""
        return self.latent.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in (self.latent, self.rope))

    def then(self, later: LatentState) -> LatentState:
        """This state followed by that of later tokens."""
        return LatentState(torch.cat([self.latent, later.latent], 1), torch.cat([self.rope, later.rope], 1))


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-AI, 2024, DeepSeek-V2, arXiv 2405.04434), causal.

    A token is kept as a latent c = RMSNorm(x W_DKV) and one rotated key shared by all heads. Head h has keys
    c W_UK_h and values c W_UV_h; its query is x W_Q_h (through a normalised low-rank step of its own with
    `query_latent`), with a rotated part of its own. Scores are (q . k + q_rope . k_rope) by
    sqrt(head_dim + rope_dim).

    Two forms of one result: "expanded" makes keys and values of every head, which costs least arithmetic when many
    tokens come at once; "absorbed" moves W_UK to the query and W_UV behind the softmax, so that all heads read the
    latent itself as one kv head, with head_dim latent + rope_dim and values of width latent. "auto" is absorbed for
    a single new token and expanded otherwise. Supports training, prefill, chunked prefill and decoding.

    Args:
        dim: width of the model. heads: attention heads.
        head_dim: width of a head's keys (without their rotated part) and of its values.
        rope_dim: width of the rotated part, even. latent: width of the latent. Defaults are DeepSeek-V2's.
        query_latent: width of the query's low-rank step (1536 in DeepSeek-V2); None does without.
        rope_base: base of the rotation's frequencies; pairs are neighbouring features, as in DeepSeek's code.
        eps: added to mean squares in RMSNorm.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int = 128,
        rope_dim: int = 64,
        latent: int = 512,
        query_latent: int | None = None,
        rope_base: float = 10_000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = {
            "dim": dim,
            "heads": heads,
            "head_dim": head_dim,
            "latent": latent,
            "query_latent": query_latent,
        }
        for name, size in sizes.items():
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
        if not isinstance(rope_dim, int) or rope_dim < 0 or rope_dim % 2:
            raise ValueError(f"rope_dim must be an even integer >= 0, got {rope_dim!r}")
        self.heads, self.head_dim, self.rope_dim, self.latent = heads, head_dim, rope_dim, latent
        self.rope_base, self.eps = rope_base, eps
        width = heads * (head_dim + rope_dim)
        self.q_down = None if query_latent is None else nn.Linear(dim, query_latent, bias=False)
        self.q_norm = None if query_latent is None else nn.RMSNorm(query_latent, eps)
        self.q_up = nn.Linear(query_latent or dim, width, bias=False)
        self.kv_down = nn.Linear(dim, latent + rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(latent, eps)
        self.k_up = nn.Parameter(torch.empty(heads, latent, head_dim))
        self.v_up = nn.Parameter(torch.empty(heads, latent, head_dim))
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        for up in (self.k_up, self.v_up):
            nn.init.normal_(up, std=latent**-0.5)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return (self.head_dim + self.rope_dim) ** -0.5

    def forward(
        self, x: Tensor, state: LatentState | None = None, form: str = "auto"
    ) -> tuple[Tensor, LatentState]:
        """Attention of new tokens over themselves and those of `state`.

        Args:
            x: `[B, N, dim]`. state: what an earlier call returned; None at the start of a sequence.
            form: "auto", "expanded" or "absorbed".
        Returns:
            `[B, N, dim]` and the state including the new tokens.
        """
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
        check_input(x, self.kv_down.in_features, state)
        start = 0 if state is None else state.length
        queries, q_rope = self.queries(x, start)
        new = self.keep(x, start)
        state = new if state is None else state.then(new)
        if form == "absorbed" or (form == "auto" and x.shape[1] == 1):
            q = torch.einsum("bhnd,hcd->bhnc", queries, self.k_up)
            mixed = attend_latent(q, q_rope, state, self.scale)
            heads = torch.einsum("bhnc,hcd->bhnd", mixed, self.v_up)
        else:
            k, v = (torch.einsum("bnc,hcd->bhnd", state.latent, up) for up in (self.k_up, self.v_up))
            k_rope = state.rope.unsqueeze(1).expand(-1, self.heads, -1, -1)
            q, k = torch.cat([queries, q_rope], -1), torch.cat([k, k_rope], -1)
            heads = cast(Tensor, attend(q, k, v, mask="causal", scale=self.scale))
        return self.out(heads.transpose(1, 2).flatten(2)), state

    def queries(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, heads, N, head_dim]` and their rotated part `[B, heads, N, rope_dim]`; `start` as in
        `rotate`."""
        low = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = self.q_up(low).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        plain, turned = q.split([self.head_dim, self.rope_dim], -1)
        return plain, rotate(turned, start, self.rope_base)

    def keep(self, x: Tensor, start: int | Tensor) -> LatentState:
        """What is kept of new tokens, the first of them at position `start`, or each at its own."""
        latent, rope = self.kv_down(x).split([self.latent, self.rope_dim], -1)
        return LatentState(self.kv_norm(latent), rotate(rope, start, self.rope_base))


def attend_latent(
    q: Tensor, q_rope: Tensor, state: LatentState, scale: float, mask: Mask | None = None
) -> Tensor:
    """All heads over the latents as one kv head: `q [B, heads, N, d]` to mixed latents `[B, heads, N, d]`; `mask`
    None is causal."""
    queries = torch.cat([q, q_rope], -1)
    keys = torch.cat([state.latent, state.rope], -1).unsqueeze(1)
    values = keys[..., : state.latent.shape[2]]
    # What `attend` does after its checks, one of which ends head_dim at 512: DeepSeek-V2's latent makes 512 + 64.
    view = (Causal() if mask is None else mask).bind(queries.shape[2], keys.shape[2], device=q.device)
    return Plan((Pass(view),), view).run(queries, keys, values, scale=scale, need_lse=False).out


def rotate(x: Tensor, start: int | Tensor, base: float) -> Tensor:
    """Rotary positions for `x [..., N, D]`: neighbouring features turn together.

    The first token stands at `start`, or the tokens at these positions, integers that broadcast to `[..., N]`.
    """
    n, d = x.shape[-2:]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Angles in float64: a position times a frequency in float32 is off by a thousandth of a turn beyond 10,000.
    speed = base ** (-torch.arange(0, d, 2, dtype=torch.float64, device=x.device) / max(d, 1))
    if not isinstance(start, Tensor):
        start = torch.arange(start, start + n, device=x.device)
    angle = start.unsqueeze(-1).double() * speed
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)
    first, second = x[..., 0::2].to(kind), x[..., 1::2].to(kind)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return turned.flatten(-2).to(x.dtype)


def check_input(x: Tensor, dim: int, state: LatentState | None) -> None:
    """Raise ValueError unless `x` is `[B, N, dim]` and `state` is of the same batch."""
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != dim:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor [B, N, {dim}], got {given}")
    if state is not None and state.latent.shape[0] != x.shape[0]:
        raise ValueError(f"state has batch {state.latent.shape[0]}, x has {x.shape[0]}")
