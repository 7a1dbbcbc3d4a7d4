"""Methods: configured ways to compute attention."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from tilewise.attention.plans import Plan
from tilewise.tiles import Visibility

MODES = ("train", "prefill", "chunked prefill", "decode")
LOOKAHEADS = ("none", "tile", "prompt")


class Method:
    """A configured way to compute attention. Subclasses are frozen dataclasses; their fields are the settings.

    Class attributes:
        name: what users call it; empty for methods that have no name of their own.
        modes: which of MODES it supports. An unsupported mode raises, it never approximates.
        reads: what it looks at to decide, for the tables ("q, k", "nothing", ...). For values see `with_values`.
        needs: what must be there before it can run: trained weights, a calibration; for the tables.
        exact: whether what it keeps is computed in the inputs' own precision.
        carries: whether it decodes with a state that every call hands on to the next (see `carry`).
    """

    name: ClassVar[str] = ""
    modes: ClassVar[tuple[str, ...]] = MODES
    reads: ClassVar[str] = "nothing"
    needs: ClassVar[str] = "nothing"
    exact: ClassVar[bool] = True
    carries: ClassVar[bool] = False
    _named: ClassVar[dict[str, type[Method]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            Method._named[cls.name] = cls

    @property
    def lookahead(self) -> str:
        """How far a query's choice of tiles depends on later queries: "none", its own "tile", or the "prompt".

        Values and scores never come from the future, whatever this says; it concerns the choice alone.
        """
        return "none"

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        """Decide what to compute for `q [B, H_q, N_q, D]`, `k [B, H_kv, N_k, D]`; needs no gradient."""
        raise TypeError(f"{type(self).__name__} does not say how it plans")

    def with_values(self, v: Tensor) -> Method:
        """What plans in a call with the values `v [B, H_kv, N_k, D_v]`: itself, unless its choice looks at them.

        `attend`, `plan(..., v=v)`, `patch` and all that call them ask for it before they plan. A method, or a stage
        of `Tiles`, whose choice depends on values overrides this to return one that holds them, for that call.
        """
        return self

    def with_state(self, state: Any) -> Method:
        """What plans a call of one query after the calls that `state` comes from; itself if it carries nothing."""
        return self

    def carry(self, q: Tensor, k: Tensor, v: Tensor, view: Visibility, state: Any) -> Any:
        """The state after a call, for the next one. `patch` keeps it, layer by layer, for methods that carry one.

        It is asked for where the call's own plan does not hand a state on (`Plan.after`): where none is made on the
        way to the answer, or another method gave the answer.

        Args: q, k, v, view: of the call, k and v with all keys and values so far. state: as the call before gave
        it, for one query more; None where a sequence begins, with as many queries as keys.
        """
        return None

    def parameters(self) -> dict[str, Any]:
        """The settings, for reports."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def check_mode(self, n_q: int, n_k: int, train: bool) -> None:
        """Raise ValueError when this call's mode is not one the method supports."""
        mode = mode_of(n_q, n_k)
        for wanted in (mode, *(["train"] if train else [])):
            if wanted not in self.modes:
                raise ValueError(
                    f"{self.name or type(self).__name__} does not support {wanted} ({n_q} queries, {n_k} keys);"
                    f" it supports {', '.join(self.modes)}"
                )


def mode_of(n_q: int, n_k: int) -> str:
    """The mode of a call with these lengths."""
    if n_q >= n_k:
        return "prefill"
    return "decode" if n_q == 1 else "chunked prefill"


def named() -> dict[str, type[Method]]:
    """Every method that has a name."""
    return dict(sorted(Method._named.items()))


def as_method(method: Method | str | None) -> Method:
    """A method from what callers may write: None (dense), a name, or a configured method.

    Raises ValueError for an unknown name (the nearest ones are offered) and TypeError for anything else.
    """
    if method is None:
        method = "dense"
    if isinstance(method, str):
        known = named()
        if method not in known:
            import difflib

            near = difflib.get_close_matches(method, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known methods: {', '.join(known)}"
            raise ValueError(f"unknown attention method {method!r}; {hint}")
        return known[method]()
    if isinstance(method, Method):
        return method
    raise TypeError(f"method must be None, a name or a configured method, got {type(method).__name__}")
