"""PyTorch's own scaled_dot_product_attention, for calls that compute every tile under a plain mask."""

from __future__ import annotations

from torch.nn.functional import scaled_dot_product_attention

from tilewise.kernels.attend_tiles.call import Call
from tilewise.tiles import Partial


def refuse(call: Call) -> str | None:
    """Why this call is not one for PyTorch's kernel."""
    if call.q_scale is not None or call.weights is not None:
        return "multiplies no quantised operands"
    if call.pages is not None:
        return "reads no pages"
    if call.lists is not None:
        return "reads no lists of keys"
    if call.tiles is not None:
        return "computes every tile, the call names some"
    if call.view.simple is None:
        return "would need an N x N mask; the call's mask is neither none nor causal over equal lengths"
    if call.bias is not None:
        return "would need an N x N bias"
    if call.softcap is not None:
        return "has no soft-capping"
    if call.scale == 0:
        return "gives NaN for a causal mask when all scores are 0"
    if call.need_lse:
        return "returns no log-sum-exp"
    if call.v.shape[3] != call.q.shape[3]:
        return "would build the N x N scores, as values have another head_dim than keys"
    if any(x.stride(3) != 1 for x in (call.q, call.k, call.v)):
        return "would build the N x N scores, as features do not lie side by side in memory"
    if call.q.numel() == 0 or call.k.numel() == 0:
        return "an empty sequence"
    return None


def run(call: Call) -> Partial:
    """Attention by PyTorch's kernel; the Partial has no lse."""
    out = scaled_dot_product_attention(
        call.q,
        call.k,
        call.v,
        is_causal=call.view.simple == "causal",
        scale=call.scale,
        enable_gqa=call.q.shape[1] != call.k.shape[1],
    )
    return Partial(out, None)  # type: ignore[arg-type]
