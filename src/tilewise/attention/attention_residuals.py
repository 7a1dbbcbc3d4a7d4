"""Attention residuals: each layer reads a softmax over the outputs of the layers before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tilewise.tiles import Partial, merge


@dataclass(frozen=True, eq=False)
class DepthState:
    """What attention residuals keep between layers. Nothing in it is changed, so a network can be cut anywhere.

    Attributes:
        sources: finished representations, the embedding first, each `[..., dim]` in the embedding's dtype.
        scales: `[..., 1]` for each source, RMSNorm's factor for it, in at least float32.
        partial: sum of the outputs in the block under way, float32 (float64 for such inputs); None at its start.
        layer: the layer that reads next; the number of layers stands for the output.
        two_phase: whether layers of a group share their reading of the sources finished before it.
        ahead: in two phases, that reading: out `[layers of the group, ..., dim]`, lse `[layers of the group, ...]`.
        first: first layer of the group that `ahead` is for.
        covered: how many of the sources `ahead` has read.
    """

    sources: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    partial: Tensor | None = None
    layer: int = 0
    two_phase: bool = False
    ahead: Partial | None = None
    first: int = 0
    covered: int = 0

    @property
    def kept(self) -> int:
        """Representations held: finished ones and the sum under way, without `ahead`."""
        return len(self.sources) + (self.partial is not None)

    @property
    def bytes(self) -> int:
        """Bytes held, those of `ahead` included."""
        held = [*self.sources, *self.scales, *(self.ahead or ())]
        held += [] if self.partial is None else [self.partial]
        return sum(x.numel() * x.element_size() for x in held)


def attend_depth(queries: Tensor, sources: Sequence[Tensor], scales: Sequence[Tensor]) -> Partial:
    """Softmax over `sources`, at least one, each `[..., dim]`, for every one of `queries [S, dim]`.

    The score of a source v is `query . v` times its scale `[..., 1]` (see `key_scale`), the value is v itself.
    Returns a `Partial` with out `[S, ..., dim]` and lse `[S, ...]`, float32, or float64 where the sources are.
    """
    if sources[0].dtype in (torch.float16, torch.bfloat16) and torch.is_grad_enabled():
        # Their float32 copies, one for each layer that reads, would outweigh the sources: made again backward.
        return Partial(*checkpoint(_attend_depth, queries, sources, scales, use_reentrant=False))
    return Partial(*_attend_depth(queries, sources, scales))


def key_scale(source: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(source^2) + eps)` over the last axis, `[..., 1]`, in at least float32: RMSNorm's factor."""
    return torch.rsqrt(source.to(_wide(source)).square().mean(-1, keepdim=True) + eps)


def _attend_depth(
    queries: Tensor, sources: Sequence[Tensor], scales: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    dtype = _wide(sources[0])
    columns = queries.to(dtype).mT
    # Scaled after the product and added up one by one, so that backward keeps the sources and no copies of them.
    scores = [(source.to(dtype) @ columns) * scale for source, scale in zip(sources, scales)]
    stacked = torch.stack(scores).movedim(-1, 1)  # [sources, S, ...]
    lse = stacked.logsumexp(0)
    weights = (stacked - lse).exp().unsqueeze(-1)
    out = weights[0] * sources[0].to(dtype)
    for weight, source in zip(weights[1:], sources[1:]):
        out = out + weight * source.to(dtype)
    return out, lse


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class AttentionResiduals(nn.Module):
    """Residual connections with softmax weights over depth (Kimi Team, 2026, arXiv 2603.15031).

    A plain network gives layer l the sum of the embedding and of all outputs before it. Here it gets
    `sum_i a_i v_i`, with `a = softmax_i(w_l . RMSNorm_l(v_i))`, where v_0 is the embedding and w_l a learned
    vector, the layer's pseudo-query. Weights depend on the token through the keys. With `block` 1 each v_i is the
    output of one layer (the paper's full form). Otherwise layers stand in blocks of that size: v_i is the sum of
    the outputs of a block, and a layer within a block also sees the sum of its block so far (the block form). A
    layer is whatever adds to the residual stream: attention and MLP count apart. One more query reads the output.

    Queries start at 0, so that weights are equal: with layers that normalise their input the network then is the
    plain one, as the mean has the direction of the sum. What a layer reads never has a larger norm than the largest
    source, where a sum grows with depth.

    Queries do not depend on the input. In two phases the layers of a group read the sources that were finished
    before the group together, and then what the group itself adds layer by layer; `merge` joins the two exactly.

    Differs from the paper: sums under way are kept in float32; a group of the block form may hold several blocks;
    for 16-bit inputs a reading's intermediates are made again in the backward pass rather than kept.

    Args:
        layers: of the network. dim: width of the residual stream. block: layers per block.
        group: layers that read together in two phases, a multiple of `block`; None is `block`. The paper's full
            form in two phases is `block` 1 with a larger `group`.
        eps: added to mean squares in RMSNorm.

    Attributes:
        query: `[layers + 1, dim]`, zeros. gain: `[layers + 1, dim]`, factors of each layer's RMSNorm, ones.

    Raises ValueError for sizes below 1 and a group that blocks do not fill.
    """

    def __init__(
        self, layers: int, dim: int, block: int = 1, *, group: int | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__()
        group = block if group is None else group
        for name, value in (("layers", layers), ("dim", dim), ("block", block), ("group", group)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if group % block:
            raise ValueError(f"group must be a multiple of block {block}, got {group}")
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps!r}")
        self.layers, self.dim, self.block, self.group, self.eps = layers, dim, block, group, eps
        self.query = nn.Parameter(torch.zeros(layers + 1, dim))
        self.gain = nn.Parameter(torch.ones(layers + 1, dim))

    def extra_repr(self) -> str:
        return f"layers={self.layers}, dim={self.dim}, block={self.block}, group={self.group}, eps={self.eps}"

    def start(self, x: Tensor, *, two_phase: bool = False) -> DepthState:
        """The state before the first layer, from the embedding `x [..., dim]`."""
        if not isinstance(x, Tensor) or x.ndim < 1 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(f"x must be a floating tensor [..., {self.dim}], got {_describe(x)}")
        return self._open(DepthState((x,), (key_scale(x, self.eps),), two_phase=two_phase))

    def read(self, state: DepthState) -> Tensor:
        """What the layer `state.layer` gets, `[..., dim]`; after the last layer, the network's output."""
        fresh, scales = (x[state.covered :] for x in self._all(state))
        parts = []
        if state.ahead is not None:
            at = state.layer - state.first
            parts.append(Partial(state.ahead.out[at], state.ahead.lse[at]))
        if fresh:
            own = self._attend(state.layer, state.layer + 1, fresh, scales)
            parts.append(Partial(own.out[0], own.lse[0]))
        return merge(parts).out.to(state.sources[0].dtype)

    def write(self, state: DepthState, out: Tensor) -> DepthState:
        """The state after the layer `state.layer` gave `out`, of the embedding's shape."""
        like = state.sources[0]
        if state.layer >= self.layers:
            raise ValueError(f"all {self.layers} layers have written")
        if not isinstance(out, Tensor) or out.shape != like.shape or out.dtype != like.dtype:
            raise ValueError(
                f"out must be like the embedding, {_describe(like)}, got {_describe(out)} from layer {state.layer}"
            )
        layer, sources, partial = state.layer + 1, state.sources, state.partial
        if layer % self.block:
            wide = out.to(_wide(out))
            return replace(state, partial=wide if partial is None else partial + wide, layer=layer)
        whole = out if partial is None else (partial + out).to(like.dtype)
        scales = (*state.scales, key_scale(whole, self.eps))
        return self._open(replace(state, sources=(*sources, whole), scales=scales, partial=None, layer=layer))

    def forward(
        self, x: Tensor, layers: Sequence[Callable[[Tensor], Tensor]], *, two_phase: bool = False
    ) -> Tensor:
        """The output of a network of these layers, `[..., dim]`; each maps `[..., dim]` to the same shape.

        Raises ValueError for another number of layers, and for a layer whose output has another shape or dtype.
        """
        if len(layers) != self.layers:
            raise ValueError(f"layers must be {self.layers} functions, got {len(layers)}")
        state = self.start(x, two_phase=two_phase)
        for layer in layers:
            state = self.write(state, layer(self.read(state)))
        return self.read(state)

    def weights(self, state: DepthState) -> Tensor:
        """The weights by which `read` adds up, `[sources, ...]`, the sum under way last. For drawings and tests."""
        each = zip(*self._all(state))
        scores = [self._attend(state.layer, state.layer + 1, [v], [scale]).lse[0] for v, scale in each]
        return torch.stack(scores).softmax(0)

    def kept(self, layer: int) -> int:
        """Representations held when `layer` reads: the embedding, and one for each block begun before it."""
        if not 0 <= layer <= self.layers:
            raise ValueError(f"layer must be in 0..{self.layers}, got {layer!r}")
        return 1 + -(-layer // self.block)

    def reads(self, *, two_phase: bool = False) -> int:
        """Representations read in one pass through the network, the output's reading included."""
        if not two_phase:
            return sum(self.kept(layer) for layer in range(self.layers + 1))
        first = [layer - layer % self.group for layer in range(self.layers + 1)]
        together = sum(self.kept(layer) for layer in set(first))
        return together + sum(self.kept(layer) - self.kept(f) for layer, f in enumerate(first))

    def transfers(self, ranks: int, turns: int = 1, *, cache: bool = True) -> int:
        """Finished representations sent between pipeline stages in one pass through the network.

        Layers are cut evenly into `ranks * turns` stages, and stage c runs on rank `c % ranks` (an interleaved
        schedule). Without `cache` every stage is sent all representations finished so far; with it a rank keeps
        those it was sent in its last turn, and gets the rest. The sum under way, which any network sends, is not
        counted. Raises ValueError unless the stages divide the layers.
        """
        stages = ranks * turns
        if ranks < 1 or turns < 1 or self.layers % stages:
            raise ValueError(f"ranks * turns must divide {self.layers} layers, got {ranks} * {turns}")
        finished = [1 + stage * (self.layers // stages) // self.block for stage in range(stages)]
        held = [finished[stage - ranks] for stage in range(ranks, stages)] if cache else []
        return sum(finished[1:]) - sum(held) if ranks > 1 else 0

    def _all(self, state: DepthState) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Sources and scales, the sum under way last."""
        if state.partial is None:
            return state.sources, state.scales
        return (*state.sources, state.partial), (*state.scales, key_scale(state.partial, self.eps))

    def _attend(self, first: int, end: int, sources: Sequence[Tensor], scales: Sequence[Tensor]) -> Partial:
        """What the layers first..end - 1 get from `sources`."""
        return attend_depth(self.query[first:end] * self.gain[first:end], sources, scales)

    def _open(self, state: DepthState) -> DepthState:
        """In two phases, at the start of a group: its layers' reading of all sources finished so far."""
        if not state.two_phase or state.layer % self.group:
            return state
        end = min(state.layer + self.group, self.layers + 1)
        ahead = self._attend(state.layer, end, state.sources, state.scales)
        return replace(state, ahead=ahead, first=state.layer, covered=len(state.sources))


def _describe(x) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
