"""The torch engine: chunk by chunk, any device and dtype, memory bounded.

All that can be is done for the tokens of a chunk together; what is left is one multiplication and addition per
token. Factors are exponentials of `delta_t A` alone, so none exceeds 1, whatever decays. The backward pass keeps
the states between chunks and computes those within again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.kernels.selective_scan import op
from tilewise.kernels.selective_scan.call import Call

AT_ONCE = 1 << 20  # numbers in a temporary: 4 MiB of float32


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs and final states of `call`."""
    return op.run(call, "torch")


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator's forward on this engine."""
    out = (call.x.new_empty if call.offsets is None else call.x.new_zeros)(call.x.shape)
    after = _first_states(call)
    for sequences, chunks in _pieces(call):
        state = after[sequences]
        for tokens in chunks:
            made = _Chunk.of(call, tokens, state)
            out[:, tokens] = made.outputs().to(out.dtype)
            state = made.after
        after[sequences] = state
    return out, after


def backward(call: Call, d_out: Tensor, d_state: Tensor) -> op.Gradients:
    """Gradients, from the last chunk to the first; what each chunk computed is computed again."""
    before, d_before = _first_states(call), d_state.to(call.wide).clone()
    d_x, d_delta, d_A, d_B, d_C = map(_zeros, (call.x, call.delta, call.A, call.B, call.C))
    d_D = None if call.D is None else _zeros(call.D)
    for sequences, chunks in _pieces(call):
        befores = [before[sequences]]
        for tokens in chunks[:-1]:
            befores.append(_Chunk.of(call, tokens, befores[-1]).after)
        d_after = d_before[sequences]
        for tokens, start in zip(reversed(chunks), reversed(befores)):
            found = _Chunk.of(call, tokens, start).gradients(d_out[:, tokens], d_after)
            for to, gradient in ((d_x, found.x), (d_delta, found.delta)):
                to[:, tokens] = gradient.to(to.dtype)
            for to, gradient in ((d_B, found.B), (d_C, found.C)):
                to[:, :, tokens] = gradient.to(to.dtype)
            d_A += found.A
            if d_D is not None:
                d_D += found.D
            d_after = found.before
        d_before[sequences] = d_after
    return d_x, d_delta, d_A, d_B, d_C, d_D, None if call.state is None else d_before


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _first_states(call: Call) -> Tensor:
    if call.state is not None:
        return call.state.to(call.wide, copy=True).contiguous()
    return torch.zeros(call.state_shape(), dtype=call.wide, device=call.x.device)


def _pieces(call: Call) -> Iterator[tuple[slice, list[slice]]]:
    """Sequences that go through the same tokens, and these tokens in chunks."""
    batch, n, channels = call.x.shape
    size = max(16, AT_ONCE // max(1, batch * channels * call.A.shape[1]))
    spans = [(slice(0, batch), 0, n)]
    if call.offsets is not None:
        spans = [(slice(i, i + 1), start, end) for i, (_, start, end) in enumerate(call.spans())]
    for sequences, start, end in spans:
        if start < end:
            yield sequences, [slice(t, min(t + size, end)) for t in range(start, end, size)]


@dataclass(frozen=True, eq=False)
class _Found:
    """Gradients of a chunk, in the shapes of the call."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    before: Tensor


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some tokens with all their states. Time comes first, so that a step is contiguous.

    `x` and `delta` are `[n, batch, groups, c]` with c channels to a group, `factors` and `states` (after each
    token) the same with S behind; `A` is `[groups, c, S]`, `B` and `C` `[n, batch, groups, 1, S]`; `before` are the
    states before the first token.
    """

    D: Tensor | None
    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    before: Tensor
    factors: Tensor
    states: Tensor

    @classmethod
    def of(cls, call: Call, tokens: slice, before: Tensor) -> _Chunk:
        groups = call.B.shape[1]
        x, delta = (_by_group(one[:, tokens].to(call.wide), groups) for one in (call.x, call.delta))
        B, C = (one[:, :, tokens].to(call.wide).permute(2, 0, 1, 3).unsqueeze(3) for one in (call.B, call.C))
        A, before = call.A.unflatten(0, (groups, -1)), before.unflatten(1, (groups, -1))
        factors = (delta.unsqueeze(4) * A).exp_()
        states = (delta * x).unsqueeze(4) * B
        last = before
        for factor, state in zip(factors, states):
            last = state.addcmul_(factor, last)
        return cls(call.D, x, delta, A, B, C, before, factors, states)

    @property
    def after(self) -> Tensor:
        """The states after the last token, `[batch, channels, S]`."""
        return self.states[-1].flatten(1, 2)

    def outputs(self) -> Tensor:
        """`[batch, n, channels]`."""
        out = (self.states @ self.C.mT).flatten(2)
        if self.D is not None:
            out = out + self.D * self.x.flatten(2)
        return out.transpose(0, 1)

    def gradients(self, d_out: Tensor, d_after: Tensor) -> _Found:
        """For the gradients of the outputs `[batch, n, channels]` and of the states after the last token."""
        d_out = _by_group(d_out.to(self.x.dtype), self.x.shape[2])
        d_states = d_out.unsqueeze(4) * self.C
        d_states[-1] += d_after.unflatten(1, self.x.shape[2:])
        for t in range(len(d_states) - 1, 0, -1):
            d_states[t - 1].addcmul_(self.factors[t], d_states[t])
        d_in = (d_states @ self.B.mT).squeeze(4)
        # Added up by PyTorch's own sum, in pairs: a matrix product had 1.9 times the definition's error.
        d_B = ((self.delta * self.x).unsqueeze(4) * d_states).sum(3)
        d_C = (d_out.unsqueeze(4) * self.states).sum(3)
        d_states *= self.factors  # now those of the states before each token
        before = d_states[0].flatten(1, 2).clone()
        through = d_states  # and those of the exponents
        through[1:] *= self.states[:-1]
        through[0] = through[0] * self.before
        d_delta = (through * self.A).sum(4) + self.x * d_in
        d_x = self.delta * d_in
        if self.D is not None:
            d_x = d_x + self.D.unflatten(0, (d_x.shape[2], -1)) * d_out
        return _Found(
            d_x.flatten(2).transpose(0, 1),
            d_delta.flatten(2).transpose(0, 1),
            (through * self.delta.unsqueeze(4)).sum((0, 1)).flatten(0, 1),
            d_B.permute(1, 2, 0, 3),
            d_C.permute(1, 2, 0, 3),
            (d_out * self.x).sum((0, 1)).flatten(),
            before,
        )


def _by_group(x: Tensor, groups: int) -> Tensor:
    """`[batch, n, channels]` to `[n, batch, groups, channels of a group]`."""
    return x.transpose(0, 1).unflatten(2, (groups, -1))


op.IMPLEMENTATIONS["torch"] = op.Implementation(forward, backward)
