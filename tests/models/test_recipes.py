"""Recipes for whole models: files that patch and compare take, and one error for every way they can be wrong."""

from __future__ import annotations

import json

import pytest
import torch

import tilewise
from tests import tiny
from tilewise.attention import SLA, Dense, MeanPool, MoBA, Share, SinkWindow, Tiles
from tilewise.errors import UserError
from tilewise.models import ModelRecipe, read_recipe

RECIPE = ModelRecipe(3, {0: MoBA(16, 2), 2: Tiles(MeanPool(), Share(0.5), (16, 16))}, {"text": "a book"})


def logits(model, tokens, setting):
    with torch.no_grad(), tilewise.patch(model, setting, check=False):
        return model(input_ids=tokens, use_cache=False).logits


def test_a_file_is_the_recipe(tmp_path):
    RECIPE.save(tmp_path / "mine.json")
    again = read_recipe(tmp_path / "mine.json")
    assert (again.layers, again.methods, again.about) == (3, RECIPE.methods, {"text": "a book"})


def test_patch_takes_recipe_path_and_mapping_alike(tmp_path):
    model, tokens = (
        tiny.make("llama"),
        torch.randint(256, (1, 90), generator=torch.Generator().manual_seed(0)),
    )
    path = tmp_path / "mine.json"
    RECIPE.save(path)
    wanted = logits(model, tokens, dict(RECIPE.methods))
    for setting in (RECIPE, path, str(path)):
        assert torch.equal(logits(model, tokens, setting), wanted)
    assert not torch.equal(logits(model, tokens, "dense"), wanted)
    first = logits(model, tokens, {0: RECIPE.methods[0]})
    with torch.no_grad(), tilewise.patch(model, RECIPE, layers=[0], check=False):
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, first)
    assert not torch.equal(first, wanted)


def test_what_the_tables_say():
    assert RECIPE.modes == ("train", "prefill", "chunked prefill")
    assert RECIPE.lookahead == "tile" and RECIPE.name == ""
    assert RECIPE.reads == f"{RECIPE.methods[0].reads}; {RECIPE.methods[2].reads}"
    assert RECIPE.parameters()["0"] == {"kind": "MoBA", "block": 16, "top_k": 2}
    nothing = ModelRecipe(3, {})
    assert (nothing.reads, nothing.lookahead) == ("nothing", "none")


def test_a_recipe_for_another_model(tmp_path):
    with pytest.raises(UserError, match="for a model of 5 layers, this one has 3"):
        logits(tiny.make("llama"), torch.zeros(1, 4, dtype=torch.int64), ModelRecipe(5, {4: Dense()}))
    with pytest.raises(ValueError, match=r"methods must be for layers 0..2, got 3"):
        ModelRecipe(3, {3: Dense()})


def test_trained_weights_cannot_be_written(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("older")
    with pytest.raises(TypeError, match="method is a SLA, which cannot be written"):
        ModelRecipe(3, {0: SLA(8)}).save(path)
    assert path.read_text() == "older" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no json", "is not JSON"),
        ("[]", "is no recipe of format 1"),
        ({"format": 2}, "is no recipe of format 1"),
        ({"methods": None}, "is damaged"),
        ({"methods": {"x": {"kind": "Dense"}}}, "is damaged: invalid literal"),
        ({"methods": {"7": {"kind": "Dense"}}}, r"is damaged: methods must be for layers 0..2, got 7"),
        ({"methods": {"0": {"kind": "Nonsense"}}}, "is damaged: method: kind must name"),
        ({"methods": {"0": {"kind": "MoBA", "block": 0}}}, "block must be an integer >= 1, got 0"),
        ({"methods": {"0": {"kind": "XAttention", "tile": 0}}}, "XAttention"),
        ({"layers": "many"}, "is damaged"),
        ({"layers": True}, "is damaged"),
    ],
)
def test_damaged_files(tmp_path, change, said):
    path = tmp_path / "mine.json"
    RECIPE.save(path)
    data = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps(data | change))
    with pytest.raises(UserError, match=said):
        read_recipe(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read recipe .*No such file"):
        read_recipe(tmp_path / "none.json")


def test_decoding_stays_dense():
    model, tokens = (
        tiny.make("llama"),
        torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(1)),
    )
    seen = []
    recipe = ModelRecipe(3, {0: SinkWindow(1, 4)})
    with torch.no_grad(), tilewise.patch(model, recipe, observer=seen.append):
        cache = model(input_ids=tokens[:, :-1], use_cache=True).past_key_values
        model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)
    assert [event.plan.density == 1 for event in seen][:3] == [False, True, True]
    assert all(event.plan.density == 1 for event in seen[3:])
