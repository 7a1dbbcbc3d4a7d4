"""Loading models: what a caller gets, and what is refused. Through the command: tests/compare/test_bad_input.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from tests import tiny
from tilewise.errors import UserError
from tilewise.models import bundled_model, load_model
from tilewise.models.load import check_device


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_comes_in_the_dtype_asked_for(directory, dtype):
    model, _ = load_model(directory, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.dtype == getattr(torch, dtype)


def test_model_is_the_one_saved_ready_to_evaluate(directory):
    model, _ = load_model(directory)
    assert model.dtype == torch.float32, "the default"
    assert not any(module.training for module in model.modules())
    made = tiny.make("llama")
    assert made.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in model.state_dict().items())


def test_name_may_be_a_string_or_a_path_even_a_relative_one(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    for name in (directory, str(directory), directory.name, f"./{directory.name}"):
        assert type(load_model(name)[0]).__name__ == "LlamaForCausalLM"


def test_tokenizer_comes_along(directory):
    _, tokenizer = load_model(directory)
    text = "für 3 €\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_every_architecture_of_the_tests_loads(tmp_path, name):
    """Shared weights, which files leave out, are not taken for missing ones."""
    model, _ = load_model(tiny.save(tmp_path / name, name))
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, tiny.make(name)(tokens).logits)


def test_sharded_weights_load(tmp_path):
    tiny.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tiny.make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_model(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="cannot load model"):
        load_model(tmp_path)


def test_missing_weights_are_counted(directory, tmp_path):
    for path in directory.iterdir():
        os.link(path, tmp_path / path.name)
    weights = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".mlp." not in name}
    (tmp_path / "model.safetensors").unlink()
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"its weights lack model\.layers\.0\.mlp\.down_proj\.weight and 8 more"
    ):
        load_model(tmp_path)


def test_transformers_settings_are_left_as_they_were(directory):
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load_model(directory)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
        with pytest.raises(UserError):
            load_model(directory.parent)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_bundled_model_has_a_place_and_a_notice():
    assert bundled_model().is_dir() and bundled_model().name == "bundled"
    assert "licen" in (bundled_model() / "NOTICE").read_text(encoding="utf-8").lower()


@pytest.mark.skipif(
    not (bundled_model() / "model.safetensors").exists(), reason="the bundled model is not in this tree yet"
)
def test_bundled_model_is_the_default():
    """A byte-level model with a context of at least 4,096, in at most 20 MB."""
    model, tokenizer = load_model()
    assert model.config.max_position_embeddings >= 4096
    assert tokenizer("é", add_special_tokens=False)["input_ids"] == list("é".encode())
    assert sum(path.stat().st_size for path in bundled_model().iterdir()) <= 20e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16, got 'float64'"),
        ({"device": "gpu"}, "device must be like cpu, cuda or cuda:1, got 'gpu'"),
        ({"device": "cuda:77"}, "device 'cuda:77' is not on this machine; there is cpu"),
    ],
)
def test_options_are_checked_before_anything_is_read(arguments, message):
    with pytest.raises(UserError, match=message):
        load_model("/nowhere/at/all", **arguments)


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere", Path("/nowhere")]
)
def test_a_directory_that_is_missing_is_not_looked_for_elsewhere(name):
    with pytest.raises(UserError, match="does not exist; give a directory with config.json or a hub id"):
        load_model(name)


def test_errors_are_value_errors(directory):
    with pytest.raises(ValueError, match="config.json is missing"):
        load_model(directory.parent)


def test_check_device():
    assert check_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert check_device("cuda").type == "cuda"
