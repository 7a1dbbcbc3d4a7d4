"""`tilewise convert` on a tiny model: what it writes works, losses fall, interrupts resume bit for bit."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import tilewise
from tests import tiny
from tilewise import cli, convert
from tilewise.convert import Settings, new_layers, run_convert
from tilewise.errors import UserError
from tilewise.models import gated, load_gates, load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A line of text, not very long; and 17 more. " * 80)
    return path


@pytest.fixture
def given(model, text, tmp_path):
    return {
        "model": str(model), "text": text, "tokens": 128, "batch": 2, "steps": 8,
        "out": tmp_path / "mine.safetensors", "options": {"features": 4},
    }  # fmt: skip


def run(**given):
    return run_convert(Settings(**given), Console(file=io.StringIO(), width=100))


def test_what_it_writes_works(given, model):
    found = run(**given)
    assert found["lengths"][0] == 128 and len(found["dense"]) == len(found["converted"]) == len(
        found["lengths"]
    )
    assert not given["out"].with_name("mine.safetensors.part").exists()
    loaded, _ = load_model(str(model))
    tokens = torch.randint(256, (1, 100), generator=torch.Generator().manual_seed(0))
    before = loaded(input_ids=tokens).logits
    layers = load_gates(given["out"], model=loaded)
    assert layers[0].features == 4
    with torch.no_grad(), tilewise.patch(loaded, gated(layers), decode=gated(layers)):
        assert not torch.equal(loaded(input_ids=tokens).logits, before)
    assert torch.equal(loaded(input_ids=tokens).logits, before)


def test_compare_accepts_it_beside_other_methods(given, model, text, tmp_path):
    run(**given)
    wanted = [
        "compare",
        str(model),
        "--text",
        str(text),
        "--tokens",
        "256",
        "--methods",
        f"moba,{given['out']}",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main([*wanted, "--json", str(tmp_path / "made.json"), "--out", str(tmp_path / "made.html")])
    assert ended.value.code == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "made.json").read_text())["methods"]}
    assert set(rows) == {"dense", "moba", "mine"} and rows["mine"]["decodes_with"] == "mine"
    assert rows["mine"]["kl_mean"] > 0 and "decode" in rows["mine"]["modes"]
    assert rows["mine"]["engine"] in ("native", "torch") and 0 < rows["mine"]["density"] < 1


def conversion(**given):
    settings = Settings(**given)
    whole = convert._whole(settings)
    learn, _ = convert._parts(whole, settings)
    return convert.Conversion(learn, new_layers(whole.model.requires_grad_(False), settings), settings)


def test_both_stages_lower_their_losses(given):
    made = conversion(**given | {"steps": 60, "options": {"features": 16}})
    losses = made.run()
    assert sum(losses[10:15]) < 0.9 * sum(losses[:5]), losses
    assert sum(losses[55:]) < 0.9 * sum(losses[15:20]), losses


def test_it_resumes_bit_for_bit(given):
    whole = conversion(**given)
    whole.run()
    for stop in (1, 2, 5):  # in the first stage, between the two, in the second
        first = conversion(**given)
        first.run(stop)
        second = conversion(**given)
        second.load_state_dict(first.state_dict())
        assert second.run() == whole.losses
        for name, weight in second.layers.state_dict().items():
            assert torch.equal(weight, whole.layers.state_dict()[name]), (stop, name)


def test_an_interrupt_keeps_what_there_is(given, monkeypatch):
    want = run(**given)
    bytes_ = given["out"].read_bytes()
    given["out"].unlink()
    monkeypatch.setattr(convert, "EVERY", 3)
    take = convert.Conversion.batch

    def stopped(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return take(self, step)

    monkeypatch.setattr(convert.Conversion, "batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(**given)
    assert not given["out"].exists() and given["out"].with_name("mine.safetensors.part").exists()
    monkeypatch.setattr(convert.Conversion, "batch", take)
    with pytest.raises(UserError, match="is not of this conversion .* remove it to begin anew"):
        run(**given | {"options": {"features": 5}})
    assert run(**given) == want and given["out"].read_bytes() == bytes_


def test_pass_keys_weigh_as_much_as_all_the_rest(given):
    made = conversion(**given)
    tokens, weights = made.batch(0)
    assert tokens.shape == (2, 128) and weights.shape == (2, 127)
    assert (weights[0] == 1).all()
    asked = weights[1] != 1
    assert asked.sum() == 5 and weights[1, asked].sum() == pytest.approx(127)
    digits = bytes(tokens[1, 1:][asked].tolist()).decode()
    assert digits.isdigit() and bytes(tokens[1].tolist()).decode().count(digits) == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"to": "mamba"}, "to must be one of lawcat, got 'mamba'"),
        ({"tokens": 100}, "tokens must be at least 128, got 100"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be a number > 0, got 0"),
        ({"tokens": 1000}, "the text has 3520 tokens, 8000 are needed"),
        ({"options": {"features": 0}}, "options do not suit lawcat: features must be an integer >= 1"),
        ({"options": {"colour": 1}}, "options do not suit lawcat: .*colour"),
    ],
)
def test_wrong_settings_are_one_error(given, changes, match):
    with pytest.raises(UserError, match=match):
        run(**given | changes)
    assert not given["out"].exists()


def test_outputs_that_cannot_be_written(given, tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        run(**given | {"out": tmp_path})
    with pytest.raises(UserError, match="cannot write"):
        run(**given | {"out": tmp_path / "nowhere" / "made.safetensors"})


def test_the_command(given, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", given["model"], "--text", str(given["text"]), "--tokens", "128", "--steps", "2",
                  "--out", str(given["out"])])  # fmt: skip
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "bits/byte" in said and "pass keys" in said and given["out"].exists()
