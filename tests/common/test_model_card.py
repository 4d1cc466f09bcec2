"""Model cards: metadata that the hub reads, facts of the run and its metrics; texts of the data cannot change the form.

A card never changes what a folder's digest, its record or a resume depend on, and never replaces a file of the user.
"""

import json
from dataclasses import dataclass

import pytest
from huggingface_hub import ModelCard

from minionerec.common import model_card, runs
from minionerec.common.options import INPUT, StageOptions, option

TEST = {
    "rows": 943, "num_beams": 50, "headline": "unseen", "test_data_path": "data/test/movies.csv",
    "item": {"HR@10": 0.1, "NDCG@10": 0.05}, "intervals": {"HR@10": [0.08, 0.12]},
    "unseen": {"item": {"HR@10": 0.2, "NDCG@10": 0.123456}, "intervals": {"NDCG@10": [0.11, 0.13]}},
}  # fmt: skip


@dataclass
class Options(StageOptions):
    data: str = option("", "a file", role=INPUT)
    category: str = option("", "a name")
    lr: float = option(1.0, "rate")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.csv").write_text("a\n1\n")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text("{}")
    return tmp_path / "sft"


def begin(folder, **options):
    options = Options(data=str(folder.parent / "train.csv"), **options)
    return runs.begin(options, "sft", folder=folder, writes=["config.json"])


def made(folder, base_model="", test=None, **options):
    (folder / "config.json").unlink()
    run = begin(folder, **options)
    (folder / "config.json").write_text("{}")
    model_card.write(run, base_model=base_model, test=test)
    run.finish()
    return run, (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_has_the_facts_of_the_run(folder):
    entries = [{"step": 5, "loss": 1.0}, {"step": 5, "eval_NDCG@10": 0.25, "eval_loss": 1.5}]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    run, text = made(folder, base_model="Qwen/Qwen2.5-0.5B", lr=0.5)
    card = ModelCard(text)
    assert card.data.base_model == "Qwen/Qwen2.5-0.5B" and card.data.library_name == "transformers"
    assert card.data.license == "unknown" and "semantic-ids" in card.data.tags
    for said in (
        run.record["inputs"]["data"], "| lr | `0.5` |", "--lr 0.5", run.record["code"], model_card.NO_TEST,
        "| 5 | 1.5000 | 0.2500 |",
    ):  # fmt: skip
        assert said in text
    assert str(folder.parent) not in text and "| data | `…/train.csv` |" in text  # no path of this machine
    assert "1.0000" not in text and "category" not in text.split("## Use")[1].split("## Made with")[0]


def test_a_card_takes_the_licence_of_a_base_model_in_a_folder(folder):
    base = folder.parent / "base"
    base.mkdir()
    (base / "README.md").write_text("---\ntags:\n- x\nlicense: apache-2.0\n---\n# Base\nlicense: mit\n")
    _, text = made(folder, base_model=str(base))
    assert ModelCard(text).data.license == "apache-2.0" and not ModelCard(text).data.base_model  # a path is no hub name


def test_test_metrics_are_put_in_and_replaced(folder):
    _, before = made(folder)
    for value in (0.123456, 0.3):
        TEST["unseen"]["item"]["NDCG@10"] = value
        model_card.add_test(folder, TEST)
        text = (folder / "README.md").read_text(encoding="utf-8")
        card = ModelCard(text)
        found = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert found == {"HR@10": 0.2, "NDCG@10": round(value, 4)}
        assert f"| NDCG@10 | 0.0500 | {value:.4f} [0.1100, 0.1300] |" in text and "943 test rows, 50 beams" in text
        assert model_card.NO_TEST not in text and text.count(model_card.TEST) == 1
        assert text.split(model_card.END)[1] == before.split(model_card.END)[1]


def test_metrics_that_a_card_has_can_be_kept(folder):
    made(folder)
    model_card.add_test(folder, TEST | {"rows": 1}, replace=False)
    model_card.add_test(folder, TEST | {"rows": 2}, replace=False)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert model_card.NO_TEST not in text and "\n1 test rows, 50 beams" in text


def test_a_baseline_has_its_metrics_from_the_start(folder):
    _, text = made(folder, test=TEST | {"valid": {"NDCG@10": 0.5}})
    assert ModelCard(text).data.eval_results and "| NDCG@10 | 0.5000 |" in text


@pytest.mark.parametrize(
    "value", ["a | b", "`x`\n## Licence", "---\nlicense: mit\n---", "<script>alert(1)</script>", "\x1b[2J"]
)
def test_values_cannot_change_the_form(folder, value):
    _, text = made(folder, category=value)
    assert ModelCard(text).data.license == "unknown" and "\x1b" not in text
    lines = text.split("\n")
    assert [line for line in lines if line.startswith("## ")].count("## Licence") == 1
    [row] = [line for line in lines if line.startswith("| category |")]
    assert row.replace("\\|", "").count("|") == 3
    assert not [line for line in lines if line.startswith("<script")]


def test_nothing_depends_on_a_card(folder, capsys):
    run, text = made(folder)
    with_card = runs.digest(folder)
    assert "README.md" not in run.record["outputs"] and begin(folder).complete
    (folder / "README.md").write_text(text + "edited")
    assert runs.digest(folder) == with_card and begin(folder).complete
    (folder / "README.md").unlink()
    assert runs.digest(folder) == with_card and begin(folder).complete
    capsys.readouterr()
    model_card.add_test(folder, TEST)  # no card: nothing to do
    assert capsys.readouterr().out == "" and not (folder / "README.md").exists()


def test_a_file_of_the_user_is_kept(folder, capsys):
    (folder / "README.md").write_text("mine")
    _, text = made(folder)
    assert text == "mine" and "is kept" in capsys.readouterr().out
    model_card.add_test(folder, TEST)
    assert (folder / "README.md").read_text() == "mine"


def test_a_card_moves_aside_with_its_result(folder):
    (folder / "log.jsonl").write_text("{}\n")
    _, first = made(folder)
    begin(folder, lr=0.5, overwrite=True)
    assert (folder.parent / "sft.1" / "README.md").read_text() == first
    assert (folder.parent / "sft.1" / "log.jsonl").exists() and not (folder / "README.md").exists()


def test_a_card_that_cannot_be_updated_is_a_note(folder, capsys, monkeypatch):
    made(folder)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_card, "_write", refuse)
    model_card.add_test(folder, TEST)
    assert "is not updated" in capsys.readouterr().out
