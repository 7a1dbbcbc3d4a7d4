"""Every named method and every engine takes part in the conformance suite."""

from __future__ import annotations

import re
from pathlib import Path

import tilewise
from tests.conformance.common import ENGINES, FULL, METHODS, OWN_SUITES, ROUNDED, cases, grid, qkv
from tilewise.attention import Method, named, plan
from tilewise.kernels import engines


def test_every_named_method_has_settings_here():
    exact = {name: kind for name, kind in named().items() if kind.exact}
    assert set(METHODS) == set(exact), "add the new method to tests/conformance/common.py"
    assert set(FULL) == set(exact)
    assert all(type(METHODS[name]) is kind and type(FULL[name]) is kind for name, kind in exact.items())
    rounded = {name: kind for name, kind in named().items() if not kind.exact}
    assert rounded and all(type(ROUNDED[name]) is kind for name, kind in rounded.items())


def test_a_method_without_settings_is_noticed(monkeypatch):
    monkeypatch.setitem(Method._named, "brand-new", Method)
    try:
        cases()
    except LookupError as missing:
        assert "brand-new" in str(missing)
    else:
        raise AssertionError("a new method passed unnoticed")


def test_engines_are_those_of_the_kernel():
    assert set(engines()) == {*ENGINES, *OWN_SUITES} and not set(ENGINES) & set(OWN_SUITES)
    assert {"native", "torch", "definition"} <= set(ENGINES)
    root = Path(__file__).parents[2]
    for engine, suite in OWN_SUITES.items():
        assert re.search(rf"attend_tiles import .*\b{engine}\b", (root / suite).read_text()), suite


def test_the_small_settings_leave_tiles_out():
    """Otherwise nothing here would test sparsity."""
    q, k, _ = qkv(n_q=160)
    causal = grid(plan("dense", q, k, mask="causal"), 1, 2, 160, 160).sum()
    for name in set(METHODS) - {"dense"}:
        kept = grid(plan(METHODS[name], q, k, mask="causal"), 1, 2, 160, 160).sum()
        assert 0.05 * causal < kept < 0.9 * causal, name
        assert tilewise.attention.as_method(name).name == name
