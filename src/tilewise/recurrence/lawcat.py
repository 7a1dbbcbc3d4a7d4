"""LAWCAT: a trained model's softmax attention replaced by convolution over tokens and normalised gated linear
attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention.gates.rotary import frequencies, turn
from tilewise.attention.gates.sizes import check_sizes, positive
from tilewise.attention.gates.store import KINDS
from tilewise.attention.method import Method
from tilewise.attention.plans import Plan
from tilewise.kernels import Choice
from tilewise.recurrence.api import explain, scan
from tilewise.recurrence.mixer import from_heads, to_heads, wide
from tilewise.recurrence.short_conv import ShortConv
from tilewise.recurrence.state import Carried, State
from tilewise.tiles import Visibility

TEMPER = 16.0  # gates are the sigmoid to the power of one over this, as GLA has it


@dataclass(frozen=True, eq=False)
class LAWCATState(Carried):
    """What a converted layer carries in place of a cache: the scan's state and the last inputs of the convolutions,
    of queries and of keys. Its size does not depend on the tokens read."""

    scan: State
    q_tail: Tensor
    k_tail: Tensor


class LAWCAT(nn.Module):
    """One layer's linear attention, to be trained beside the frozen model whose softmax attention it replaces (Liu
    et al., 2025, arXiv 2509.18467).

    Queries and keys pass a causal convolution over tokens each, then one projection that both share and a softmax
    over its features and their negatives, which makes them positive. Keys and values go into a state that decays by
    channel, as a gate says that depends on the token; outputs are divided by the same recurrence over values of 1:

        S_t = diag(a_t) S_{t-1} + phi(k_t) v_t^T,   z_t = diag(a_t) z_{t-1} + phi(k_t)
        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    `method` gives what `tilewise.patch` and `attend` take; `tilewise convert` trains one for each layer of a model
    and writes them to a file. Causal masks only, padding on either side; decoding carries a `LAWCATState`.

    Differs from the paper: gates see the token's keys and values, which stand for the hidden state that an
    attention function is not shown; the model's own projections stay as they are, where the authors adapt them by
    LoRA in a second stage: each head's output passes a matrix of its own, at first the identity. Features are those
    of softmax, as in Hedgehog.

    Args:
        heads, kv_heads, head_dim: of the model's attention. features: of the projection; there are twice as many.
        conv: tokens that convolutions see. rank: of the gate. rotary: base of the rotary positions that the model
            has turned queries and keys by, which are then turned back: what is far is not told by its angle, and
            longer texts than those of the training hold nothing unseen. None leaves them as they come.
        gated: False keeps everything for ever: the control. seed: of the first weights.

    Raises ValueError for sizes below 1, heads that do not divide, and calls of other sizes.
    """

    kind: ClassVar[str] = "lawcat"

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        features: int = 64,
        conv: int = 4,
        rank: int = 16,
        rotary: float | None = None,
        gated: bool = True,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive(heads=heads, kv_heads=kv_heads, head_dim=head_dim, features=features, conv=conv, rank=rank)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.features, self.conv, self.rank, self.rotary, self.gated = features, conv, rank, rotary, gated
        self.angles = () if rotary is None else frequencies(rotary, head_dim)
        self.q_conv, self.k_conv = (ShortConv(n * head_dim, conv) for n in (heads, kv_heads))
        for part in (self.q_conv, self.k_conv):  # at first the token alone
            nn.init.zeros_(part.weight)
            nn.init.ones_(part.weight.data[-1])
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(kv_heads, head_dim, features, generator=generator) * head_dim**-0.5
        self.project = nn.Parameter(drawn)
        # Each head's output plus a multiple of itself, nothing at first; values are as wide as queries and keys.
        self.adapt = nn.Parameter(torch.zeros(heads, head_dim, head_dim))
        self.down = nn.Linear(2 * kv_heads * head_dim, rank, bias=False)
        self.up = nn.Linear(rank, kv_heads * 2 * features)
        with torch.no_grad():
            self.down.weight.copy_(torch.randn(self.down.weight.shape, generator=generator) * 0.02)
            self.up.weight.zero_()
            # Channels first remember from about 30 to 10,000 tokens.
            spread = torch.rand(kv_heads * 2 * features, generator=generator)
            self.up.bias.copy_(0.5 + 6 * spread)
        if not gated:
            self.down.requires_grad_(False)
            self.up.requires_grad_(False)

    def settings(self) -> dict[str, Any]:
        """What it is made with, for a file's header."""
        names = ("heads", "kv_heads", "head_dim", "features", "conv", "rank", "rotary", "gated")
        return {name: getattr(self, name) for name in names}

    def method(self) -> LinearizedAttention:
        """The method that computes attention by this layer."""
        return LinearizedAttention(self)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, view: Visibility, state: LAWCATState | None = None
    ) -> tuple[Tensor, LAWCATState]:
        """Outputs `[B, H_q, N, D_v]` for as many new queries as keys, and the state after them."""
        mask = _mask(view, k)
        if self.angles:
            q, k = turn(q, view.q_pos, self.angles, back=True), turn(k, view.k_pos, self.angles, back=True)
        weight_dtype = self.project.dtype
        q, k, values = (x.to(torch.promote_types(x.dtype, weight_dtype)) for x in (q, k, v))
        decay = self._decay(k, values)
        tails = (None, None) if state is None else (state.q_tail, state.k_tail)
        parts = []
        for conv, x, tail, n in (
            (self.q_conv, q, tails[0], self.heads),
            (self.k_conv, k, tails[1], self.kv_heads),
        ):
            mixed, after = conv(from_heads(x), tail, mask=mask)
            parts.append((self._features(to_heads(mixed, n)), after))
        (q, q_tail), (k, k_tail) = parts
        out, after = scan(
            q, k, values.to(q.dtype), decay=decay, normalize="sum", scale=1.0, mask=mask,
            state=None if state is None else state.scan, return_state=True,
        )  # fmt: skip
        out = out + out @ self.adapt.to(out.dtype)
        return out.to(v.dtype), LAWCATState(after, q_tail, k_tail)

    def _features(self, x: Tensor) -> Tensor:
        """`[B, H, N, D]` to positive features `[B, H, N, 2 F]`; query heads use their kv head's projection."""
        weight = self.project.repeat_interleave(x.shape[1] // self.kv_heads, 0).to(x.dtype)
        made = x @ weight
        return torch.cat((made.softmax(-1), (-made).softmax(-1)), -1)

    def _decay(self, k: Tensor, v: Tensor) -> Tensor | None:
        """Log decays by channel, `[B, H_kv, N, 2 F]`."""
        if not self.gated:
            return None
        told = torch.cat((from_heads(k), from_heads(v)), -1).to(self.down.weight.dtype)
        return F.logsigmoid(wide(to_heads(self.up(self.down(told)), self.kv_heads))) / TEMPER


def _mask(view: Visibility, k: Tensor) -> Tensor | None:
    """Which tokens are no padding, bool `[B, N]`, None where none is."""
    if view.simple == "causal":
        return None
    return view.keys_seen()[:, 0].expand(k.shape[0], -1)


@dataclass(eq=False)
class _Part:
    """The recurrence as a part of a plan. `after` is the state that its last run ended in."""

    layer: LAWCAT
    view: Visibility
    state: LAWCATState | None
    after: LAWCATState | None = None

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        new, n = q.shape[2], k.shape[2]
        view = self.view
        if new < n:  # one query more: what came before is in the state
            view = _last(view)
            k, v = k[:, :, -1:], v[:, :, -1:]
        out, after = self.layer.run(q, k, v, view, self.state if new < n else None)
        self.after = after.detach()
        return out

    def explain(self, q: Tensor, k: Tensor, v: Tensor) -> Choice:
        """The engine of the recurrence, and why the others would not run it."""
        dtype = torch.promote_types(q.dtype, self.layer.project.dtype)
        q, k, v = (x[:, :, :1].to(dtype) for x in (q, k, v))
        return explain(q, k, v, normalize="sum")

    def cost(self) -> Tensor:
        """Multiplications of the recurrence over those of one score."""
        layer, n = self.layer, self.view.q_pos.shape[2]
        width, d = 2 * layer.features, layer.head_dim
        work = n * (width * (d + 1) * (1 + layer.kv_heads / layer.heads) + width * d) / (2 * d)
        return torch.tensor([[work]], dtype=torch.float64, device=self.view.q_pos.device)


def _last(view: Visibility) -> Visibility:
    """The view of one query on its own key alone."""
    return Visibility.everything(view.q_pos, view.k_pos[:, :, -1:])


@dataclass(frozen=True, eq=False)
class LinearizedAttention(Method):
    """The method of a `LAWCAT` layer, which see.

    Args: layer: trained or not. state: what decoding goes on from, filled in by `with_state`.
    """

    layer: LAWCAT
    state: LAWCATState | None = field(default=None, repr=False)
    modes = ("train", "prefill", "decode")
    reads = "q, k, v"
    needs = "trained weights"
    exact = False
    carries = True

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        check_sizes(self.layer, q, k)
        n_q, n_k = q.shape[2], k.shape[2]
        if n_q != n_k and (n_q != 1 or self.state is None):
            raise ValueError(
                f"LAWCAT reads whole prompts, or with a state one token: {n_q} queries, {n_k} keys"
            )
        if not causal(view):
            raise ValueError(
                "LAWCAT is a recurrence over tokens: the mask must be causal, with padding or without"
            )
        return Plan((), view, added=(_Part(self.layer, view, self.state),))

    def with_state(self, state: Any) -> Method:
        return self if state is None else LinearizedAttention(self.layer, state)

    @torch.no_grad()
    def carry(self, q: Tensor, k: Tensor, v: Tensor, view: Visibility, state: Any) -> LAWCATState:
        before = cast("LAWCATState | None", state)
        if before is None:
            if q.shape[2] != k.shape[2]:
                raise ValueError(
                    f"a state begins with a whole prompt: {q.shape[2]} queries, {k.shape[2]} keys"
                )
            return self.layer.run(q, k, v, view)[1]
        return self.layer.run(q, k[:, :, -1:], v[:, :, -1:], _last(view), before)[1]


def causal(view: Visibility) -> bool:
    """Whether each query sees all keys up to its own position that are no padding, and no others."""
    if view.simple == "causal":
        return True
    if view.dense is not None or view.pos.shape[3] != 1:
        return False
    lo, hi, at = view.lo[..., 0], view.hi[..., 0], view.q_pos
    first = view.k_pos.masked_fill(~view.keys_seen(), torch.iinfo(torch.int64).max)
    first = first.amin(-1, keepdim=True) if first.shape[-1] else first
    seen = lo <= hi  # rows of padding see nothing, or what they like
    return bool(((hi == at) | ~seen).all()) and bool(((lo <= first) | ~seen).all())


KINDS[LAWCAT.kind] = LAWCAT
