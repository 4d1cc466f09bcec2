"""The worked examples of docs/data.md run: one for each format, and one for embeddings of another kind."""

import gzip
import importlib
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, environment_of, run_stage

from minionerec.common.options import parse

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SOURCES = PAGE.split("\n## Sources\n")[1].split("\n## ")[0]
EMBEDDINGS = PAGE.split("\n## Your own embeddings\n")[1].split("\n## ")[0]
COMMANDS = [block.replace("\\\n", "") for block in re.findall(r"^```bash\n(python .*?)^```", SOURCES, re.M | re.S)]
RUNS = [block.replace("\\\n", "") for block in re.findall(r"^```bash\n(RAW=.*?)^```", SOURCES, re.M | re.S)]
ROWS = [(user, item, 4 + user % 2) for user in range(12) for item in random.Random(user).sample(range(300), 30)] + [
    (user, item, 5) for user in range(12) for item in range(8)
]


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """The files that the examples name, in raw/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "raw"
    for name in ("steam", "ml-32m"):
        (folder / name).mkdir(parents=True)
    times = [1_475_366_400 + 86_400 * row for row in range(len(ROWS))]
    reviews = [
        {"reviewerID": f"A{u}", "asin": f"B{i}", "overall": r, "unixReviewTime": time, "verified": True}
        for (u, i, r), time in zip(ROWS, times, strict=True)
    ]
    metas = [{"asin": f"B{item}", "title": f"Item {item}", "category": ["X"]} for item in range(300)]
    for name, records in (("Industrial_and_Scientific", reviews), ("meta_Industrial_and_Scientific", metas)):
        (folder / f"{name}.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    walks = [f"{user} {' '.join(str(item) for u, item, _ in ROWS if u == user)}" for user in range(12)]
    (folder / "Beauty.txt").write_text("\n".join([*walks, f"12 {' '.join(map(str, range(300)))}"]) + "\n")
    (folder / "Beauty.item.json").write_text(json.dumps({str(item): {"title": f"Item {item}"} for item in range(300)}))
    log = list(zip(ROWS, times, strict=True))
    inter = "".join(f"{u}\t{i}\t{time}\n" for (u, i, _), time in log)
    (folder / "steam" / "steam.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + inter)
    names = "".join(f"{item}\tGame {item}\n" for item in range(300))
    (folder / "steam" / "steam.item").write_text("item_id:token\tapp_name:token_seq\n" + names)
    ratings = "".join(f"{u},{i},{r},{time}\n" for (u, i, r), time in log)
    (folder / "ml-32m" / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ratings)
    films = "".join(f"{item},Film {item},Drama\n" for item in range(300))
    (folder / "ml-32m" / "movies.csv").write_text("movieId,title,genres\n" + films)
    days = "".join(f"{u},{i},{np.datetime64(time, 's').astype('datetime64[D]')}\n" for (u, i, _), time in log)
    (folder / "log.csv").write_text("customer,sku,day\n" + days)
    (folder / "catalog.csv").write_text("sku,label\n" + "".join(f"{item},Part {item}\n" for item in range(300)))
    return folder


def test_every_format_has_an_example():
    readers = [command.split()[2] for command in COMMANDS]
    assert readers == [f"preprocess.{name}" for name in ("amazon", "sequences", "recbole", "movielens", "table")]
    assert [re.match(r"RAW=(\w+)", run)[1] for run in RUNS] == [reader.split(".")[1] for reader in readers]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[2])
def test_examples(raw, command):
    _, _, name, *arguments = command.split()
    module = importlib.import_module(name)
    module.main(parse(module.Options, arguments))
    [stats] = raw.parent.glob("output/*/raw/*.stats.json")
    found = json.loads(stats.read_text())
    assert found["users"] >= 12 and min(found["split"]["samples"].values()) > 0 and not found["left_out"]
    items = json.loads(next(stats.parent.glob("*.item.json")).read_text())
    assert len(items) == found["items"] and re.fullmatch(r"(Item|Game|Film|Part) \d+", items["0"]["title"])


@pytest.mark.slow
def test_embeddings_of_another_kind(raw):
    """Vectors in another order than the items; then stages 2 and 3."""
    run_stage("preprocess.sequences", "--file", raw / "Beauty.txt", "--output_dir", raw.parent / "output/beauty/raw")
    names = [str(item) for item in random.Random(0).sample(range(300), 300)]
    (raw / "vectors.txt").write_text("\n".join(names) + "\n")
    vectors = np.random.default_rng(0).normal(size=(300, 5))
    np.save(raw / "vectors.npy", vectors)
    [snippet] = re.findall(r"^```python\n(.*?)^```", EMBEDDINGS, re.M | re.S)
    subprocess.run([sys.executable, "-c", snippet], check=True)
    folder = raw.parent / "output" / "beauty"
    made = np.load(folder / "raw" / "Beauty.emb-mine-td.npy")
    np.testing.assert_allclose(made[[int(name) for name in names]], vectors, rtol=1e-6)
    [block] = re.findall(r"^```bash\n(.*?)^```", EMBEDDINGS, re.M | re.S)
    script = "set -e\n" + block.replace("output/beauty", str(folder))
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment_of(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((folder / "data" / "test" / "Beauty.csv").read_text().splitlines()) == 14
