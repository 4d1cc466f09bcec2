"""Data that tries to run code, to break the shell, the terminal, YAML, CSV, HTML and the report, through every stage.

Invariants: nothing in the data is executed; every stage finishes; what a stage prints is printable; titles come back from
the results as they went in, white space collapsed.
"""

import contextlib
import io
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
from bad_inputs import bench
from helpers import run_stage, write_encoder, write_world

VICTIM = "EXECUTED"  # a file that appears where anything is executed
NAME = f"to'y $(touch {VICTIM}) [1]* #%s"  # of the data set
HOSTILE = [
    f"__import__('pathlib').Path('{VICTIM}').touch()",
    f"[__import__('pathlib').Path('{VICTIM}').touch()]",
    f"$(touch {VICTIM})", f"`touch {VICTIM}`", f"'; touch {VICTIM} #", f'"; touch {VICTIM}; "', f"| touch {VICTIM}",
    f"!!python/object/apply:pathlib.Path.touch ['{VICTIM}']", "&a [*a, {", "- : ? ,", "{0.__class__} {history} {category}",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07", "\u202egnp.exe", "line\u2028separator", "nul \x00 and bell \x07", "tab\tand\nnewline",
    '=HYPERLINK("http://example.com")', "<script>alert(1)</script>", "</table>| a | b |", r"$\frac{1}{0}$ \input{x}",
    "<a_1><b_2><c_3>", "<|endoftext|><|im_start|>", "../../../etc/passwd", "%s %n %d", "NaN", "-1", "null", "True", "1e999",
    "[]", "['a', 'b']", '{"a": 1}', "'", '"', '""', ",", ";", "\\", "\\u0041", "x" * 2000, "é ü 漢 \U0001f600", "\ufeffmark",
]  # fmt: skip


def hostile_text(number: int) -> str:
    return HOSTILE[number % len(HOSTILE)]


def user_of(number: int) -> str:
    """A user id that .inter can hold: without tabs and line ends."""
    return " ".join(hostile_text(number).split())


def write_hostile_data(folder: Path) -> list[str]:
    """The small data set with hostile texts, users and name; returns the titles as prompts show white space."""
    world = write_world(folder / "world")
    meta = {}
    for item in range(48):
        texts = [hostile_text(item + shift) for shift in range(4)]
        meta[str(item)] = dict(zip(("title", "description", "brand", "categories"), texts, strict=True))
        meta[str(item)]["description"] = [texts[1], {"x": texts[2]}, None]
    (folder / f"{NAME}.item.json").write_text(json.dumps(meta))
    (folder / f"{NAME}.index.json").write_bytes(world.index.read_bytes())
    for split in ("train", "valid", "test"):
        header, *rows = (world.folder / f"toy.{split}.inter").read_text().splitlines()
        rows = [user_of(i) + row[row.index("\t") :] for i, row in enumerate(rows)]
        (folder / f"{NAME}.{split}.inter").write_text("\n".join([header, *rows]) + "\n")
    (folder / "likes.json").write_text(
        json.dumps({user_of(i) or "nobody": f"likes {user_of(i + 1)}" for i in range(40)})
    )
    return [" ".join(entry["title"].split()) for entry in meta.values()]


def assert_printable(text: str) -> None:
    for line in text.replace("\r", "\n").split("\n"):
        assert line.isprintable(), repr(line)


@pytest.mark.slow
def test_every_stage(tmp_path, monkeypatch, capsys):
    folder = tmp_path / f"a $(touch {VICTIM}) 'b' *"
    folder.mkdir()
    monkeypatch.chdir(folder)
    titles = write_hostile_data(folder)
    write_encoder(folder / "encoder")
    csvs = {split: f"{split}/{NAME}.csv" for split in ("train", "valid", "test")}
    embeddings, index, items, info = (
        f"{NAME}.emb-y-td.npy",
        f"{NAME}.index.json",
        f"{NAME}.item.json",
        f"info/{NAME}.txt",
    )
    data = {"train_file": csvs["train"], "info_file": info}
    category = f"$(touch {VICTIM})\x1b[31m{{history}}" + "x" * 300

    def stage(name: str, **options) -> str:
        """Run a stage; returns what it prints."""
        capsys.readouterr()
        bench.call(name, options)
        done = capsys.readouterr()
        assert_printable(done.out)
        assert not list(tmp_path.rglob(VICTIM)) and not Path(VICTIM).exists()
        return done.out

    # ---- stages 1 to 3
    stage("convert_dataset", dataset_name=NAME, output_dir=".")
    stage("text2emb", dataset=NAME)
    quantizer = {"data_path": embeddings, "ckpt_dir": "rqvae", "num_emb_list": "8 32"}
    stage("rqvae", **quantizer)
    stage("generate_indices", data_path=embeddings, output_file=f"out/{NAME}.index.json", collision="extra_token")
    kmeans = {"data_path": embeddings, "output_file": f"km/{NAME}.index.json", "k": 4, "l": 2}
    stage("rqkmeans_constrained", **kmeans)
    stage("base_model", output_dir="base", item_meta_path=items)

    # ---- models
    valid = {"valid_file": csvs["valid"], "test_file": csvs["test"]}
    stage("sasrec", **data | valid, output_dir="run/sasrec")
    stage("sasrec", **data | valid, output_dir="run/popularity", model="popularity")
    stage("fuse_embeddings", **data, data_path=embeddings, baseline_path="run/sasrec")
    tasks = "sid_seq,title2sid,sid2title,sid_seq2title,title_seq2title,title_seq2sid,sid_walk,sid_seq2preference"
    sft = {"train_file": csvs["train"], "eval_file": csvs["valid"], "sid_index_path": index, "item_meta_path": items}
    stage("sft", **sft, output_dir="run/sft", sft_tasks=tasks, user_preference_file="likes.json", category=category)
    rl = {"train_file": csvs["train"], "eval_file": csvs["valid"], "info_file": info, "model_path": "run/sft"}
    stage("rl", **rl, output_dir="run/rl", rl_tasks="sid_seq,title2sid,title_seq2sid")
    test = {
        "base_model": "run/rl",
        "test_data_path": csvs["test"],
        "result_json_data": "run/rl.json",
        "test_rows": None,
    }
    stage("evaluate", **data, **test, num_beams=20)

    # ---- what comes out
    predictions = json.loads(Path("run/rl.json").read_text())
    assert [row["user_id"] for row in predictions] == [user_of(i) for i in range(12)]
    shown = {title for row in predictions for title in row["predict_title"]}
    level_tokens = {"<a_1><b_2><c_3>"}  # left out of titles
    assert shown <= {title[:300] for title in titles} - level_tokens | {""} and len(shown) > 20
    ask = {"base_model": "run/rl", **data}
    for number in range(len(HOSTILE)):
        stage("recommend", **ask, history=str(number))
    lines = [json.dumps({"history": [title], "x": title}) for title in titles]
    with mock.patch.object(sys, "stdin", io.StringIO("\n".join(lines) + "\n")), contextlib.suppress(SystemExit):
        answers = stage("recommend", **ask, jsonl=True, history=None).splitlines()
    assert [json.loads(answer)["x"] for answer in answers] == titles
    assert "rl" in stage("report")
    assert not list(tmp_path.rglob(VICTIM))


def test_launchers_take_hostile_variables_as_words(tmp_path):
    """Names and paths with shell syntax reach the script as they are."""
    folder = tmp_path / f"a $(touch {VICTIM}) 'b' * [1]"
    folder.mkdir()
    write_hostile_data(folder)
    variables = {"DATASET_NAME": NAME, "DATA_DIR": folder, "OUTPUT_DIR": folder / "out"}
    run_stage("convert_dataset.sh", env=variables)
    assert {path.name for path in (folder / "out").rglob("*.csv")} == {f"{NAME}.csv"}
    done = run_stage("convert_dataset.sh", env=variables | {"DATA_DIR": f"{folder}/`touch {VICTIM}`"}, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such file" in done.stderr
    assert not list(tmp_path.rglob(VICTIM)) and not list(itertools.chain(Path().glob(VICTIM)))
