"""What users get wrong: one line that says what was given and what is accepted, and nothing else happens."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tilewise import cli
from tilewise.compare import run
from tilewise.models.bridge import Bridge

OLDER = b"an older report"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(sound, tmp_path):
    """A copy of the model, to be broken."""
    return shutil.copytree(sound, tmp_path / "model")


@pytest.fixture
def reports(tmp_path):
    """Reports of an earlier run, by option."""
    folder = tmp_path / "reports"
    folder.mkdir()
    paths = {"--out": folder / "report.html", "--json": folder / "report.json"}
    for path in paths.values():
        path.write_bytes(OLDER)
    return paths


@pytest.fixture
def refuse(reports, capfd):
    """Runs `tilewise compare`, which must refuse in one line; returns it."""
    logged = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)

    def run_command(*arguments, **options):
        given = {"--tokens": "40", "--methods": "sink-window", "--tasks": "perplexity"} | reports | options
        flat = [str(part) for pair in given.items() for part in pair]
        with pytest.raises(SystemExit) as stop:
            cli.main(["compare", *map(str, arguments), *flat])
        out, err = capfd.readouterr()
        assert stop.value.code == 2, err
        assert (out, logged) == ("", [])
        assert err.startswith("tilewise: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert len(err) < 500
        for path in reports.values():
            assert path.read_bytes() == OLDER
        assert sorted(p.name for p in reports["--out"].parent.iterdir()) == ["report.html", "report.json"]
        return err

    yield run_command
    logging.getLogger("transformers").removeHandler(handler)


def _configure(model: Path, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_control_runs(model, reports, capfd):
    """What the refused calls below have in common is accepted, and replaces the older reports."""
    flat = [str(part) for pair in reports.items() for part in pair]
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(model), "--tokens", "40", "--methods", "sink-window", *flat])
    assert (stop.value.code, capfd.readouterr().err) == (0, "")
    assert all(OLDER not in path.read_bytes() for path in reports.values())


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [
        ("--methods", "moba,xatention", "unknown attention method 'xatention'; did you mean xattention"),
        ("--methods", "qqq", "'qqq'; known methods: chunk-llm, dense, dhsa, flexprefill, hisa"),
        ("--methods", "moba:blok=3", "its settings are block, top_k, got 'blok=3'"),
        ("--methods", "xattention:tile=0", "tile must be an integer >= 1, got 0"),
        ("--methods", "moba,none.json", "cannot read recipe 'none.json': No such file"),
        ("--tokens", "1025", "tokens is 1025, but the model's context is 1024"),
        ("--tokens", "1", "tokens must be at least 2, got 1"),
        ("--tokens", "-5", "tokens must be at least 2, got -5"),
        ("--tokens", "many", "Invalid value for '--tokens': Input should be a valid integer"),
        ("--device", "cuda:99", "device 'cuda:99' is not on this machine; there is cpu"),
        ("--device", "toaster", "device must be like cpu, cuda or cuda:1, got 'toaster'"),
        ("--device", "meta", "device 'meta' is not on this machine"),
        ("--dtype", "float31", "dtype must be one of float32, bfloat16, float16, got 'float31'"),
        ("--tasks", "perplexity,poetry", "tasks must be of perplexity, recall, passkey, got poetry"),
        ("--tasks", ",", "tasks must be of perplexity, recall, passkey, got none"),
        ("--seed", "x", "Invalid value for '--seed': Input should be a valid integer"),
    ],
)
def test_options(refuse, sound, option, given, said):
    assert said in refuse(sound, **{option: given})


# --- the text


def test_text_that_is_missing(refuse, sound, tmp_path):
    said = refuse(sound, **{"--text": tmp_path / "none.txt"})
    assert f"cannot read text '{tmp_path / 'none.txt'}': No such file or directory" in said


def test_text_that_is_a_directory(refuse, sound, tmp_path):
    assert "Is a directory" in refuse(sound, **{"--text": tmp_path})


def test_text_that_is_not_utf8(refuse, sound, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("für".encode("latin-1") * 100)
    assert f"cannot read text '{path}': it is not UTF-8" in refuse(sound, **{"--text": path})


@pytest.mark.parametrize("size", [0, 1, 39])
def test_text_shorter_than_asked_for(refuse, sound, tmp_path, size):
    path = tmp_path / "short.txt"
    path.write_text("x" * size)
    assert f"the text has {size} tokens, 40 are needed" in refuse(sound, **{"--text": path})


def test_text_too_short_to_say_anything(capfd, sound, tmp_path):
    """Without --tokens, all of a shorter text is used, down to 128 tokens."""
    path = tmp_path / "short.txt"
    for size, code in ((127, 2), (128, 0)):
        path.write_text("x" * size)
        with pytest.raises(SystemExit) as stop:
            cli.main(["compare", str(sound), "--text", str(path), "--methods", "dense"])
        assert stop.value.code == code
        assert ("the text has 127 tokens, 128 are needed" in capfd.readouterr().err) is (code == 2)


# --- the reports


def test_output_below_a_file(refuse, sound, reports):
    path = reports["--out"] / "below.html"
    for option in reports:
        assert f"cannot write '{path}': Not a directory" in refuse(sound, **{option: path})


def test_output_in_a_missing_directory(refuse, sound, tmp_path):
    path = tmp_path / "none" / "r.html"
    assert f"cannot write '{path}': No such file or directory" in refuse(sound, **{"--out": path})
    assert not path.parent.exists()


def test_output_that_is_a_directory(refuse, sound, tmp_path):
    for option in ("--out", "--json"):
        said = refuse(sound, **{option: tmp_path})
        assert f"output '{tmp_path}' is a directory; give a file" in said


def test_one_file_for_both_outputs(refuse, sound, reports):
    assert "a file each" in refuse(sound, **{"--out": reports["--json"]})


def test_outputs_are_checked_before_the_model_is_read(refuse, sound, tmp_path, monkeypatch):
    monkeypatch.setattr(run.material, "load_model", lambda *a, **k: pytest.fail("loaded"))
    refuse(sound, **{"--json": tmp_path / "none" / "r.json"})
    refuse(sound, **{"--methods": "moab"})


# --- the model


def test_model_directory_that_is_missing(refuse, tmp_path):
    path = tmp_path / "nowhere"
    said = refuse(path)
    assert f"model directory '{path}' does not exist; give a directory with config.json or a hub id" in said


def test_model_that_is_a_file(refuse, model):
    assert "give a directory with config.json or a hub id" in refuse(model / "config.json")


def test_model_name_that_is_no_name(refuse):
    assert "cannot load model 'a/b/c': Repo id must be in the form" in refuse("a/b/c")


def test_directory_without_config(refuse, model):
    (model / "config.json").unlink()
    assert f"'{model}' is no model directory: config.json is missing" in refuse(model)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[]", b"{}", b"null"])
def test_config_that_is_broken(refuse, model, content):
    (model / "config.json").write_bytes(content)
    said = refuse(model)
    assert f"'{model / 'config.json'}'" in said
    assert ("is not valid JSON" in said) or ("does not name a model_type" in said)


def test_config_with_a_wrong_value(refuse, model):
    _configure(model, num_attention_heads="four")
    assert "num_attention_heads" in refuse(model)


def test_unknown_architecture(refuse, model):
    _configure(model, model_type="nonesuch")
    assert "model type `nonesuch`" in refuse(model)


def test_model_that_is_no_causal_one(refuse, model):
    _configure(model, model_type="t5")
    assert "T5Config" in refuse(model)


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_weights_are_never_unpickled(refuse, model, tmp_path, name):
    sprung = tmp_path / "sprung"
    (model / "model.safetensors").unlink()
    with open(model / name, "wb") as file:
        pickle.dump(Trap(sprung), file)
    said = refuse(model)
    assert f"'{model}' needs weights as *.safetensors; found only {name}, which are never unpickled" in said
    assert not sprung.exists()
    with open(model / name, "rb") as file:
        pickle.load(file)
    assert sprung.exists(), "the control: the trap works"


def test_no_weights(refuse, model):
    (model / "model.safetensors").unlink()
    assert "needs weights as *.safetensors; found none" in refuse(model)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated_weights(refuse, model, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"cannot load model '{model}': " in refuse(model)


def _reweigh(model: Path, change):
    path = model / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_weights_that_are_missing_are_not_made_up(refuse, model):
    _reweigh(model, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "its weights lack model.layers.1.mlp.up_proj.weight" in refuse(model)


def test_weights_of_another_shape(refuse, model):
    name = "model.layers.1.mlp.up_proj.weight"
    _reweigh(model, lambda weights: weights.update({name: torch.zeros(48, 5)}))
    assert f"its weights do not fit the model at {name}" in refuse(model)


def test_tokenizer_that_is_missing(refuse, model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refuse(model)


@pytest.mark.parametrize("kind", ["nonesuch", "llama"])
def test_code_in_the_model_is_never_run(refuse, model, tmp_path, kind, capfd):
    """An architecture of its own is refused; a known one loads as transformers has it."""
    sprung = tmp_path / "sprung"
    code = f"open({str(sprung)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n"
    (model / "evil.py").write_text(code)
    own = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.T", None],
    }
    _configure(model, model_type=kind, auto_map=own)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": own}))
    if kind == "nonesuch":
        assert f"cannot load model '{model}': it needs code of its own, which is never run" in refuse(model)
    else:
        with pytest.raises(SystemExit):
            cli.main(["compare", str(model), "--tokens", "40", "--methods", "dense"])
    assert not sprung.exists()
    exec(code, {})
    assert sprung.exists(), "the control: the code works"


@pytest.mark.parametrize("methods", ["sink-window", "dense"])
def test_attention_that_cannot_be_patched(refuse, sound, monkeypatch, methods):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_can_set_attn_implementation", classmethod(lambda cls: False))
    said = refuse(sound, **{"--methods": methods})
    assert "the attention of LlamaForCausalLM does not go through the attention interface" in said


def test_attention_with_terms_that_tilewise_lacks(refuse, sound, monkeypatch):
    call = Bridge.__call__
    monkeypatch.setattr(Bridge, "__call__", lambda self, *a, **k: call(self, *a, **k, s_aux=torch.zeros(4)))
    said = refuse(sound)
    assert "LlamaForCausalLM cannot run sink-window: " in said and "s_aux" in said


def test_masks_that_do_not_reach_the_attention(refuse, sound, monkeypatch):
    def blind(self, module, query, key, value, attention_mask, call=Bridge.__call__, **options):
        everything = torch.zeros(1, 1, query.shape[2], key.shape[2])
        return call(self, module, query, key, value, everything, **options)

    monkeypatch.setattr(Bridge, "__call__", blind)
    assert "leak check failed for LlamaForCausalLM" in refuse(sound)


# --- hostile text


def test_html_in_the_text_is_text_in_the_page(sound, tmp_path, reports, capfd):
    """The file's name and content hold markup, of HTML and of the terminal's."""
    hostile = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & [/bold] "
    (tmp_path / "<b>[").mkdir()
    text = tmp_path / "<b>[" / "red].txt"
    text.write_text(hostile * 4, encoding="utf-8")
    out = tmp_path / "<b>[" / "green].html"
    with pytest.raises(SystemExit) as stop:
        cli.main([
            "compare", str(sound), "--text", str(text), "--out", str(out), "--json", str(reports["--json"]),
            "--tokens", "200", "--methods", "sink-window",
        ])  # fmt: skip
    printed, err = capfd.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert f"wrote {out}" in printed
    page = out.read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img" not in page and "<b>[" not in page
    assert "\\u003c/script\\u003e\\u003cscript\\u003ealert(1)" in page
    settings = json.loads(reports["--json"].read_text(encoding="utf-8"))["settings"]
    assert settings["text_preview"] == (hostile * 4)[:200]
    assert settings["text"] == str(text)
