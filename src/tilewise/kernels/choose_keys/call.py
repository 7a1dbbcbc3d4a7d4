"""What an engine of the choice of keys receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.tiles import Visibility


@dataclass(frozen=True, eq=False)
class Call:
    """For every query, which keys score highest.

    The score of key t for query i in a list is `sum_h w_hi f(q_hi . k_t)` over the heads h of the list, `f(x)`
    being x above 0 and `slope * x` below, in at least float32. A score that is not a number counts as infinite, so
    that it is chosen, and shows. Of equal scores the lower key is chosen.

    Args:
        q: `[B, H, N_q, D]`, floating; consecutive heads make a list. k: `[B, H_k, N_k, D]`, the same dtype; H_k
            divides the number of lists.
        view: what each query may see, of tokens, for 1 head or as many as divide the lists. Only keys that a query
            sees are chosen.
        top: how many keys to choose. lists: how many lists of each query, a divisor of H.
        weight: floating `[B, H, N_q]`, w; None is 1. slope: 0 to 1; 1 leaves scores as products are.
        most: None chooses exactly the `top` highest, or all where there are fewer. A number chooses what reaches
            `mean + deviation * Q(1 - top / n)` of the n scores that the query sees, Q being the quantiles of the
            normal distribution, so about `top` of them; the highest always and all where there are at most `top`;
            of these the last `most` keys.
        covers: tokens that each key stands for: key t for `t * covers` to `(t + 1) * covers - 1`; it is seen where
            any of them is.
        ends: choose the first and the last key that a query sees, whatever they score. latest: of equal scores
            choose the higher key.
        among: int32 `[B, lists, N_q, M]`, ascending with -1 for none at the end: blocks of `block` consecutive
            keys, in which a query's keys are sought. None: all keys.

    Raises ValueError and TypeError for what does not fit.
    """

    q: Tensor
    k: Tensor
    view: Visibility
    top: int
    lists: int = 1
    weight: Tensor | None = None
    slope: float = 1.0
    most: int | None = None
    covers: int = 1
    ends: bool = False
    latest: bool = False
    among: Tensor | None = None
    block: int = 1

    def __post_init__(self) -> None:
        for name, value in (
            ("top", self.top),
            ("lists", self.lists),
            ("covers", self.covers),
            ("block", self.block),
        ):
            if isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.most is not None and self.most < self.top:
            raise ValueError(f"most must be None or at least top, {self.top}, got {self.most!r}")
        if self.most is not None and self.ends:
            raise ValueError("ends goes with exactly the highest keys: most must be None")
        if not 0 <= self.slope <= 1:
            raise ValueError(f"slope must be in [0, 1], got {self.slope!r}")
        self._check_operands()
        self._check_view()

    def _check_operands(self) -> None:
        q, k = self.q, self.k
        if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise ValueError(
                f"q and k must be [B, H, N_q, D] and [B, H_k, N_k, D], got {list(q.shape)} and {list(k.shape)}"
            )
        if q.dtype != k.dtype or not q.is_floating_point():
            raise TypeError(f"q and k must share a floating dtype, got {q.dtype} and {k.dtype}")
        if q.shape[1] % self.lists or not k.shape[1] or self.lists % k.shape[1]:
            raise ValueError(
                f"lists must divide the {q.shape[1]} heads of q and be a multiple of the {k.shape[1]} of k,"
                f" got {self.lists}"
            )
        if self.weight is not None and self.weight.shape != q.shape[:3]:
            raise ValueError(f"weight must be {list(q.shape[:3])}, got {list(self.weight.shape)}")
        among = self.among
        if among is not None and (among.dtype != torch.int32 or among.shape[:3] != self._rows()):
            raise ValueError(
                f"among must be int32 {[*self._rows(), 'M']}, got {among.dtype} {list(among.shape)}"
            )

    def _check_view(self) -> None:
        view, n_q, n_k = self.view, self.q.shape[2], self.k.shape[2]
        tokens = view.pos.shape[2]
        if view.q_pos.shape[2] != n_q or -(-tokens // self.covers) != n_k:
            raise ValueError(
                f"the view is of {view.q_pos.shape[2]} queries and {tokens} tokens, the call has {n_q} queries and"
                f" {n_k} keys for {self.covers} tokens each"
            )
        for x in (view.lo, view.hi, view.pos, view.dense):
            if x is not None and (x.shape[0] not in (1, self.q.shape[0]) or self.lists % x.shape[1]):
                raise ValueError(
                    f"the view must be for batch 1 or {self.q.shape[0]} and for heads that divide {self.lists}"
                    f" lists, got batch {x.shape[0]} and {x.shape[1]} heads"
                )

    def _rows(self) -> tuple[int, int, int]:
        return (self.q.shape[0], self.lists, self.q.shape[2])

    @property
    def sought(self) -> int:
        """How many keys a query's choice is made from, at most."""
        n_k = self.k.shape[2]
        return n_k if self.among is None else min(n_k, self.among.shape[3] * self.block)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the answer, `[B, lists, N_q, W]`."""
        return (*self._rows(), min(self.top if self.most is None else self.most, self.sought))
