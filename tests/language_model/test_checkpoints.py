"""Models on disk.

Invariants: a folder that is cut off, foreign, not finite or not a model is a one-line error; a sampling configuration of
the base model does not stop a save; a save can be repeated and keeps other files; every checkpoint carries its
settings and wording.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import DEFAULT_TEMPLATE
from minionerec.common.errors import UserError
from minionerec.language_model import checkpoints
from minionerec.language_model.checkpoints import (
    Settings,
    load_model,
    load_settings,
    load_tokenizer,
    new_model,
    resolve_settings,
    save,
    save_base,
    writing,
)


@pytest.fixture
def folder(base_model, tmp_path):
    """A copy of the base model to damage."""
    shutil.copytree(base_model, tmp_path / "model")
    return tmp_path / "model"


def rewrite(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------ loading

WEIGHTS = "model.safetensors"


def weights_changed(change):
    def damage(folder):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return damage


def cut(name, length=0.5):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * length)])

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


NORM = "model.norm.weight"
BROKEN = {
    "weights cut off": cut(WEIGHTS),
    "weights nearly whole": cut(WEIGHTS, 0.999),
    "weights empty": text(WEIGHTS, b""),
    "weights of text": text(WEIGHTS, b"not weights at all"),
    "weights missing": lambda folder: (folder / WEIGHTS).unlink(),
    "weights of another model": weights_changed(
        lambda weights: [weights.update({f"other.{name}": weights.pop(name)}) for name in list(weights)]
    ),
    "one weight missing": weights_changed(lambda weights: weights.pop(NORM)),
    "one weight of another shape": weights_changed(lambda weights: weights.update({NORM: torch.ones(7)})),
    "NaN": weights_changed(lambda weights: weights[NORM].fill_(float("nan"))),
    "infinite": weights_changed(lambda weights: weights["model.embed_tokens.weight"][0].fill_(float("inf"))),
    "pickle": lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
    "config is a list": text("config.json", b"[1, 2]"),
    "config is a number": text("config.json", b"3"),
    "config is no JSON": text("config.json", b"{"),
    "config is latin-1": text("config.json", b'{"model_type": "qwen\xe9"}'),
    "config of no model": text("config.json", b"{}"),
    "config of an unknown model": text("config.json", b'{"model_type": "nonsense"}'),
    "config of an encoder": text("config.json", b'{"model_type": "vit"}'),
    "config with text for a number": lambda folder: rewrite(
        folder / "config.json", lambda config: config.update(hidden_size="wide")
    ),
    "code in the checkpoint": lambda folder: rewrite(
        folder / "config.json", lambda config: config.update(model_type="own", auto_map={"AutoConfig": "x.Config"})
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_model_is_one_line(damage, folder):
    BROKEN[damage](folder)
    with pytest.raises(UserError) as refused:
        load_model(folder, "base_model")
    message = str(refused.value)
    assert message.startswith(str(folder)) and "\n" not in message and len(message) < 600


@pytest.mark.parametrize("damage", [damage for damage in BROKEN if damage.startswith(("config", "code"))])
def test_a_broken_config_is_one_line(damage, folder):
    BROKEN[damage](folder)
    with pytest.raises(UserError, match="found no readable config of a causal language model .*check --base_model"):
        new_model(folder, "base_model")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_a_broken_tokenizer_is_one_line(content, folder):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_tokenizer(folder, "base_model")
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_folders_that_are_no_models(tmp_path):
    for place in ("nowhere", "."):
        for load in (load_model, new_model, load_tokenizer):
            with pytest.raises(UserError, match="found no readable .*check --base_model"):
                load(tmp_path / place, "base_model")


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_sampling_values_of_a_base_model_do_not_stop_a_save(place, folder, tmp_path):
    values = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}  # without do_sample
    if place == "config.json":
        rewrite(folder / place, lambda config: config.update(values))
    else:
        (folder / place).write_text(json.dumps(values))
    for load in (load_model, new_model):
        model = load(folder, "base_model")
        save_base(model, load_tokenizer(folder, "base_model"), tmp_path / "saved")
        stored = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
        assert not {"temperature", "top_p", "do_sample"} & stored.keys()
        load_model(tmp_path / "saved", "base_model")


def test_a_save_can_be_repeated_and_leaves_other_files_alone(base_model, tmp_path):
    model, tokenizer = load_model(base_model, "x"), load_tokenizer(base_model, "x")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}  # a file and a folder of files
    folder = tmp_path / "out"
    (folder / ".saving").mkdir(parents=True)  # of a save that was killed
    (folder / ".saving" / "half").write_text("x")
    (folder / "mine.txt").write_text("mine")
    for category in ("one", "two"):
        save(model, tokenizer, DEFAULT_TEMPLATE, folder, Settings(category))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"mine.txt", "minionerec.json", "prompt.yaml", "additional_chat_templates/tool_use.jinja"} <= names
    assert not any(name.startswith(".saving") for name in names) and load_settings(folder).category == "two"
    assert load_tokenizer(folder, "x").chat_template == tokenizer.chat_template


def test_a_full_disk_is_one_line_and_keeps_what_was_there(base_model, small_disk):
    folder = small_disk / "out"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    model, tokenizer = load_model(base_model, "x"), load_tokenizer(base_model, "x")
    model.resize_token_embeddings(20_000, mean_resizing=False)
    with pytest.raises((UserError, OSError)) as refused:
        save(model, tokenizer, DEFAULT_TEMPLATE, folder, Settings())
    assert "could not be written" in str(refused.value) or "No space left" in str(refused.value)
    assert (folder / "config.json").read_text() == "old" and [path.name for path in folder.iterdir()] == ["config.json"]
    with pytest.raises((UserError, OSError), match="could not be written|No space left"), writing(folder):
        torch.save(torch.zeros(10**6), folder / "optimizer.pt")


# ------------------------------------------------------------------------------------------------ settings


def test_settings_round_trip_and_defaults(checkpoint_folder, base_model, tmp_path):
    assert load_settings(base_model) is None  # trained elsewhere
    assert resolve_settings(base_model) == Settings("", 10, "vocab")
    shutil.copytree(checkpoint_folder, tmp_path / "x")
    checkpoints.save_settings(tmp_path / "x", DEFAULT_TEMPLATE, Settings("Toys", 20, "catalog"))
    assert resolve_settings(tmp_path / "x", category="", max_history=0, space="") == Settings("Toys", 20, "catalog")


def test_a_contradiction_is_named(checkpoint_folder, tmp_path, capsys):
    shutil.copytree(checkpoint_folder, tmp_path / "x")
    checkpoints.save_settings(tmp_path / "x", DEFAULT_TEMPLATE, Settings("Toys", 20))
    found = resolve_settings(tmp_path / "x", category="Toys", max_history=5, space="catalog")
    assert found == Settings("Toys", 5, "catalog")
    assert capsys.readouterr().out.splitlines() == [
        f"note: --max_history 5 is used, but {tmp_path / 'x'} was trained with 20",
        f"note: --space catalog is used, but {tmp_path / 'x'} was trained with 'vocab'",
    ]


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"category": 3, "max_history": 10, "space": "vocab"}'])
def test_broken_settings_are_one_line(content, tmp_path):
    (tmp_path / "minionerec.json").write_text(content)
    with pytest.raises(UserError, match="minionerec.json: "):
        load_settings(tmp_path)
