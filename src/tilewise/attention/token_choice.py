"""What methods share that choose tokens for each query: visible keys row by row, and lists of the chosen ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilewise.attention.plans import Pass, Plan
from tilewise.attention.precisions import Applied
from tilewise.attention.reads import Lists
from tilewise.kernels.attend_tiles import Call
from tilewise.tiles import Partial, Visibility
from tilewise.tiles.visibility import to_heads

AT_ONCE = 1 << 23  # numbers in a temporary: 32 MiB of float32


@dataclass(frozen=True, eq=False)
class TokenLists(Lists):
    """`Lists` under any bias: of the bias, too, only what the lists name is read, N_q x K of it.

    Args:
        even: fill short lists with entries of weight 0. Engines share work among threads by its amount, and a
            query that two threads share rounds otherwise than one that does not; where lengths of lists depend on
            what tokens hold, rounding would then depend on later tokens.
    """

    even: bool = False

    def apply(self, call: Call) -> Applied:
        given, low = (call.q, call.k, call.v, call.bias), call.v.dtype in (torch.float16, torch.bfloat16)
        trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
        if not (trains and low):
            return self._listed(call, trains)
        # Gathered keys are many copies of few: their gradients are added up in float32, and rounded once.
        dtype, bias = call.v.dtype, None if call.bias is None else call.bias.float()
        wide = replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float(), bias=bias)
        made, restore = self._listed(wide, trains)

        def narrow(partial: Partial) -> Partial:
            partial = restore(partial)
            return partial._replace(out=partial.out.to(dtype))

        return Applied(made, narrow)

    def _listed(self, call: Call, trains: bool) -> Applied:
        if call.bias is None and not self.even:
            return super().apply(call)
        lists = self
        if self.even and self.index.shape[3]:
            some = self.index.amax(-1, keepdim=True)  # any token that the query reads
            lists = replace(self, index=torch.where(self.index < 0, some, self.index))
        made, restore = Lists.apply(lists, replace(call, bias=None))
        if trains:
            made = made.gathered()
        return Applied(replace(made, bias=self._bias(call)), restore)

    def _bias(self, call: Call) -> Tensor:
        """The bias of each entry of each list: `[B * H * N_q, query heads of a list, 1, K]`."""
        (b, heads, n_q, _), n_k = call.q.shape, call.k.shape[2]
        groups, listed = self.index.shape[1], self.index.shape[3]
        index = self.index.expand(b, -1, -1, -1).repeat_interleave(heads // groups, 1)
        given = call.q.new_zeros(()) if call.bias is None else call.bias
        given = given.expand(b, heads, n_q, n_k).gather(3, index.clamp(min=0))
        rows = (
            given.masked_fill(index < 0, -torch.inf).unflatten(1, (groups, heads // groups)).transpose(2, 3)
        )
        return rows.reshape(b * groups * n_q, heads // groups, 1, listed)


def lists_plan(index: Tensor, view: Visibility, even: bool = False) -> Plan:
    """The plan that reads lists `[B, H, N_q, K]` of keys chosen among those that `view` shows, -1 for none.

    Where a boolean grid hid keys, the lists know it already. `even` as in `TokenLists`.
    """
    return Plan((Pass(replace(view, dense=None, simple=None), reads=TokenLists(index, even)),), view)


def shared(view: Visibility, heads: int, groups: int) -> int:
    """How many lists serve `heads` query heads where `groups` would do: all of them if each has its own mask."""
    told = max(x.shape[1] for x in (view.lo, view.pos, view.dense) if x is not None)
    return max(groups, told) if told in (1, groups) else heads


def choose_by_rows(
    choose: Callable[[slice], Tensor], q: Tensor, groups: int, width: int, numbers: int
) -> Tensor:
    """Lists `[B, groups, N_q, width]` from those of some queries at a time, so that temporaries stay bounded.

    `numbers` is what `choose` holds at once for each query of a batch entry. One slice inside a graph, where a loop
    over lengths would compile again for each.
    """
    b, _, n_q, _ = q.shape
    if torch.compiler.is_compiling():
        return choose(slice(0, n_q))
    step = max(1, AT_ONCE // max(1, b * numbers))
    made = [choose(slice(start, start + step)) for start in range(0, n_q, step)]
    return torch.cat(made, 2) if made else torch.full((b, groups, 0, width), -1, device=q.device)


def visible(view: Visibility, rows: slice, n_q: int, groups: int) -> Tensor:
    """Which keys those queries see: bool `[B|1, groups|1, rows, N_k]`."""
    some = torch.arange(n_q, device=view.pos.device)[rows].view(1, 1, -1)
    seen = view.permute(some, None).tokens()
    return to_heads(seen, groups)


def compact(keep: Tensor, most: int) -> Tensor:
    """The places of True in each row of `keep [..., N]`, the last `most` of them, as int64 `[..., most]`.

    In linear time, and in the order of the row; -1 fills what is left.
    """
    n = keep.shape[-1]
    after = keep.long().flip(-1).cumsum(-1).flip(-1)  # how many are kept from here on
    place = torch.where(keep & (after <= most), most - after, most)
    index = torch.arange(n, device=keep.device).expand_as(place)
    listed = torch.full((*keep.shape[:-1], most + 1), -1, dtype=torch.int64, device=keep.device)
    return listed.scatter(-1, place, index)[..., :most]
