"""An output folder like that of run.sh, made up: ranks of random scores, logs and records, titles that are hostile."""

import json
import shutil

import numpy as np
import pytest
from helpers import N_ITEMS, write_world

TITLES = {
    0: "<script>alert(1)</script>",
    1: "\"><img src='http://evil.example/x.png' onerror=alert(1)>",
    2: "</style></svg><a href='http://evil.example'>free</a>",
    3: "{{ 7 * 7 }} ${7 * 7} $x^2$",
    4: "right \u202e to left",
}
LOGS = {
    "sft": [{"step": s, "loss": 3 / (s + 1), "learning_rate": 0.1} for s in range(5)]
    + [{"step": s, "eval_loss": 2 / (s + 1), "eval_HR@10": 0.1 * s, "eval_NDCG@10": 0.05 * s} for s in range(5)],
    "rl": [
        {"step": s, "loss": 0.1, "reward": -1.0, "rewards/rule/mean": 0.1 * s, "rewards/x<y/mean": 0.5, "kl": 0.01 * s}
        | {"kl_median": 0.001, "group/dead": 0.5, "group/prefix_1": 0.9, "group/prefix_2": 0.5, "eval_HR@1": 0.2}
        for s in range(4)
    ],
}


def write_model(folder, stem, data, seed, **more):
    """Metrics and ranks of random scores, as a stage leaves them at `<stem>metrics.json` and `<stem>ranks.npz`."""
    from minionerec.evaluation import protocols

    rng = np.random.default_rng(seed)
    ranks = protocols.by_scores(lambda histories: rng.random((len(histories), N_ITEMS)), data.test, data.catalog)
    content = protocols.report(ranks, data.test, data.train, data.catalog, 0) | more
    (folder / f"{stem}metrics.json").parent.mkdir(exist_ok=True)
    (folder / f"{stem}metrics.json").write_text(json.dumps(content))
    protocols.write_ranks(folder / f"{stem}ranks.npz", ranks, data.test, data.train, N_ITEMS)


def write_record(path, stage, started, **options):
    path.parent.mkdir(exist_ok=True)
    record = {"stage": stage, "complete": True, "started": started, "seconds": 10.0, "device": "a CPU", "commit": "abc"}
    record |= {"settings": {"seed": 42}, "inputs": {"train_file": "d1g35t"}, "versions": {"torch": "2.13.0"}}
    path.write_text(json.dumps(record | {"command": f"{stage}.py", "options": options}))


def write_output(folder, seed=0):
    """A folder of two baselines, SFT and RL on the small data set, whose catalog has `TITLES`."""
    from data import load

    world = write_world(folder / "data")
    lines = world.info.read_text().splitlines()
    for item, title in TITLES.items():
        sid, _, number = lines[item].split("\t")
        lines[item] = f"{sid}\t{title}\t{number}"
    world.info.write_text("\n".join(lines) + "\n")
    data = load(info_file=world.info, train=world.train, valid=world.valid, test=world.test, max_history=10**6)
    for number, stem in enumerate(("popularity/", "sasrec/", "sft.", "rl.")):
        write_model(folder, stem, data, 10 * seed + number, **({"num_beams": 20} if number > 1 else {}))
    files = {"train_file": str(world.train), "info_file": str(world.info), "test_data_path": str(world.test)}
    write_record(folder / "sft" / "run.json", "sft", 1, sid_index_path=str(world.index), eval_file=str(world.valid))
    write_record(folder / "sft.run.json", "evaluate", 2, **files)
    write_record(folder / "rl" / "run.json", "rl", 3, category="<b>")
    for name, log in LOGS.items():
        (folder / name / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (folder / "raw").mkdir()
    shutil.copy(world.index, folder / "raw" / "other.index.json")
    index = json.loads(world.index.read_text())
    index["7"] = index["6"]  # a third item with one SID
    (folder / "raw" / "other.index.json").write_text(json.dumps(index))
    np.save(folder / "raw" / "toy.emb-x-td.npy", np.random.default_rng(0).normal(size=(N_ITEMS, 8)).astype(np.float32))
    return folder


@pytest.fixture(scope="session")
def output(tmp_path_factory):
    return write_output(tmp_path_factory.mktemp("outputs") / "first")


@pytest.fixture(scope="session")
def page(output):
    """The report of `output`, as text."""
    import report

    report.main(report.Options(output_dir=[str(output)], sample_users=5))
    return (output / "report.html").read_text(encoding="utf-8")
