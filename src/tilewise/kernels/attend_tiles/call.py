"""What an engine of tile attention receives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilewise.tiles import TileMap, Visibility


@dataclass(frozen=True, eq=False)
class Call:
    """One pass of attention over chosen tiles.

    Args:
        q: `[B, H_q, N_q, D]`; k: `[B, H_kv, N_k, D]`; v: `[B, H_kv, N_k, D_v]`, any strides, one floating dtype.
        view: what each query may see, in the tokens' own order.
        tiles: the tiles to compute, cut in the permuted order; None computes all that is visible.
        q_order: int64 `[B|1, H_q|1, N_q]`, which query stands at each place of the query axis; None = as given.
        k_order: int64 `[B|1, H_kv|1, N_k]`, the same for keys.
        bias: additive, floating, `[B|1, H_q|1, N_q|1, N_k|1]`, in the tokens' own order; None = none.
        scale: factor of the scores. softcap: scores become softcap * tanh(scores / softcap); None = no cap.
        need_lse: whether the caller wants the log-sum-exp.
        pages: int64 `[B, P]` for a paged cache; k and v are then pools `[pages, H_kv, S, D]` of pages of S tokens,
            and entry j of row b is the page of sequence b's tokens j * S to (j + 1) * S - 1. `view` says how many
            tokens there are. None: k and v are the sequences themselves.
        unified_max: a guess of the largest scaled score, by which an engine may take all partial softmaxes of a
            decoding call, so that none waits for another's maximum; it changes nothing but rounding.
        q_scale, k_scale: float32 `[B, H_q, N_q]` and `[B, H_kv, N_k]`. With them q and k are int8, a query or key
            being its row times its scale; v keeps its dtype, which is that of the output. None: no scales.
        bias_rows: how many consecutive queries share a row of the bias; it then has ceil(N_q / bias_rows) rows.
        weights: a dtype that weights are rounded to before they meet the values, relative to their row's largest,
            which becomes the largest number of the dtype; sums are taken of what they were. None: not rounded, or
            as the engine multiplies.
        lists: int32 or int64 `[B|1, H_l, N_q, K]`, the keys that each query reads, -1 for none and no key twice;
            H_l is 1, H_kv or H_q, consecutive query heads sharing a list. Limits and positions of the view are then
            those of the lists, `[B|1, H_l|1, ...]`, and there are no tiles, orders and pages. None: every key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    view: Visibility
    tiles: TileMap | None = None
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    need_lse: bool = True
    pages: Tensor | None = None
    unified_max: float | None = None
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    bias_rows: int = 1
    weights: torch.dtype | None = None
    lists: Tensor | None = None

    def gathered(self) -> Call:
        """This call with paged keys and values copied into sequences; the call itself where there are no pages."""
        if self.pages is None:
            return self
        n = self.view.pos.shape[2]

        def gather(pool: Tensor) -> Tensor:
            return pool[self.pages].transpose(1, 2).flatten(2, 3)[:, :, :n]

        return replace(self, k=gather(self.k), v=gather(self.v), pages=None)

    def dequantised(self) -> Call:
        """This call with int8 operands turned into floating ones; the call itself where there are none."""
        if self.q_scale is None or self.k_scale is None:
            return self
        wide = torch.float64 if self.v.dtype == torch.float64 else torch.float32
        q, k = (x.to(wide) * s.unsqueeze(3) for x, s in ((self.q, self.q_scale), (self.k, self.k_scale)))
        return replace(self, q=q, k=k, q_scale=None, k_scale=None)

    def refuse_gradients(self) -> None:
        """Raise ValueError where this call has operands that no gradient flows to."""
        if self.pages is not None:
            raise ValueError("a paged cache takes no gradients")
        if self.lists is not None:
            raise ValueError("lists of keys take no gradients")
        if self.q_scale is not None or self.weights is not None or self.bias_rows != 1:
            raise ValueError("quantised attention takes no gradients")


def rounded(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`weights`, whose largest is 1, in the steps of `dtype` where 1 is its largest number; in their own dtype."""
    most = torch.finfo(dtype).max
    return (weights * most).to(dtype).to(weights.dtype) / most
