"""report.py: the table and results.json come from what the stages left in a folder, whichever stages ran.

The headline protocol is first; a difference is paired on the same test rows; older results that were moved aside and
unfinished runs are not read.
"""

import json

import numpy as np
import pytest
from helpers import run_stage

import report
from minionerec.common.errors import UserError
from minionerec.evaluation.metrics import MISSED, bootstrap, table
from minionerec.report.results import _difference


def write_model(folder, name, ranks, unseen=None, headline="all", cutoffs=(1, 5, 10, 20)):
    """A model's metrics and ranks as its stage leaves them: in its folder, or for sft and rl next to it."""

    def values(ranks):
        return {"item": table(ranks, cutoffs), "intervals": bootstrap(ranks, 0, cutoffs)}

    arrays, content = {"all_item": ranks}, values(ranks) | {"headline": headline}
    if unseen is not None:
        arrays["unseen_item"], content["unseen"] = unseen, values(unseen)
    stem = f"{name}." if name in ("sft", "rl") else f"{name}/"
    (folder / f"{stem}metrics.json").parent.mkdir(exist_ok=True)
    (folder / f"{stem}metrics.json").write_text(json.dumps(content))
    np.savez(folder / f"{stem}ranks.npz", **arrays)


def write_record(path, stage, started, complete=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"stage": stage, "complete": complete, "started": started, "seconds": 10.0 * started}))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    draws = {name: rng.integers(0, 40, 400) for name in ("markov", "sasrec", "sft", "blend")}
    for name, ranks in draws.items():
        write_model(tmp_path, name, ranks, np.maximum(ranks - 3, 0), headline="unseen" if name == "sft" else "all")
    return tmp_path


def test_the_results_are_those_of_the_metrics(folder):
    results = report.results_of(folder, seed=0)
    assert [name for name in results if name not in report.NOT_MODELS] == ["markov", "sasrec", "sft", "blend"]
    metrics = {
        name: json.loads((folder / f"{name}/metrics.json").read_text()) for name in ("markov", "sasrec", "blend")
    }
    for name, content in metrics.items():
        names = {f"{metric}@{k}" for metric in ("HR", "NDCG") for k in (5, 10, 20)}
        assert results[name] == {key: content["item"][key] for key in names}
        assert results["unseen"][name] == {key: content["unseen"]["item"][key] for key in names}
        assert results["intervals"][name]["NDCG@10"] == content["unseen"]["intervals"]["NDCG@10"]
    assert results["headline"] == "unseen"
    assert results["baseline"] == max(("markov", "sasrec"), key=lambda name: results["unseen"][name]["NDCG@10"])


def test_differences_are_paired(tmp_path):
    ranks = np.array([0, 3, 30, MISSED] * 100)
    better = np.where(ranks == 30, 9, ranks)  # one row in four gains a place in the first ten
    worse = np.where(ranks == 3, 30, ranks)
    models = {"markov": ranks, "sft": better, "rl": ranks, "worse": worse, "caser": ranks[:100]}
    for name, values in models.items():
        write_model(tmp_path, name, values)
    results = report.results_of(tmp_path, seed=0)
    mean, low, high = results["differences"]["sft"]["HR@10"]
    assert mean == 0.25 and 0.2 < low < mean < high < 0.3
    assert results["differences"]["rl"]["NDCG@10"] == [0, 0, 0]
    assert "caser" not in results["differences"] and results["baseline"] == "markov"  # other rows
    lines = report.tables_of(results).split("\n")
    assert next(line for line in lines if line.startswith("rl")).endswith("~+0.0000 (+0.0000 to +0.0000)")
    for name in ("sft", "worse"):
        assert "~" not in next(line for line in lines if line.startswith(name))
    mean, low, high = results["rl_minus_sft"]["HR@10"]
    assert mean == -0.25 and -0.3 < low < mean < high < -0.2
    changed = {name for name, (mean, _, _) in results["rl_minus_sft"].items() if mean}
    assert changed == {"HR@10", "HR@20", "NDCG@10", "NDCG@20"}
    [line] = [line for line in lines if line.startswith("rl minus sft")]
    beyond, within = line.split("; within the interval: ")
    assert f"HR@10 -0.2500 ({low:+.4f} to {high:+.4f})" in beyond and within == "HR@1, NDCG@1, HR@5, NDCG@5"


def test_an_interval_that_contains_or_touches_0_is_no_difference():
    differences = {
        "HR@1": [0.0, 0.0, 0.0], "HR@5": [0.1, 0.0, 0.2], "HR@10": [-0.1, -0.2, 0.0], "HR@20": [0.1, -0.1, 0.3],
        "NDCG@5": [-0.2, -0.3, -0.1], "NDCG@10": [0.2, 0.1, 0.3],
    }  # fmt: skip
    beyond = "NDCG@5 -0.2000 (-0.3000 to -0.1000), NDCG@10 +0.2000 (+0.1000 to +0.3000)"
    assert report.in_words(differences) == f"{beyond}; within the interval: HR@1, HR@5, HR@10, HR@20"
    for name, values in differences.items():
        results = {"baseline": "markov", "intervals": {"sft": {}}, "differences": {"sft": {"NDCG@10": values}}}
        assert ("~" in report.cells(results, ["sft"])[1]) == ("~" in _difference(*values)) == (name not in beyond)


def test_what_is_missing_is_left_out(tmp_path):
    """Few beams, a model without the second protocol, no ranks: as after NUM_BEAMS=10 bash run.sh."""
    ranks = np.arange(40)
    write_model(tmp_path, "markov", ranks, ranks)
    write_model(tmp_path, "sft", ranks, cutoffs=(1, 5, 10))
    (tmp_path / "markov" / "ranks.npz").unlink()
    results = report.results_of(tmp_path, seed=0)
    assert set(results["sft"]) == {"HR@5", "HR@10", "NDCG@5", "NDCG@10"} and results["headline"] == "all"
    assert results["differences"] == {} and set(results["unseen"]) == {"markov"}
    text = report.tables_of(results)
    assert text.startswith("all items") and "HR@20" not in text.split("\n\n")[0]
    with pytest.raises(UserError, match="found no metrics of a model"):
        report.results_of(tmp_path / "markov", seed=0)


def test_seconds_come_from_the_records(tmp_path):
    files = [
        ("data/x.run.json", "preprocess"), ("data/x.emb.run.json", "text2emb"), ("rqvae/run.json", "rqvae"),
        ("markov/run.json", "baseline"), ("sasrec/run.json", "baseline"), ("sft/run.json", "sft"),
        ("sft.run.json", "evaluate"), ("rl/run.json", "rl"), ("rl.run.json", "evaluate"),
    ]  # fmt: skip
    for started, (name, stage) in enumerate(reversed(files)):
        write_record(tmp_path / name, stage, started)
    write_record(tmp_path / "gru4rec" / "run.json", "baseline", 50, complete=False)
    write_record(tmp_path / "rqvae.1" / "run.json", "rqvae", 60)
    write_record(tmp_path / "sft.run.json.1", "evaluate", 70)
    found = report.read_seconds(tmp_path)
    names = ["preprocess", "text2emb", "rqvae", "markov", "sasrec", "sft", "sft_evaluate", "rl", "rl_evaluate"]
    assert list(found) == names[::-1]  # in the order in which they began
    assert list(found.values()) == [10.0 * started for started in range(9)]


def test_from_the_command_line(folder):
    done = run_stage("report.py", "--output_dir", folder)
    results = json.loads((folder / "results.json").read_text())
    assert done.stdout.index("unseen items") < done.stdout.index("all items")
    for name in ("markov", "sasrec", "sft", "blend"):
        assert (
            f"{results[name]['HR@10']:.4f}" in done.stdout and f"{results['unseen'][name]['HR@10']:.4f}" in done.stdout
        )
    refused = run_stage("report.py", "--output_dir", "nowhere", check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: nowhere: no such file")
    assert len(refused.stderr.splitlines()) == 1
    assert "Traceback" in run_stage("report.py", "--output_dir", "nowhere", "--debug", check=False).stderr


def test_own_files_are_written_again_and_others_move_aside_on_request(folder, capsys):
    page = folder / "report.html"
    for _ in range(2):
        report.main(report.Options(output_dir=[str(folder)]))
    (folder / "results.json").write_text('{"mine": 1}')
    page.write_text("<html>mine</html>")
    before = page.read_text()
    with pytest.raises(UserError, match=r"report\.html: holds another result"):
        report.main(report.Options(output_dir=[str(folder)]))
    assert page.read_text() == before and capsys.readouterr().out.count("full catalog") == 2  # not a third time
    report.main(report.Options(output_dir=[str(folder)], overwrite=True))
    assert (folder / "results.json.1").read_text() == '{"mine": 1}'
    assert (folder / "report.html.1").read_text() == before and report.is_page(page)


def test_a_name_with_a_number_is_an_older_result_only_beside_its_name(folder):
    ranks = np.arange(400) % 40
    for name in ("sasrec_lr0.001", "sasrec_lr0.5", "sasrec.1", "sasrec.2024", "markov.7", "caser.1"):
        write_model(folder, name, ranks)
    records = {"markov.7": {"output_dir": "x/markov.7"}, "caser.1": {"output_dir": "x/caser"}}
    for name, options in records.items():
        (folder / name / "run.json").write_text(json.dumps({"options": options}))
    names = {"markov", "sasrec", "sft", "blend", "sasrec_lr0.001", "sasrec_lr0.5", "sasrec.2024", "markov.7"}
    assert set(report.read_metrics(folder)) == names
