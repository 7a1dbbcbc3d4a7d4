"""What a model's attention really sees, and what each layer's method does to the model's answer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tilewise.attention import Method
from tilewise.models.bridge import Event
from tilewise.models.patching import patch


def capture(
    model: PreTrainedModel, tokens: Tensor, *, layers: Iterable[int] | None = None
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Run `tokens` through the model and return the (q, k, v) of each layer's attention, after any rotation.

    Args:
        model: as for `patch`; left as it was.
        tokens: int64 `[N]` or `[B, N]`.
        layers: indices of layers to keep; all when None.

    Returns `q [B, H_q, N, D]`, `k` and `v [B, H_kv, N, D]` by layer, copies in the model's dtype. Raises as `patch`
    does, and ValueError for tokens of another shape.
    """
    tokens = _check_tokens(tokens)
    wanted = None if layers is None else set(layers)
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(event: Event) -> None:
        if wanted is None or event.layer in wanted:
            seen[event.layer] = (event.q.clone(), event.k.clone(), event.v.clone())

    with torch.no_grad(), patch(model, "dense", check=False, observer=keep):
        model(input_ids=tokens.to(model.device), use_cache=False)
    return seen


@torch.no_grad()
def logit_quality(model: PreTrainedModel, tokens: Tensor, method: Method | str) -> dict[int, float]:
    """How little each layer's use of `method`, in that layer alone, moves the model's next-token distribution.

    Args: as for `capture`. Returns minus the mean Kullback-Leibler divergence in nats by layer: 0 is best. Runs the
    model once for each layer and once more. Raises as `patch` and `capture` do.
    """
    ids = _check_tokens(tokens).to(model.device)

    def run(setting) -> Tensor:
        with patch(model, setting, check=False):
            return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

    exact = run("dense")
    count = model.config.get_text_config().num_hidden_layers
    return {
        layer: float((exact.exp() * (run({layer: method}) - exact)).sum(-1).mean()) for layer in range(count)
    }


def _check_tokens(tokens: Tensor) -> Tensor:
    if tokens.ndim not in (1, 2) or tokens.is_floating_point():
        raise ValueError(f"tokens must be integers [N] or [B, N], got {tokens.dtype} {list(tokens.shape)}")
    return tokens.view(-1, tokens.shape[-1])
