"""Models on disk.

Invariants: a folder that is cut off, foreign, not finite or not a model is a one-line error; a sampling configuration of
the base model does not stop a save; a save can be repeated and keeps other files; every checkpoint carries its
settings and wording; checkpoints of a run are removed only when they are no longer needed, other folders never.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from data import DEFAULT_TEMPLATE
from minionerec.common import runs
from minionerec.common.errors import UserError
from minionerec.language_model import checkpoints
from minionerec.language_model.checkpoints import (
    KeepCheckpoints,
    Settings,
    last_checkpoint,
    load_model,
    load_settings,
    load_tokenizer,
    new_model,
    remove_checkpoints,
    resolve_settings,
    resume_point,
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


# ------------------------------------------------------------------------------------------------ checkpoint-N


RECORD = {"id": "one", "stage": "sft", "settings": {"seed": 1, "epochs": 2}, "inputs": {"base_model": "a"}}
RESUMED, FRESH = (runs.Run(state, Path("run.json"), RECORD) for state in ("resume", "fresh"))


def checkpoint(folder, step, record=RECORD, **state):
    """A `checkpoint-N` as the Trainer leaves it; record: of the run that made it, None for an earlier version's."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.zeros(50)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"lr": 1.0}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step} | state))
    if record:
        checkpoints.complete_manifest(path, record)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_complete_checkpoint_is_the_last(tmp_path):
    assert last_checkpoint(tmp_path, RECORD) is None
    for step in (9, 10, 11, 12, 13, 14):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path / "elsewhere", 99)
    (tmp_path / "elsewhere" / "checkpoint-99").rename(tmp_path / "checkpoint-good")
    (tmp_path / "checkpoint-14" / "trainer_state.json").unlink()
    cut("trainer_state.json")(tmp_path / "checkpoint-13")
    cut("model.safetensors")(tmp_path / "checkpoint-12")
    cut("optimizer.pt")(tmp_path / "checkpoint-11")
    assert last_checkpoint(tmp_path, RECORD) == str(tmp_path / "checkpoint-10")
    assert resume_point(tmp_path, "", RESUMED) == str(tmp_path / "checkpoint-10")
    assert resume_point(tmp_path, "", FRESH) is None
    assert resume_point(tmp_path, str(tmp_path / "checkpoint-9"), FRESH) == str(tmp_path / "checkpoint-9")
    for given in ("checkpoint-12", "nowhere"):
        with pytest.raises(UserError, match=f"--resume_from_checkpoint .*{given}: found no complete checkpoint"):
            resume_point(tmp_path, str(tmp_path / given), RESUMED)


def remove(name):
    return lambda path: (path / name).unlink()


def flip(name):
    def change(path):
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return change


@pytest.mark.parametrize("old", [False, True], ids=["manifest", "earlier version"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_with_a_missing_or_changed_file_is_not_complete(tmp_path, file, old, capsys):
    for damage, reason in ((remove(file), "is missing"), (flip(file), "has changed")):
        checkpoint(tmp_path, 4)
        path = checkpoint(tmp_path, 8, None if old else RECORD)
        assert checkpoints.is_complete(path)
        if not (old and reason == "has changed"):  # only a manifest can tell
            damage(path)
            with pytest.raises(UserError, match=rf"no complete checkpoint \(.*{file.split('.')[0]}.* {reason}\)"):
                resume_point(tmp_path, str(path), FRESH)
        assert resume_point(tmp_path, "", RESUMED) == str(tmp_path / "checkpoint-4")
        expected = "was not made by this run" if old else f"is not complete ({file} {reason})"
        assert expected in capsys.readouterr().out
        shutil.rmtree(path)
        shutil.rmtree(tmp_path / "checkpoint-4")


def test_what_deepspeed_and_lora_write_is_in_the_manifest(tmp_path):
    path = checkpoint(tmp_path, 8)
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "global_step8").mkdir()
    torch.save({}, path / "global_step8" / "zero_pp_rank_0_optim_states.pt")
    checkpoints.complete_manifest(path, RECORD)
    assert checkpoints.is_complete(path)
    (path / "global_step8" / "zero_pp_rank_0_optim_states.pt").unlink()
    assert checkpoints.defect(path) == "global_step8/zero_pp_rank_0_optim_states.pt is missing"


def test_large_files_are_told_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "DIGESTED_BELOW", 100)
    path = checkpoint(tmp_path, 8)
    flip("model.safetensors")(path)
    assert checkpoints.is_complete(path)
    cut("model.safetensors")(path)
    assert checkpoints.defect(path) == "model.safetensors has changed"


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(tmp_path, capsys):
    def point(folder, record=RECORD):
        return resume_point(tmp_path / "out", str(folder), runs.Run("fresh", tmp_path, record))

    given = checkpoint(tmp_path / "k", 8)
    assert point(given, RECORD | {"id": "two"}) == str(given)
    for change, message in (
        ({"settings": {"seed": 1, "epochs": 3}}, "epochs is 2 there and 3 now"),
        ({"inputs": {"base_model": "b"}}, "the content of base_model has changed"),
        ({"stage": "rl"}, "it was made by sft"),
    ):
        with pytest.raises(UserError, match=rf"checkpoint-8: its run was another one \({message}\); give the same"):
            point(given, RECORD | change)
    (given / "manifest.json").unlink()
    assert point(given) == str(given) and "checkpoint-8 has no record of its run" in capsys.readouterr().out
    (tmp_path / "k" / "run.json").write_text(json.dumps(RECORD | {"stage": "rl"}))
    with pytest.raises(UserError, match="it was made by rl"):
        point(given)


def test_checkpoints_that_another_run_made_are_neither_resumed_from_nor_removed(tmp_path, capsys):
    for step, record in ((4, RECORD), (6, RECORD | {"id": "two"}), (8, None)):
        checkpoint(tmp_path, step, record)
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-3")
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-99999").mkdir()
    assert resume_point(tmp_path, "", RESUMED) == str(tmp_path / "checkpoint-4")
    printed = capsys.readouterr().out
    for step in (6, 7, 8, 99999):
        assert f"checkpoint-{step} was not made by this run; it is neither resumed from nor removed" in printed
    remove_checkpoints(tmp_path, RECORD)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (3, 6, 7, 8, 99999)]


def test_a_checkpoint_of_another_at_this_place_moves_aside(tmp_path, capsys):
    mine, other = tmp_path / "checkpoint-2", checkpoint(tmp_path, 4, None)
    for path in (mine, other, mine):
        checkpoints.begin_manifest(path, RECORD)
        assert checkpoints.is_of_run(path, RECORD) and not checkpoints.is_complete(path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-4.1"]
    assert (tmp_path / "checkpoint-4.1" / "model.safetensors").exists() and "checkpoint-4.1" in capsys.readouterr().out


def test_an_error_of_a_library_while_resuming_is_one_line():
    with pytest.raises(UserError, match=r"out/checkpoint-8: cannot be resumed from \(state\); check --resume_from"):
        with checkpoints.resuming("out/checkpoint-8"):
            raise ValueError("state")


def test_only_numbered_checkpoints_are_removed(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    for name in ("checkpoint-good", "checkpoint-4.1", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    remove_checkpoints(tmp_path, RECORD, keep=[tmp_path / "checkpoint-2", None, ""])
    assert names(tmp_path) == ["checkpoint-", "checkpoint-2", "checkpoint-4.1", "checkpoint-5", "checkpoint-good"]


def test_a_checkpoint_is_completed_and_earlier_ones_go(tmp_path):
    for step in (2, 4, 6, 8, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-good").mkdir()
    keep = KeepCheckpoints(DEFAULT_TEMPLATE, Settings("Toys", 7), str(tmp_path / "checkpoint-4"), RECORD)
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    state = TrainerState(global_step=8, best_model_checkpoint=str(tmp_path / "checkpoint-6"))
    keep.on_save(args, state, None)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in ("10", "4", "6", "8", "good")]
    assert load_settings(tmp_path / "checkpoint-8") == Settings("Toys", 7)
    assert "prompt.yaml" in json.loads((tmp_path / "checkpoint-8" / "manifest.json").read_text())["files"]
    assert (tmp_path / "checkpoint-8" / "prompt.yaml").read_bytes() == DEFAULT_TEMPLATE.read_bytes()
    keep.on_save(SimpleNamespace(output_dir=str(tmp_path), should_save=False), state, None)  # another process


def test_the_best_checkpoint_of_a_moved_run_is_found(tmp_path):
    best = checkpoint(tmp_path / "new", 4)
    args = SimpleNamespace(output_dir=str(tmp_path / "new"))
    for known in ({"best_model_checkpoint": str(tmp_path / "old" / "checkpoint-4")}, {"best_global_step": 4}):
        state = TrainerState(**known)
        KeepCheckpoints(DEFAULT_TEMPLATE, Settings(), str(best), RECORD).on_train_begin(args, state, None)
        assert state.best_model_checkpoint == str(best)
    state = TrainerState(best_model_checkpoint=str(tmp_path / "old" / "checkpoint-2"))
    with pytest.raises(UserError, match="checkpoint-2: the best checkpoint so far .* is missing; put it back"):
        KeepCheckpoints(DEFAULT_TEMPLATE, Settings(), str(best), RECORD).on_train_begin(args, state, None)
