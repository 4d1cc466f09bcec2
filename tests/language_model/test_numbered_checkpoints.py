"""The `checkpoint-N` folders of a run.

Invariants: a run resumes only from a whole checkpoint, and by itself only from one that it made; its checkpoints are removed
only when they are no longer needed, other folders never.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerState

from data import DEFAULT_TEMPLATE
from minionerec.common import runs
from minionerec.common.errors import UserError
from minionerec.language_model import numbered_checkpoints
from minionerec.language_model.checkpoints import Settings, load_settings
from minionerec.language_model.numbered_checkpoints import (
    KeepCheckpoints,
    last_checkpoint,
    remove_checkpoints,
    resume_point,
)

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
        numbered_checkpoints.complete_manifest(path, record)
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


def cut(name):
    """The second half of a file is missing."""

    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


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
        assert numbered_checkpoints.is_complete(path)
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
    numbered_checkpoints.complete_manifest(path, RECORD)
    assert numbered_checkpoints.is_complete(path)
    (path / "global_step8" / "zero_pp_rank_0_optim_states.pt").unlink()
    assert numbered_checkpoints.defect(path) == "global_step8/zero_pp_rank_0_optim_states.pt is missing"


def test_large_files_are_told_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(numbered_checkpoints, "DIGESTED_BELOW", 100)
    path = checkpoint(tmp_path, 8)
    flip("model.safetensors")(path)
    assert numbered_checkpoints.is_complete(path)
    cut("model.safetensors")(path)
    assert numbered_checkpoints.defect(path) == "model.safetensors has changed"


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
        numbered_checkpoints.begin_manifest(path, RECORD)
        assert numbered_checkpoints.is_of_run(path, RECORD) and not numbered_checkpoints.is_complete(path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-4.1"]
    assert (tmp_path / "checkpoint-4.1" / "model.safetensors").exists() and "checkpoint-4.1" in capsys.readouterr().out


def test_an_error_of_a_library_while_resuming_is_one_line():
    with pytest.raises(UserError, match=r"out/checkpoint-8: cannot be resumed from \(state\); check --resume_from"):
        with numbered_checkpoints.resuming("out/checkpoint-8"):
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
