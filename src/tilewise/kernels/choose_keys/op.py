"""The custom operator `tilewise::choose_keys`, shared by the engines; it stays whole inside torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.kernels.choose_keys.call import Call
from tilewise.tiles import Visibility

IMPLEMENTATIONS: dict[str, Callable[[Call], Tensor]] = {}


def run(call: Call, engine: str) -> Tensor:
    """Run `call` on the registered engine through the custom operator; without gradients."""
    return torch.ops.tilewise.choose_keys(*pack(call), engine)


def pack(call: Call) -> tuple:
    """The operator's arguments for `call`, without the engine."""
    view = call.view
    operands = (x.detach() for x in (call.q, call.k))
    weight = None if call.weight is None else call.weight.detach()
    seen = (view.lo, view.hi, view.pos, view.q_pos, view.dense, call.covers)
    rule = (call.top, call.lists, float(call.slope), call.most, call.ends, call.latest)
    return (*operands, weight, *seen, *rule, call.among, call.block)


def unpack(q, k, weight, lo, hi, pos, q_pos, dense, covers, top, lists, slope, most, ends, latest, among,
           block) -> Call:  # fmt: skip
    """The Call for the operator's arguments."""
    view = Visibility(lo, hi, pos, q_pos, dense)
    return Call(q, k, view, top, lists, weight, slope, most, covers, ends, latest, among, block)


@torch.library.custom_op("tilewise::choose_keys", mutates_args=())
def choose_keys(
    q: Tensor, k: Tensor, weight: Tensor | None, lo: Tensor, hi: Tensor, pos: Tensor, q_pos: Tensor,
    dense: Tensor | None, covers: int, top: int, lists: int, slope: float, most: int | None, ends: bool,
    latest: bool, among: Tensor | None, block: int, engine: str,
) -> Tensor:  # fmt: skip
    """`tilewise::choose_keys`: the keys that the packed call chooses, on the named engine."""
    call = unpack(q, k, weight, lo, hi, pos, q_pos, dense, covers, top, lists, slope, most, ends, latest, among,
                  block)  # fmt: skip
    return IMPLEMENTATIONS[engine](call)


@choose_keys.register_fake
def _(q, k, *rest):
    *given, _ = rest  # without the engine
    return q.new_empty(unpack(q, k, *given).shape, dtype=torch.int32)
