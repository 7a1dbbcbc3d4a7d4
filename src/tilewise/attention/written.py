"""Methods as plain data, for files: every stage by its class and settings, and back."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import torch

from tilewise.attention.api import plan
from tilewise.attention.method import Method

KIND = "kind"  # the key that names the class


def as_data(method: Method) -> dict[str, Any]:
    """A method's class, settings and stages as numbers, strings, lists and mappings.

    Raises TypeError for a method that holds what cannot be written as such: trained weights, tensors, functions.
    """
    return _written(method, "method")


def settings(method: Method) -> dict[str, Any]:
    """A method's settings as plain data, for reports; what cannot be written as such by the name of its class."""
    found = {}
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        if field.repr:
            value = getattr(method, field.name)
            try:
                found[field.name] = _written(value, field.name)
            except TypeError:
                found[field.name] = type(value).__name__
    return found


def _written(value: Any, place: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{place} is {value}, which data in files cannot hold")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return [_written(item, place) for item in value]
    name = type(value).__name__
    if _known().get(name) is type(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {KIND: name, **{key: _written(item, f"{place}.{key}") for key, item in fields.items()}}
    raise TypeError(f"{place} is a {name}, which cannot be written as plain data")


def from_data(data: Any) -> Method:
    """The method that `as_data` wrote. Nothing but the public methods and stages of this room is ever made.

    Raises ValueError naming the place for an unknown class, unknown settings and settings that the class refuses.
    """
    method = _made(data, "method")
    if not isinstance(method, Method):
        raise ValueError(f"method must be a method, got {type(method).__name__}")
    return method


def check_plans(method: Method) -> None:
    """Raise ValueError when the method cannot plan a short causal call: some settings are only used, and so only
    checked, when there is something to plan."""
    try:
        q, k, v = torch.zeros(3, 1, 1, 2, 8)
        plan(method, q, k, mask="causal", v=v)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{type(method).__name__} cannot plan: {error}") from error


def _made(data: Any, place: str) -> Any:
    if isinstance(data, list):
        return tuple(_made(item, place) for item in data)
    if not isinstance(data, dict):
        return data
    kind, known = data.get(KIND), _known()
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{place}: {KIND} must name a method or stage, got {kind!r}")
    given = {key: _made(item, f"{place}.{key}") for key, item in data.items() if key != KIND}
    try:
        return known[kind](**given)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{place}: {kind} does not take these settings: {error}") from error


def _known() -> dict[str, Any]:
    """The public frozen dataclasses of the room, by name: methods and their stages."""
    room = importlib.import_module("tilewise.attention")
    return {
        name: found
        for name in room.__all__
        if isinstance(found := getattr(room, name), type)
        and dataclasses.is_dataclass(found)
        and found.__dataclass_params__.frozen  # type: ignore[attr-defined]
    }
