"""One token of each kind of network, forward and backward, as the torch engine runs it.

`forward(x, r, state)` gets inputs and recurrent sums of each gate and gives the new state and what is kept of
the token; `backward(kept, before, d_state)`, with the output before the token, gives gradients of inputs, of
recurrent sums, and of the state before the token up to what reaches it through the recurrent sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = Sequence[Tensor]


class Step(NamedTuple):
    """Both directions of a kind."""

    forward: Callable[[Tensors, Tensors, Tensors], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    backward: Callable[[Tensors, Tensor, Tensors], tuple[Tensors, Tensors, list[Tensor]]]


def _sigmoid_slope(y: Tensor) -> Tensor:
    return y * (1 - y)


def _tanh_slope(y: Tensor) -> Tensor:
    return 1 - y * y


def _elman(x, r, state):
    h = (x[0] + r[0]).tanh()
    return (h,), (h,)


def _elman_back(kept, before, d_state):
    by_sum = d_state[0] * _tanh_slope(kept[0])
    return [by_sum], [by_sum], [torch.zeros_like(by_sum)]


def _lstm(x, r, state):
    i, f, z, o = (a + b for a, b in zip(x, r))
    i, f, z, o = i.sigmoid(), f.sigmoid(), z.tanh(), o.sigmoid()
    c = f * state[1] + i * z
    return (o * c.tanh(), c), (i, f, z, o, state[1])


def _lstm_back(kept, before, d_state):
    i, f, z, o, c_before = kept
    read = (f * c_before + i * z).tanh()
    d_h, d_c = d_state
    d_c = d_c + d_h * o * _tanh_slope(read)
    sums = [
        d_c * z * _sigmoid_slope(i),
        d_c * c_before * _sigmoid_slope(f),
        d_c * i * _tanh_slope(z),
        d_h * read * _sigmoid_slope(o),
    ]
    return sums, sums, [torch.zeros_like(d_h), d_c * f]


def _gru(x, r, state):
    reset, update = (x[0] + r[0]).sigmoid(), (x[1] + r[1]).sigmoid()
    new = (x[2] + reset * r[2]).tanh()
    return ((1 - update) * new + update * state[0],), (reset, update, new, r[2])


def _gru_back(kept, before, d_state):
    reset, update, new, read = kept
    d_h = d_state[0]
    d_new = d_h * (1 - update) * _tanh_slope(new)
    d_reset, d_update = d_new * read * _sigmoid_slope(reset), d_h * (before - new) * _sigmoid_slope(update)
    return [d_reset, d_update, d_new], [d_reset, d_update, d_new * reset], [d_h * update]


def _slstm(x, r, state):
    _, c_before, n_before, m = state
    i, f, z, o = (a + b for a, b in zip(x, r))
    decayed = torch.where(n_before == 0, -torch.inf, F.logsigmoid(f) + m)
    peak = torch.maximum(decayed, i)
    write, keep, z, o = (i - peak).exp(), (decayed - peak).exp(), z.tanh(), o.sigmoid()
    c, n = keep * c_before + write * z, keep * n_before + write
    return (o * c / n, c, n, peak), (write, keep, z, o, (-f).sigmoid(), c_before, n_before)


def _slstm_back(kept, before, d_state):
    write, keep, z, o, forgets, c_before, n_before = kept
    d_h, d_c, d_n, d_m = d_state
    n = keep * n_before + write
    read = (keep * c_before + write * z) / n
    d_read = d_h * o / n
    d_c, d_n = d_c + d_read, d_n - d_read * read
    by_write, by_keep = (d_c * z + d_n) * write, (d_c * c_before + d_n * n_before) * keep
    # The peak is one of the two logs, whose own factor is then 1 whatever it is.
    decayed = keep == 1
    d_i = torch.where(decayed, by_write, d_m - by_keep)
    d_decayed = torch.where(decayed, d_m - by_write, by_keep)
    sums = [d_i, d_decayed * forgets, d_c * write * _tanh_slope(z), d_h * read * _sigmoid_slope(o)]
    return sums, sums, [torch.zeros_like(d_h), d_c * keep, d_n * keep, d_decayed]


STEPS = {
    "elman": Step(_elman, _elman_back),
    "lstm": Step(_lstm, _lstm_back),
    "gru": Step(_gru, _gru_back),
    "slstm": Step(_slstm, _slstm_back),
}
