"""Names under which transformers knows our attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AttentionInterface, AttentionMaskInterface

from tilewise.attention import named
from tilewise.models.bridge import Bridge
from tilewise.models.masking import box_mask


def register() -> list[str]:
    """Make `attn_implementation="tilewise:NAME"` work for every named method; returns the names.

    Adds names to transformers' attention and mask interfaces and changes nothing else; no model is affected
    until it is loaded, or set, with one of them. Prompts then use the method with its defaults, single-token
    decoding is dense. Calling it again does nothing new.
    """
    names = []
    for name, method in named().items():
        names.append(f"tilewise:{name}")
        add(names[-1], Bridge(method()))
    return names


def add(name: str, bridge: Bridge) -> None:
    """Register attention and mask together: one without the other loses causality in silence."""
    AttentionInterface.register(name, bridge)
    AttentionMaskInterface.register(name, box_mask)


@contextmanager
def registered(name: str, bridge: Bridge) -> Iterator[None]:
    """The name exists inside the block and is gone after it."""
    add(name, bridge)
    try:
        yield
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name, None)
