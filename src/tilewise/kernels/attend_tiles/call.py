"""What an engine of tile attention receives."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def gathered(self) -> Call:
        """This call with paged keys and values copied into sequences; the call itself where there are no pages."""
        if self.pages is None:
            return self
        n = self.view.pos.shape[2]

        def gather(pool: Tensor) -> Tensor:
            return pool[self.pages].transpose(1, 2).flatten(2, 3)[:, :, :n]

        return replace(self, k=gather(self.k), v=gather(self.v), pages=None)
