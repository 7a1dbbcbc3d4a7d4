"""The attention function that transformers calls: from a model's layer to a tilewise method and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tilewise.attention import Dense, Method, Plan, attend
from tilewise.attention import plan as make_plan
from tilewise.machine import clock
from tilewise.models.masking import BoxMask
from tilewise.tiles import Causal, Everything, Mask, Partial, TokenMask, as_mask


@dataclass(frozen=True, eq=False)
class Event:
    """One call of one layer's attention, as an observer sees it.

    Attributes:
        layer: index of the layer. method: what decided. plan: what it decided, with the seconds it took.
        engines: what ran, one name per pass. seconds: time spent attending, choosing excluded.
        q, k, v: the call's tensors; mask, scale: its terms.
    """

    layer: int
    method: Method
    plan: Plan
    engines: tuple[str, ...]
    seconds: float
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | Tensor | None
    scale: float | None


@dataclass(eq=False)
class Bridge:
    """Which method each layer uses, for prompts and for decoding, and who watches.

    Attributes:
        prefill: method per layer for calls of several queries; layers not named are dense.
        decode: method for calls of one query in the layers named by `prefill`, or one for each layer.
        engine: as in `attend`.
        observer: called with an Event after every call; timing is taken only when there is one.
        plans: when a dictionary, plans are taken from it by layer, or put into it, without their precision, when
            missing: what is rounded may depend on later tokens.
        states: what decoding methods carry from call to call, by layer; a prompt begins anew.
    """

    prefill: Mapping[int, Method] | Method
    decode: Mapping[int, Method] | Method = field(default_factory=Dense)
    engine: str = "auto"
    observer: Callable[[Event], None] | None = None
    plans: dict[int, Plan] | None = None
    states: dict[int, Any] = field(default_factory=dict)

    def method(self, layer: int, n_q: int) -> Method:
        """The method of a layer for a call of `n_q` queries."""
        if n_q == 1:
            return self.decoder(layer)
        return self.prefill if isinstance(self.prefill, Method) else self.prefill.get(layer, Dense())

    def decoder(self, layer: int) -> Method:
        """The method of a layer for single queries."""
        if isinstance(self.decode, Method):
            return self.decode if isinstance(self.prefill, Method) or layer in self.prefill else Dense()
        return self.decode.get(layer, Dense())

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """`query [B, H_q, N_q, D]`, `key` and `value [B, H_kv, N_k, D]` to `[B, N_q, H_q, D]`."""
        if dropout:
            raise ValueError(f"attention dropout is not supported, got {dropout}; set the model's to 0")
        for name in ("s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(module).__name__} passes {name}, which tilewise does not support")
        layer = getattr(module, "layer_idx", None) or 0
        trim = query.shape[2] > 1 or self.decoder(layer).carries
        mask, bias, used = _mask(module, attention_mask, query, key, trim)
        key, value = key[:, :, :used], value[:, :, :used]
        method = self.method(layer, query.shape[2])
        if query.shape[2] == 1 < key.shape[2]:
            method = method.with_state(self.states.get(layer))
        given = self.plans.get(layer) if self.plans is not None else None
        if given is None and (self.observer or self.plans is not None or method.carries):
            _check_mode(method, query, key)
            given = make_plan(method, query, key, mask=mask, scale=scaling, v=value)
            if self.plans is not None:
                given = self.plans[layer] = given.unrounded()
        start = clock(query.device) if self.observer else 0.0
        out = attend(
            query,
            key,
            value,
            given or method,
            mask=mask,
            bias=bias,
            scale=scaling,
            softcap=softcap,
            engine=self.engine,
        )
        if isinstance(out, Partial):
            out = out.out
        seconds = clock(query.device) - start if self.observer else 0.0
        self._carry(layer, query, key, value, mask, given)
        if self.observer and given is not None:
            terms = {"bias": bias, "scale": scaling or 1.0, "softcap": softcap}
            ran = tuple(choice.engine for choice in given.explain(query, key, value, self.engine, **terms))
            self.observer(Event(layer, method, given, ran, seconds, query, key, value, mask, scaling))
        return out.transpose(1, 2).contiguous(), None

    def _carry(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | Tensor | None,
        ran: Plan | None,
    ) -> None:
        """Keep what the layer's decoding method hands on from this call to the next."""
        decoder = self.decoder(layer)
        if not decoder.carries:
            return
        if ran is not None and ran.after is not None and _alike(self.method(layer, query.shape[2]), decoder):
            self.states[layer] = ran.after
        else:
            n_q, n_k = query.shape[2], key.shape[2]
            view = as_mask(mask).bind(n_q, n_k, device=query.device)
            before = None if n_q == n_k else self.states.get(layer)
            q, k, v = (x.detach() for x in (query, key, value))
            self.states[layer] = decoder.carry(q, k, v, view, before)


def _alike(a: Method, b: Method) -> bool:
    """Whether two methods are one: the very same settings and trained parts."""
    own, others = a.parameters().values(), b.parameters().values()
    return type(a) is type(b) and all(x is y for x, y in zip(own, others, strict=True))


def _check_mode(method: Method, query: Tensor, key: Tensor) -> None:
    method.check_mode(query.shape[2], key.shape[2], torch.is_grad_enabled() and query.requires_grad)


def _mask(
    module: nn.Module, attention_mask: Tensor | None, query: Tensor, key: Tensor, trim: bool
) -> tuple[Mask, Tensor | None, int]:
    """The layer's mask, its additive mask as a bias, and how many of the key slots are in use, if they are told."""
    n_q, n_k = query.shape[2], key.shape[2]
    if attention_mask is None:
        return (Causal() if getattr(module, "is_causal", True) else Everything()), None, n_k
    if attention_mask.dtype == torch.int64:
        used = n_k
        if trim:
            # A static cache hands over all of its slots; those past the last query hold nothing yet.
            last = attention_mask[:, :, :n_q, 1].max()
            within = (attention_mask[:, 0, n_q:, 0] <= last).any(0).nonzero()
            used = int(within[-1]) + 1 if len(within) else 0
            attention_mask = attention_mask[:, :, : n_q + used]
        return BoxMask(attention_mask, n_q), None, used
    if attention_mask.dtype == torch.bool:
        return TokenMask(attention_mask[:, :, :, :n_k]), None, n_k
    return Everything(), attention_mask[:, :, :, :n_k], n_k
