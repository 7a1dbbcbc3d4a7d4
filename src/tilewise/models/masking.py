"""Hugging Face's mask functions as boxes of positions, in O(N) instead of an N x N grid.

transformers composes a mask from small functions (causal, sliding window, chunks, packed sequences, padding)
and asks a mask interface to realise it. Ours reads the composition and returns, per query, the range of key
positions it may see. A composition it does not know is realised as the boolean grid that transformers makes
for its own attention: right for any model, with that memory cost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import masking_utils

from tilewise.tiles.masks import Mask
from tilewise.tiles.visibility import FAR, HIDDEN, Visibility


def box_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    **kwargs,
) -> Tensor | None:
    """The mask interface: None for plain causal attention over equal ends, else an encoded or boolean tensor.

    The encoding is int64 `[B|1, 1, N_q + N_k, 2]`: (first, last) visible position of each query, then every
    key's position twice. It is a 4-D tensor so that models pass it through untouched.
    """
    if attention_mask is not None and bool(attention_mask.all()) and attention_mask.shape[1] >= kv_length:
        attention_mask = None
    same_end = isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length
    if mask_function is masking_utils.causal_mask_function and attention_mask is None and same_end:
        return None
    q_pos = torch.arange(q_length, device=device) + q_offset
    limits = _limits(mask_function, q_pos.view(1, -1))
    if limits is None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device or "cpu",
        )
    k_pos = torch.arange(kv_offset, kv_offset + kv_length, device=device).view(1, -1)
    if attention_mask is not None:
        keep = attention_mask.to(device=device, dtype=torch.bool)
        keep = pad(
            keep, (0, max(0, kv_offset + kv_length - keep.shape[1]))
        )  # slots of a static cache, unused yet
        k_pos = k_pos.masked_fill(~keep[:, kv_offset : kv_offset + kv_length], HIDDEN)
    queries = torch.stack(torch.broadcast_tensors(*limits), -1)  # [b, n_q, 2]
    keys = torch.stack((k_pos, k_pos), -1)
    batch = max(len(queries), len(keys))
    return torch.cat([queries.expand(batch, -1, -1), keys.expand(batch, -1, -1)], 1).unsqueeze(1)


@dataclass(frozen=True, eq=False)
class BoxMask(Mask):
    """A mask given by what `box_mask` encoded: `encoded [B|1, 1, N_q + N_k, 2]`."""

    encoded: Tensor
    n_q: int

    def narrow(self, view: Visibility) -> Visibility:
        queries, keys = self.encoded[:, :, : self.n_q], self.encoded[:, :, self.n_q :]
        lo, hi = queries[..., :1], queries[..., 1:]
        return replace(view, lo=lo, hi=hi, pos=keys[..., :1], simple=None)


def _limits(mask_function: Callable, q_pos: Tensor) -> tuple[Tensor, Tensor] | None:
    """First and last visible position for queries at `q_pos [1, N_q]`; None for a composition we do not know."""
    if mask_function is masking_utils.causal_mask_function:
        return torch.full_like(q_pos, -FAR), q_pos
    if mask_function is masking_utils.bidirectional_mask_function:
        return torch.full_like(q_pos, -FAR), torch.full_like(q_pos, FAR)
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    maker = mask_function.__qualname__.split(".")[0]
    held = inspect.getclosurevars(mask_function).nonlocals
    if maker == "and_masks":
        parts = [_limits(part, q_pos) for part in held["mask_functions"]]
        if any(part is None for part in parts):
            return None
        lows, highs = zip(*(part for part in parts if part is not None))
        return _fold(torch.maximum, lows), _fold(torch.minimum, highs)
    if maker == "sliding_window_overlay":
        return q_pos - held["sliding_window"] + 1, torch.full_like(q_pos, FAR)
    if maker == "sliding_window_bidirectional_overlay":
        return q_pos - held["sliding_window"], q_pos + held["sliding_window"]
    if maker == "chunked_overlay":
        shift = held["left_padding"].view(-1, 1).to(q_pos.device)
        size = held["chunk_size"]
        first = torch.div(q_pos - shift, size, rounding_mode="floor") * size + shift
        return first, first + size - 1
    if maker == "packed_sequence_mask_function":
        ids = held["packed_sequence_mask"].to(q_pos.device).contiguous()  # [b, n], never decreasing
        at = q_pos.expand(len(ids), -1)
        own = ids.gather(1, at)
        return torch.searchsorted(ids, own), torch.searchsorted(ids, own, right=True) - 1
    if maker == "remap_positions_for_packed_sequence":
        # Within one packed sequence, positions and indices differ by a constant, so these masks are the same.
        return _limits(held["mask_function"], q_pos)
    return None


def _fold(pick: Callable, tensors: tuple[Tensor, ...]) -> Tensor:
    total = tensors[0]
    for other in tensors[1:]:
        total = pick(total, other)
    return total
