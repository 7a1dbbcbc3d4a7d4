"""The torch engine: chunk by chunk, as matrix products; any device and dtype, memory bounded.

Within a chunk the recurrence is unrolled. The scores of a query and an earlier key are
`A_ts = sum_d q_td k_sd exp(decay_d from s to t)`, and outputs are `A u` plus what the state before the chunk gives;
`u` is `beta v` for rule "add", and for rule "delta" solves the triangular system `(I + beta B) u = beta (v - k S)`,
with B the scores of keys and earlier keys (the UT transform of Yang et al., 2024). With decays by channel a block
of scores is split in halves again and again, each pair being scored relative to the border that separates it: the
secondary chunking of Yang et al. (2023), down to single tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.kernels.scan import op
from tilewise.kernels.scan.call import Call
from tilewise.kernels.scan.chunks import Cut, Part
from tilewise.kernels.scan.pairs import Pairs, from_here, so_far


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs and final states of `call`."""
    return op.run(call, "torch")


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator's forward on this engine."""
    cut = Cut.of(call)
    out = call.q.new_empty(*call.q.shape[:3], call.v.shape[3])
    if call.offsets is not None:
        out.zero_()  # tokens that belong to no sequence
    state = cut.sorted(_first_state(call))
    for part in cut.parts:
        made = _Unrolled.of(call, part, state)
        part.put(out, made.outputs())
        state = made.final
    return out, cut.restored(state)


def backward(call: Call, d_out: Tensor, d_state: Tensor) -> op.Gradients:
    """Gradients, from the last part to the first; what each part computed is computed again."""
    cut = Cut.of(call)
    state, before = cut.sorted(_first_state(call)), []
    for part in cut.parts:
        before.append(state)
        state = _Unrolled.of(call, part, state).final
    given = (call.q, call.k, call.v, call.decay, call.beta)
    gradients = [None if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in given]
    d_state = cut.sorted(d_state.to(call.wide))
    for part, start in zip(reversed(cut.parts), reversed(before)):
        *found, d_state = _Unrolled.of(call, part, start).gradients(part.take(d_out), d_state)
        for to, gradient in zip(gradients, found):
            if to is not None:
                part.put(to, gradient)
    return (*gradients, None if call.state is None else cut.restored(d_state))  # type: ignore[return-value]


def _first_state(call: Call) -> Tensor:
    if call.state is not None:
        return call.state.to(call.wide)
    return torch.zeros(call.state_shape(), dtype=call.wide, device=call.q.device)


@dataclass(frozen=True, eq=False)
class _Unrolled:
    """A part of a call, computed up to its outputs.

    Rows are chunks; `q [rows, H, G, tile, D_k]` is scaled, `k` and `v` are `[rows, H, 1, tile, *]`. `states` are
    those before each chunk, `final` those of all sequences after the part. `rest` is what the delta rule leaves of
    a value, `u` that times beta; `inverse` that of the triangular system, None for rule "add".
    """

    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None  # [rows, H, 1, tile, 1]
    pairs: Pairs
    counts: list[int]
    states: Tensor  # [rows, H, 1, D_k, D_v]
    final: Tensor
    u: Tensor
    rest: Tensor
    inverse: Tensor | None

    @classmethod
    def of(cls, call: Call, part: Part, state: Tensor) -> _Unrolled:
        wide = call.wide
        q, k, v = (part.take(x).to(wide) for x in (call.q, call.k, call.v))
        q = call.scale * q.unflatten(1, (k.shape[1], -1))
        decay = None if call.decay is None else part.take(call.decay)
        beta = None if call.beta is None else part.take(call.beta).unsqueeze(2).unsqueeze(4)
        pairs = Pairs.of(decay, k)
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        u, mixed, inverse = v if beta is None else beta * v, None, None
        scores = k
        if call.rule == "delta":
            scores = pairs.scores(k, k).tril(-1)
            system, mixed = scores, k * pairs.before.unsqueeze(2)
            if beta is not None:
                system, mixed = beta * system, beta * mixed
            eye = torch.eye(k.shape[3], dtype=wide, device=k.device).expand_as(system)
            inverse = torch.linalg.solve_triangular(eye + system, eye, upper=False, unitriangular=True)
            u, mixed = inverse @ u, inverse @ mixed
        kept = (k * pairs.after.unsqueeze(2)).mT
        states, values, finished, row = [], [], [], 0
        for count in part.counts:
            if count < state.shape[0]:
                finished.append(state[count:])
                state = state[:count]
            rows = slice(row, row + count)
            own = u[rows, :, 0] if mixed is None else u[rows, :, 0] - mixed[rows, :, 0] @ state
            states.append(state)
            values.append(own)
            state = pairs.total[rows] * state + kept[rows, :, 0] @ own
            row += count
        started, u = torch.cat(states).unsqueeze(2), torch.cat(values).unsqueeze(2)
        rest = v
        if inverse is not None:
            rest = v - (k * pairs.before.unsqueeze(2)) @ started - scores @ u
        final = torch.cat([state, *reversed(finished)])
        return cls(call.scale, q, k, v, beta, pairs, part.counts, started, final, u, rest, inverse)

    def outputs(self) -> Tensor:
        """`[rows, H_q, tile, D_v]`."""
        out = (self.q * self.pairs.before.unsqueeze(2)) @ self.states
        return (out + self.pairs.scores(self.q, self.k).tril() @ self.u).flatten(1, 2)

    def gradients(self, d_out: Tensor, d_state: Tensor) -> tuple[Tensor, ...]:
        """Those of q, k, v, decay and beta in rows, and of the states before the part, given that of the outputs
        and of the states after it. Those of decay and beta mean nothing where there is none."""
        q, k, pairs = self.q, self.k, self.pairs
        before, after = pairs.before.unsqueeze(2), pairs.after.unsqueeze(2)
        d_out = d_out.to(q.dtype).unflatten(1, (k.shape[1], -1))  # [r, h, g, c, d_v]
        d_u = (pairs.scores(q, k).tril().mT @ d_out).sum(2)  # [r, h, c, d_v]
        d_read = ((q * before).mT @ d_out).sum(2)  # of the states before each chunk, [r, h, d_k, d_v]
        d_values, d_afters = self._backwards(
            d_u, d_read, (k * after)[:, :, 0], (k * before)[:, :, 0].mT, d_state
        )
        *d_chunks, d_state = d_afters
        d_after, d_u = torch.cat(d_chunks).unsqueeze(2), torch.cat(d_values).unsqueeze(2)
        beta = 1 if self.beta is None else self.beta
        d_v, d_beta = beta * d_u, (d_u * self.rest).sum((2, 4))
        d_q, d_k = before * (d_out @ self.states.mT), after * (self.u @ d_after.mT)
        through = (self.states * d_after).sum(-1).unsqueeze(3) * pairs.total.mT.unsqueeze(2)
        gate = pairs.together(through + from_here((q * d_q).sum(2, keepdim=True)) + so_far(k * d_k))
        by_q, by_k, by_pairs = pairs.gradients((d_out @ self.u.mT).tril(), q, k)
        d_q, d_k, gate = d_q + by_q, d_k + by_k, gate + by_pairs
        if self.inverse is not None:  # keys are queries as well, whose outputs are taken from the values
            d_read = before * (-d_v @ self.states.mT)
            gate = gate + pairs.together(from_here(k * d_read))
            by_q, by_k, by_pairs = pairs.gradients((-d_v @ self.u.mT).tril(-1), k, k)
            d_k, gate = d_k + d_read + by_q + by_k, gate + by_pairs
        if pairs.decay is not None and pairs.decay.ndim == 3:
            gate = gate.squeeze(4)
        return self.scale * d_q.flatten(1, 2), d_k[:, :, 0], d_v[:, :, 0], gate[:, :, 0], d_beta, d_state

    def _backwards(self, d_u, d_read, kept, mixed, d_state) -> tuple[list[Tensor], list[Tensor]]:
        """From the last step to the first: what reaches the values, and the states after each chunk; the last of
        these is that of the states before the part."""
        d_values: list[Tensor] = []
        d_afters: list[Tensor] = []
        row = sum(self.counts)
        here = d_state[: self.counts[-1]]
        for count in reversed(self.counts):
            rows = slice(row - count, row)
            here = torch.cat((here, d_state[here.shape[0] : count]))
            own = d_u[rows] + kept[rows] @ here
            d_afters.append(here)
            here = self.pairs.total[rows] * here + d_read[rows]
            if self.inverse is not None:
                own = self.inverse[rows, :, 0].mT @ own
                taken = own if self.beta is None else self.beta[rows, :, 0] * own
                here = here - mixed[rows] @ taken
            d_values.append(own)
            row -= count
        first = torch.cat((here, d_state[here.shape[0] :]))
        return d_values[::-1], [*d_afters[::-1], first]


op.IMPLEMENTATIONS["torch"] = op.Implementation(forward, backward)
