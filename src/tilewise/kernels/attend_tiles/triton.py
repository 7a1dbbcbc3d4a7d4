"""The Triton engine: NVIDIA and AMD GPUs, forward and backward; on a CPU only in Triton's interpreter.

Every call runs as it stands: strides, orders and uneven tiles are followed by index, nothing is copied or padded
in memory, and tiles that are wholly visible skip all work on masks. Tall query tiles take one program per block
of queries and head, over a list of their key tiles. Flat ones (lower than 16: a query routed alone, a decoded
token) go by key tile, gathering the queries that chose it from all heads that share it; the parts are then merged.

Triton is imported when the first call runs. Its interpreter, for tests, needs TRITON_INTERPRET=1 in the
environment before Tilewise is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles import op
from tilewise.kernels.attend_tiles.call import Call
from tilewise.kernels.attend_tiles.lists import by_rows
from tilewise.kernels.attend_tiles.triton_arguments import (
    Bias,
    Lists,
    Numbers,
    Pieces,
    Rows,
    numbers,
    pages,
    rows,
)
from tilewise.kernels.attend_tiles.triton_launch import (
    BACKWARD,
    FORWARD,
    Config,
    Table,
    candidates,
    constants,
    launch,
    roomy,
    start,
    stored,
)
from tilewise.kernels.attend_tiles.triton_layout import Layout, Range
from tilewise.kernels.gpu import absent, padded, too_wide
from tilewise.tiles import Partial

MANY = 1 << 30  # more keys than any block holds


def refuse(call: Call) -> str | None:
    """Why this call cannot run here."""
    q = call.q
    if reason := absent(q):
        return reason
    if call.q_scale is not None or call.weights is not None:
        return "multiplies no quantised operands"
    if call.bias_rows != 1:
        return "reads no bias whose rows several queries share"
    if reason := too_wide(q):
        return reason
    if max(q.shape[3], call.v.shape[3]) > 512:
        return "a head_dim beyond 512 does not fit in a block"
    if q.is_cuda and torch.version.hip is None and not torch.compiler.is_compiling():
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 0):
            return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if q.dtype == torch.float32 and max(q.shape[3], call.v.shape[3]) > 256 and not roomy(q.device):
        return "float32 with a head_dim beyond 256 needs more shared memory than this GPU has"
    if call.view.pos.shape[1] not in (1, call.k.shape[1]):
        return "positions of keys differ between query heads that share a kv head"
    fixed = torch.are_deterministic_algorithms_enabled()
    if fixed and call.bias is not None and call.bias.requires_grad and _shared_grid(call):
        return "adds the gradient of a bias [N_q, N_k] that batch or heads share in no fixed order"
    return None


def run(call: Call) -> Partial:
    """Attention over the kept tiles of `call`."""
    return op.run(call, "triton")


def forward(call: Call) -> Partial:
    """The operator's forward on this engine."""
    from tilewise.kernels.attend_tiles.triton_forward import attend

    if call.lists is not None:
        made, restore = by_rows(call)
        return restore(forward(made))
    q = call.q
    out = q.new_empty(*q.shape[:3], call.v.shape[3], dtype=stored(q.dtype))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not q.numel() or not call.view.pos.numel():
        return Partial(out.zero_().to(q.dtype), lse.fill_(-torch.inf))
    with torch.cuda.device_of(q):
        known = {"pages": pages(call.pages, call.k)}
        _by_unit(Layout.of(call), attend, FORWARD, known, out, lse)
    return Partial(out.to(q.dtype), lse)


def backward(
    call: Call, result: Partial, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, where there is one, the bias."""
    q, k, v = call.q, call.k, call.v
    call.refuse_gradients()
    if not q.numel() or not k.numel():
        zeros = [x.new_zeros(x.shape) for x in (q, k, v)]
        d_bias = None if call.bias is None else call.bias.new_zeros(call.bias.shape)
        return zeros[0], zeros[1], zeros[2], d_bias
    with torch.cuda.device_of(q):
        return _backward(Layout.of(call), result, d_out, d_lse)


def _backward(
    layout: Layout, result: Partial, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    from tilewise.kernels.attend_tiles.triton_backward import d_queries, row_deltas

    call = layout.call
    q, k, v = call.q, call.k, call.v
    d_q, d_k, d_v = (x.new_empty(x.shape, dtype=stored(x.dtype)) for x in (q, k, v))
    delta, d_lse = torch.empty_like(result.lse), d_lse.contiguous()
    _by_row(
        row_deltas, delta.numel(), v.shape[3], out=rows(result.out), d_out=rows(d_out),
        d_lse=d_lse, delta=delta, heads=layout.heads, n=layout.rows.n, total=delta.numel(),
    )  # fmt: skip
    known = {"d_out": rows(d_out), "lse": numbers(result.lse), "delta": delta}
    _by_unit(layout, d_queries, BACKWARD, known, d_q, None)
    d_bias = _by_key_tile(layout, known, d_k, d_v)
    if call.bias is not None and d_bias is None:
        # A bias that is the same for all keys shifts the lse and nothing else.
        d_bias = d_lse.masked_fill(result.lse == -torch.inf, 0).unsqueeze(3)
    if d_bias is not None and call.bias is not None:
        d_bias = d_bias.sum_to_size(call.bias.shape).to(call.bias.dtype)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_bias


def _by_unit(
    layout: Layout, kernel: Any, table: Table, known: dict[str, Any], out: Tensor, lse: Tensor | None
) -> None:
    """Run a kernel that writes `out` by query: attention with its `lse`, or with no lse the gradient."""
    units = layout.batch * layout.heads * layout.rows.tiles
    factor = float(layout.call.scale)
    if not layout.flat:
        _by_query(
            layout, kernel, known, rows(out), None if lse is None else numbers(lse), factor, layout.by_unit(),
            candidates(layout, table, layout.rows.size, MANY), lambda m, n: units * -(-layout.rows.size // m),
        )  # fmt: skip
        return
    tried = candidates(layout, table, layout.group * layout.rows.n, layout.columns.size)[:1]
    for some in layout.ranges(tried[0].block_m, out.shape[3]):
        parts = out.new_empty(some.slots * layout.rows.size, out.shape[3], dtype=torch.float32)
        part_lse = None if lse is None else parts.new_empty(len(parts))
        _by_query(
            layout, kernel, known, Rows(parts, 0, 0, out.shape[3], 1),
            None if part_lse is None else Numbers(part_lse, 0, 0), 1.0, some.pieces, tried, some.programs,
        )  # fmt: skip
        _merge(layout, some, parts, part_lse, out, lse, factor)


def _by_query(
    layout: Layout, kernel: Any, known: dict[str, Any], out: Rows, lse: Numbers | None, factor: float,
    work: Lists | Pieces, tried: list[Config], programs: Callable[[int, int], int],
) -> None:  # fmt: skip
    """Launch a kernel that writes `out` by query: attention with its `lse`, or a gradient times `factor`."""
    columns = layout.columns

    def flags(config: Config) -> dict[str, bool]:
        pack = not layout.flat and columns.size < config.block_n
        uneven = columns.bounds is not None or columns.size % config.block_n > 0
        return {"PACK": pack, "CHECK": pack or uneven}

    target: dict[str, Any] = {"factor": factor} if lse is None else {"out_lse": lse}
    fixed = {**constants(layout), "FLAT": layout.flat}
    given = {**_operands(layout, layout.bias()), **known, **target, "heads": layout.heads}
    launch(kernel, programs, tried, flags, fixed, {**given, "out": out, "work": work})


def _merge(
    layout: Layout, some: Range, parts: Tensor, part_lse: Tensor | None, out: Tensor, lse: Tensor | None,
    factor: float,
) -> None:  # fmt: skip
    """Merge attention, or add gradients and multiply them by `factor`, over the slots of a range of units."""
    from tilewise.kernels.attend_tiles.triton_forward import merge_slots

    _by_row(
        merge_slots, some.units * layout.rows.size, out.shape[3], parts=parts, part_lse=part_lse,
        out=rows(out), out_lse=None if lse is None else numbers(lse), axis=layout.rows, starts=some.starts,
        first=some.first, units=some.units, heads=layout.heads, factor=factor,
    )  # fmt: skip


def _by_key_tile(layout: Layout, known: dict[str, Any], d_k: Tensor, d_v: Tensor) -> Tensor | None:
    """Gradients of keys and values, and that of the bias where it is one number a key or a grid."""
    from tilewise.kernels.attend_tiles.triton_backward import d_keys

    call, columns = layout.call, layout.columns
    kind, d_bias = _bias_gradient(call)
    tried = candidates(layout, BACKWARD, layout.group * layout.rows.n, columns.size)
    if kind is not None:
        tried = tried[:1]  # tuning would add to the gradient of the bias as often as it tries
    launch(
        d_keys,
        lambda m, n: layout.batch * layout.kv_heads * columns.tiles * -(-columns.size // n),
        tried,
        lambda config: {"PACK": layout.rows.size < config.block_m},
        {**constants(layout), "BIAS": kind},
        {
            **_operands(layout, layout.bias(d_bias)), **known, "d_k": rows(d_k), "d_v": rows(d_v),
            "work": layout.by_key_tile(), "kv_heads": layout.kv_heads,
        },
    )  # fmt: skip
    return d_bias


def _bias_gradient(call: Call) -> tuple[str | None, Tensor | None]:
    """What `d_keys` does for the gradient of the bias (see its `add_d_bias`), and where to."""
    bias, (b, heads) = call.bias, call.q.shape[:2]
    if bias is None or bias.shape[3] == 1:
        return None, None
    if bias.shape[2] == 1:
        return "keys", torch.zeros(b, heads, 1, bias.shape[3], dtype=torch.float32, device=bias.device)
    if _shared_grid(call):
        return "shared", torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    return "grid", torch.zeros(bias.shape, dtype=stored(bias.dtype), device=bias.device)


def _shared_grid(call: Call) -> bool:
    """Whether the bias is a grid of queries and keys that several batch entries or heads share."""
    if call.bias is None or 1 in call.bias.shape[2:]:
        return False
    return call.bias.shape[:2] != call.q.shape[:2]


def _by_row(kernel: Any, count: int, width: int, **arguments: Any) -> None:
    """Run a kernel that treats `count` rows of `width` numbers one by one."""
    fixed = {"D": width, "BLOCK_D": padded(width), "BLOCK_R": 16, "num_warps": 4}
    start(kernel, -(-count // 16), {**arguments, **fixed})


def _operands(layout: Layout, bias: Bias) -> dict[str, Any]:
    """Arguments that all kernels over tiles take."""
    call = layout.call
    return {
        "q": rows(call.q), "k": rows(call.k), "v": rows(call.v), "rows": layout.rows, "columns": layout.columns,
        "view": layout.view, "bias": bias, "scale": float(call.scale), "softcap": call.softcap,
        "group": layout.group,
    }  # fmt: skip


op.IMPLEMENTATIONS["triton"] = op.Implementation(forward, backward)
