"""The record of a run: when a stage skips, resumes, starts, or refuses to.

Invariants: every row of the table in the docstring of `minionerec/common/runs.py`; only settings and the content of
inputs are the identity; inputs are recorded as they were when the run began; nothing is ever deleted, and what moves
aside keeps its bytes and its place in the folder; a refused start leaves the folder as it was.
"""

import json
import sys
from dataclasses import dataclass, replace
from unittest import mock

import pytest

from minionerec.common import options as options_module
from minionerec.common import runs
from minionerec.common.errors import UserError
from minionerec.common.options import INPUT, OUTPUT, RUNTIME, StageOptions, option

WRITES = ["result.txt", "parts/*.txt", "checkpoint-*"]


@dataclass
class Options(StageOptions):
    data: str = option("", "a file or folder", role=INPUT)
    model: str = option("", "a folder or a name", role=INPUT)
    lr: float = option(1.0, "rate")
    layers: list[int] = option([2, 1], "sizes")
    report_to: str = option("none", "a tracker", role=RUNTIME)
    output_dir: str = option("", "folder", role=OUTPUT)


@pytest.fixture
def options(tmp_path):
    (tmp_path / "data.csv").write_text("a\n1\n")
    return Options(data=str(tmp_path / "data.csv"), output_dir=str(tmp_path / "out"))


def begin(options):
    return runs.begin(options, "stage", folder=options.output_dir, writes=WRITES)


def write(options, text="made"):
    """What the stage writes, one file in a folder below."""
    for name in ("result.txt", "parts/one.txt"):
        path = runs.Path(options.output_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def made(options, text="made"):
    """A finished run."""
    run = begin(options)
    write(options, text)
    run.finish()


def record(options) -> dict:
    return json.loads((runs.Path(options.output_dir) / "run.json").read_text())


# ------------------------------------------------------------------------------------------------ the table


def test_no_result_is_a_fresh_start(options):
    run = begin(options)
    assert (run.state, run.complete, run.resume) == ("fresh", False, False)
    assert record(options)["complete"] is False


def test_complete_with_the_same_identity_is_nothing_to_do(options, capsys):
    made(options)
    capsys.readouterr()
    assert begin(options).complete
    reads, *lines = capsys.readouterr().out.splitlines()
    assert reads.startswith("stage: reads ") and options.data in reads
    assert lines == [f"{options.output_dir}: complete with these options, nothing to do"]


def test_a_missing_file_is_made_again(options, tmp_path, capsys):
    made(options)
    (tmp_path / "out" / "parts" / "one.txt").unlink()
    run = begin(options)
    assert run.state == "fresh" and "parts/one.txt is missing; made again" in capsys.readouterr().out
    assert (tmp_path / "out" / "result.txt").read_text() == "made"  # nothing else moved
    write(options)
    run.finish()
    assert begin(options).complete


def test_unfinished_with_the_same_identity_resumes(options):
    begin(options)
    assert begin(options).resume
    write(options)
    assert begin(options).resume


def test_another_identity_without_files_is_a_fresh_start(options):
    """The corrected command after a start that failed."""
    begin(options)
    assert begin(replace(options, lr=2.0)).state == "fresh"
    assert record(options)["settings"]["lr"] == 2.0


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", ["setting", "input", "stage"])
def test_another_identity_is_refused_and_moved_aside_on_request(options, tmp_path, capsys, finished, change):
    def start(options):
        return runs.begin(options, "other" if change == "stage" else "stage", folder=options.output_dir, writes=WRITES)

    run = begin(options)
    write(options)
    (tmp_path / "out" / "checkpoint-5").mkdir()
    (tmp_path / "out" / "checkpoint-5" / "weights").write_text("kept")
    (tmp_path / "out" / "mine.txt").write_text("not the stage's")
    if finished:
        run.finish()
    before = record(options)
    changed, reason = {
        "setting": (replace(options, lr=2.0), r"lr is 1.0 there and 2.0 now"),
        "input": (options, "the content of data has changed"),
        "stage": (options, "it was made by stage"),
    }[change]
    if change == "input":
        (tmp_path / "data.csv").write_text("a\n2\n")
    with pytest.raises(UserError, match=rf"out: holds another result \({reason}\).*--overwrite True"):
        start(changed)
    assert record(options) == before and (tmp_path / "out" / "result.txt").read_text() == "made"

    assert start(replace(changed, overwrite=True)).state == "fresh"
    assert f"the old result ({reason}) moves to {options.output_dir}.1" in capsys.readouterr().out
    aside = tmp_path / "out.1"
    assert (aside / "result.txt").read_text() == (aside / "parts" / "one.txt").read_text() == "made"
    assert (aside / "checkpoint-5" / "weights").read_text() == "kept"
    assert json.loads((aside / "run.json").read_text()) == before
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_file()} == {"mine.txt", "run.json"}


def test_files_without_a_record_are_refused(options, tmp_path):
    write(options, "precious")
    with pytest.raises(UserError, match="holds another result .result.txt was not made by this stage"):
        begin(options)
    assert not (tmp_path / "out" / "run.json").exists()
    assert begin(replace(options, overwrite=True)).state == "fresh"
    assert (tmp_path / "out.1" / "result.txt").read_text() == "precious"


def test_what_moves_aside_takes_the_next_free_name(options, tmp_path):
    for number in range(3):
        made(replace(options, lr=float(number), overwrite=True), f"made {number}")
    texts = [(tmp_path / name / "result.txt").read_text() for name in ("out.1", "out.2", "out")]
    assert texts == ["made 0", "made 1", "made 2"]


def test_splits_of_one_name_keep_their_folders_when_they_move(options, tmp_path):
    options.overwrite = True
    for lr in (1.0, 2.0):
        run = begin(replace(options, lr=lr))
        for split in ("train", "valid"):
            (tmp_path / "out" / split).mkdir(exist_ok=True)
            (tmp_path / "out" / split / "D.csv").write_text(f"{split} {lr}")
        run.writes = ["*/D.csv"]
        run.finish()
    assert [(tmp_path / "out.1" / split / "D.csv").read_text() for split in ("train", "valid")] == [
        "train 1.0", "valid 1.0",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ results that are files


def test_a_result_of_files(options, tmp_path):
    files = [tmp_path / "D.index.json", tmp_path / "D.codebooks.npz"]
    neighbour = tmp_path / "E.index.json"
    neighbour.write_text("another stage's")

    def start(options):
        return runs.begin(options, "index", files=files)

    run = start(options)
    assert run.path == tmp_path / "D.index.run.json"
    for file in files:
        file.write_text("made")
    run.finish()
    assert start(options).complete
    with pytest.raises(UserError, match="D.index.json: holds another result .lr is 1.0"):
        start(replace(options, lr=2.0))
    assert start(replace(options, lr=2.0, overwrite=True)).state == "fresh"
    assert [path.read_text() for path in (tmp_path / "D.index.json.1", tmp_path / "D.codebooks.npz.1")] == ["made"] * 2
    assert (tmp_path / "D.index.run.json.1").exists() and neighbour.read_text() == "another stage's"


# ------------------------------------------------------------------------------------------------ refused starts


def refused(options, action=lambda: None, begin=begin) -> None:
    """A stage that begins, does something and finds an error of the user."""

    def main(_):
        begin(options)
        action()
        raise UserError("no")

    with (
        mock.patch.object(sys, "argv", ["stage"]),
        mock.patch.object(options_module, "parse", lambda *_: options),
        pytest.raises(SystemExit),
    ):
        options_module.run(main, Options)


def snapshot(folder) -> dict:
    """{path: bytes, None for a folder}"""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_refused_start_withdraws_its_record_and_folders(options, tmp_path):
    before = snapshot(tmp_path)
    refused(replace(options, output_dir=str(tmp_path / "out" / "deep" / "er")))
    assert snapshot(tmp_path) == before


def test_a_refused_start_brings_back_what_it_moved_aside(options, tmp_path):
    made(options)
    (tmp_path / "out" / "mine.txt").write_text("not the stage's")
    before = snapshot(tmp_path)
    refused(replace(options, lr=2.0, overwrite=True))
    assert snapshot(tmp_path) == before and begin(options).complete


def test_a_refused_start_keeps_the_record_of_an_unfinished_run(options, tmp_path):
    begin(options)
    before = snapshot(tmp_path)
    refused(options)
    assert snapshot(tmp_path) == before
    refused(options, lambda: write(options))
    assert not record(options)["complete"] and begin(options).resume  # results are there: the run can be resumed


def test_a_refused_start_keeps_logs_that_it_did_not_begin(options, tmp_path):
    """Of a training in whose folder another stage writes a file, and of a folder that holds nothing else."""
    log, file = tmp_path / "out" / "log.jsonl", tmp_path / "out" / "p.json"
    log.parent.mkdir()
    log.write_text("another training's")
    before = snapshot(tmp_path)
    refused(
        options, begin=lambda given: runs.begin(given, "evaluate", files=[file], record=file.with_suffix(".run.json"))
    )
    assert snapshot(tmp_path) == before
    refused(options)
    assert snapshot(tmp_path) == before


def test_a_finished_run_is_not_withdrawn(options, tmp_path):
    """A command of two stages, of which the second is refused."""
    refused(replace(options, output_dir=str(tmp_path / "second")), lambda: made(options))
    assert begin(options).complete and not (tmp_path / "second").exists()


# ------------------------------------------------------------------------------------------------ identity


def test_names_trackers_and_paths_are_not_the_identity(options, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    made(replace(options, report_to="wandb"))
    (tmp_path / "wandb" / "log").write_text("grows")
    (tmp_path / "renamed.csv").write_bytes((tmp_path / "data.csv").read_bytes())
    assert begin(replace(options, data="renamed.csv", report_to="none")).complete


def test_a_setting_that_names_a_path_is_a_word(options, tmp_path, monkeypatch):
    @dataclass
    class Named(Options):
        category: str = option("", "a word")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "games").mkdir()
    named = Named(data=options.data, output_dir=options.output_dir, category="games")
    made(named)
    (tmp_path / "games" / "x.csv").write_text("new")
    assert begin(named).complete


def test_inputs_are_recorded_as_they_were_when_the_run_began(options, tmp_path):
    run = begin(options)
    (tmp_path / "data.csv").write_text("changed while it ran\n")
    write(options)
    run.finish()
    with pytest.raises(UserError, match="the content of data has changed"):
        begin(options)


def test_a_folder_counts_by_what_shapes_a_result(options, tmp_path):
    model = tmp_path / "model"
    (model / "checkpoint-1").mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"1")
    options.model = str(model)
    made(options)
    for name in ("run.json", "x.run.json", "metrics.json", "training_args.bin", "notes.md", "checkpoint-1/a.json"):
        (model / name).write_text("no part of the model")
    assert begin(options).complete
    (model / "model.safetensors").write_bytes(b"2")
    with pytest.raises(UserError, match="the content of model has changed"):
        begin(options)


def test_a_name_that_is_no_path_counts_as_itself(options):
    made(replace(options, model="org/name"))
    with pytest.raises(UserError, match="the content of model has changed"):
        begin(replace(options, model="org/other"))
    with pytest.raises(UserError, match="model is .* there and None now"):
        begin(options)


def test_further_inputs_and_the_precision_of_accelerate(options, tmp_path, monkeypatch):
    template = tmp_path / "prompt.yaml"
    template.write_text("a: 1")

    def start():
        return runs.begin(options, "stage", folder=options.output_dir, writes=WRITES, inputs={"prompt": template})

    run = start()
    write(options)
    run.finish()
    assert start().complete
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert start().complete
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="accelerate is None there and {'mixed_precision': 'bf16'} now"):
        start()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    template.write_text("a: 2")
    with pytest.raises(UserError, match="the content of prompt has changed"):
        start()


# ------------------------------------------------------------------------------------------------ what else it says


def test_the_record(options, tmp_path):
    made(options)
    found = record(options)
    assert found["stage"] == "stage" and found["complete"] is True
    assert found["settings"] == {"lr": 1.0, "layers": [2, 1]}
    assert set(found["inputs"]) == {"data"} and len(found["inputs"]["data"]) == 32
    assert found["outputs"] == {"parts/one.txt": 4, "result.txt": 4}
    assert {"torch", "python"} <= set(found["versions"])
    assert found["code"] and found["command"] and found["device"] and found["seconds"] >= 0
    assert found["options"] == {"data": options.data, "output_dir": options.output_dir}  # what is no default
    assert found["commit"] == runs.commit()


def test_the_command_line_of_a_record(options):
    made(replace(options, layers=[3, 4], report_to="a b"))
    line = f"--data {options.data} --layers 3 4 --report_to 'a b' --output_dir {options.output_dir}"
    known = record(options)
    for script, shown in (("sft.py", "sft.py"), (f"{runs.ROOT}/rq/rqvae.py", "-m rq.rqvae"), ("/else/x.py", "x.py")):
        assert runs.command_line(known | {"command": f"{script} --lr 2"}) == f"python {shown} {line}"
    assert runs.command_line({"command": "sft.py --lr 2"}) == "python sft.py --lr 2"  # an older record


def test_a_changed_result_is_kept_and_said(options, tmp_path, capsys, monkeypatch):
    made(options)
    (tmp_path / "out" / "result.txt").write_text("edited by hand")
    monkeypatch.setattr(runs, "code_version", lambda: "another")
    assert begin(options).complete
    text = capsys.readouterr().out
    assert "out/result.txt was changed after this stage wrote it; the changed file is kept" in text
    assert "made by another version of the code" in text
    assert (tmp_path / "out" / "result.txt").read_text() == "edited by hand"


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\x00"])
def test_a_damaged_record_is_no_record(options, tmp_path, content):
    made(options)
    (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(UserError, match="was not made by this stage"):
        begin(options)


def test_code_version_changes_with_the_code(tmp_path, monkeypatch):
    (tmp_path / "minionerec").mkdir()
    (tmp_path / "minionerec" / "a.py").write_text("1")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    versions = []
    for text in ("1", "2"):
        (tmp_path / "minionerec" / "a.py").write_text(text)
        runs.code_version.cache_clear()
        versions.append(runs.code_version())
    runs.code_version.cache_clear()
    assert versions[0] != versions[1]


def test_an_unfinished_result_is_refused_by_who_reads_it(tmp_path):
    runs.require_finished(tmp_path)  # no record: made elsewhere
    (tmp_path / "run.json").write_text(json.dumps({"stage": "sft", "complete": False}))
    with pytest.raises(UserError, match="sft has not finished there"):
        runs.require_finished(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"stage": "sft", "complete": True}))
    runs.require_finished(tmp_path)


def test_a_result_inside_an_input_is_no_part_of_it(options, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    inside = replace(options, model=str(model), output_dir=str(model / "out"))
    begin(inside)
    write(inside)
    (model / "out" / "more.json").write_text("{}")
    assert begin(inside).resume
    made(inside)
    assert begin(inside).complete

    files = [model / "scores.v1.json", model / "scores.v1.npz"]

    def score():
        return runs.begin(options, "score", files=files, record=model / "scores.v1.run.json", inputs={"scored": model})

    run = score()
    for file in files:
        file.write_text("1")
    assert score().resume
    run.finish()
    assert score().complete and begin(inside).complete
    (model / "config.json").write_text("[]")
    for changed in (score, lambda: begin(inside)):
        with pytest.raises(UserError, match="the content of (model|scored) has changed"):
            changed()


def test_the_working_directory_moves_aside_under_its_own_name(options, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    (tmp_path / "model" / "result.txt").write_text("old")
    runs.begin(replace(options, overwrite=True), "stage", folder=".", writes=["*.txt"])
    assert (tmp_path / "model.1" / "result.txt").read_text() == "old" and not list((tmp_path / "model").glob(".*"))
