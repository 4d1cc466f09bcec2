"""Amazon releases in their real record layouts, through to SFT rows.

Invariants: 2014, 2018 and 2023 records of the same reviews give the same samples; the release is told by the fields, and
files of another one are refused; Python literals are parsed, never executed; a record that cannot be used is counted and
named, whatever is wrong with it.
"""

import gzip
import json
import random

import pytest
from helpers import run_stage

import convert_dataset
from data import Prompts, load, sft_pairs
from minionerec.common.errors import UserError
from preprocess import amazon
from preprocess.amazon import Options, main

DAY = 86_400
START = 1_475_280_000  # 2016-10-01


def log(users=12, items=8, seed=0) -> list[tuple[str, str, float, int]]:
    """(user, item, rating, seconds); each user and item at least five times."""
    rng = random.Random(seed)
    rows = [(f"A{user:02}", f"B{item:02}", float(rng.randint(1, 5))) for user in range(users) for item in range(items)]
    return [(*row, START + DAY * rng.randrange(700)) for row in rng.sample(rows, len(rows))]


def review(release: str, user: str, item: str, rating: float, time: int) -> dict:
    if release == "2023":
        return {
            "rating": rating, "title": "Good", "text": "It works.", "images": [], "asin": item, "parent_asin": item,
            "user_id": user, "timestamp": time * 1000, "helpful_vote": 0, "verified_purchase": True,
        }  # fmt: skip
    record = {
        "reviewerID": user, "asin": item, "reviewerName": "N \"q\" 漢", "reviewText": "It\tworks.", "overall": rating,
        "summary": "Good", "unixReviewTime": time, "reviewTime": "10 1, 2016",
    }  # fmt: skip
    return record if release == "2014" else record | {"verified": True, "vote": "2", "style": {"Size:": " 1"}}


def meta(release: str, item: str) -> dict:
    if release == "2014":
        return {"asin": item, "title": f"Lamp {item} &amp; 'bulb'", "description": "A <b>lamp</b>.", "brand": "Brand",
                "categories": [["Home", "Lamps"]], "price": 9.99, "salesRank": {"Home": 1}}  # fmt: skip
    if release == "2018":
        return {"asin": item, "title": f"Lamp {item} &amp; 'bulb'", "description": ["A <b>lamp</b>."], "brand": "Brand",
                "category": ["Home", "Lamps"], "feature": ["small"], "main_cat": "Home", "also_buy": []}  # fmt: skip
    return {"parent_asin": item, "title": f"Lamp {item} &amp; 'bulb'", "description": ["A <b>lamp</b>."], "store": "Brand",
            "categories": ["Home", "Lamps"], "features": [], "main_category": "Home", "details": {"asin": "x"}}  # fmt: skip


def lines_of(records, release="") -> str:
    return "".join((str(record) if release == "2014" else json.dumps(record)) + "\n" for record in records)


def write(folder, made="2018", reviews=None, metas=None, **changes):
    """Options for the files of a release, with other texts of them where they are given."""
    items = sorted({item for _, item, *_ in log()})
    reviews = lines_of(review(made, *row) for row in log()) if reviews is None else reviews
    metas = lines_of((meta(made, item) for item in items), made) if metas is None else metas
    folder.mkdir(exist_ok=True)
    (folder / "shop.json").write_text(reviews, encoding="utf-8")
    (folder / "meta.json").write_text(metas, encoding="utf-8")
    changes = {"meta": [str(folder / "meta.json")]} | changes
    return Options(reviews=[str(folder / "shop.json")], output_dir=str(folder / "out"), **changes)


def written(folder) -> dict[str, bytes]:
    names = [f"shop.{split}.inter" for split in ("train", "valid", "test")]
    return {name: (folder / "out" / name).read_bytes() for name in [*names, "shop.item.json", "shop.item2id"]}


def stats(folder) -> dict:
    return json.loads((folder / "out" / "shop.stats.json").read_text())


def test_every_release_to_sft_rows(tmp_path, capsys):
    for release in amazon.FIELDS:
        main(write(tmp_path / release, release))
        assert f"release {release}, told by the fields of " in capsys.readouterr().out
        assert stats(tmp_path / release)["source"]["format"] == f"Amazon Reviews {release}"
    assert written(tmp_path / "2014") == written(tmp_path / "2018") == written(tmp_path / "2023")
    out = tmp_path / "2023" / "out"
    (out / "shop.index.json").write_text(json.dumps({str(i): [f"<a_{i}>", "<b_0>"] for i in range(8)}))
    convert_dataset.main(convert_dataset.Options(dataset_name="shop", data_dir=str(out), output_dir=str(out)))
    data = load(info_file=out / "info" / "shop.txt", train=out / "train" / "shop.csv", test=out / "test" / "shop.csv")
    assert data.items.titles[0] == "Lamp B00 & 'bulb'" and len(data.test) == 12 and len(data.train) == 12 * 5
    pairs = sft_pairs({"sid_seq": 1, "title2sid": 1}, data.train, data.items, Prompts(category="lamps"), 0)
    assert len(pairs) == 12 * 5 + 8
    walks = {}
    for user, item, _, time in log():
        walks.setdefault(user, []).append((time, int(item[1:])))
    ordered = [[item for _, item in sorted(walk, key=lambda pair: pair[0])] for _, walk in sorted(walks.items())]
    assert sorted(data.test["target"]) == sorted(walk[-1] for walk in ordered)
    items = json.loads((out / "shop.item.json").read_text())
    assert items["0"] | {"title": ""} == {
        "title": "", "description": "A lamp .", "brand": "Brand", "categories": "Home, Lamps",
    }  # fmt: skip


def test_the_2023_csvs_and_gzip(tmp_path):
    """The parts of a published split, each row an interaction with its history, are one log."""
    main(write(tmp_path / "json", "2023"))
    rows = [f"{user},{item},{rating},{time * 1000}" for user, item, rating, time in log()]
    folder = tmp_path / "csv"
    options = write(folder, "2023")
    header = "user_id,parent_asin,rating,timestamp"
    (folder / "shop.train.csv").write_text("\n".join([f"{header},history", *(f"{row}," for row in rows[:70])]) + "\n")
    (folder / "shop.test.csv.gz").write_bytes(
        gzip.compress("\n".join([header, *rows[70:]]).encode())
    )  # fmt: skip
    options.reviews = [str(folder / "shop.train.csv"), str(folder / "shop.test.csv.gz")]
    main(options)
    assert written(folder) == written(tmp_path / "json")
    (folder / "shop.json.gz").write_bytes(gzip.compress((folder / "shop.json").read_bytes()))
    options.reviews = [str(folder / "shop.json.gz")]
    options.output_dir = str(folder / "out2")
    main(options)
    assert (folder / "out2" / "shop.test.inter").read_bytes() == written(folder)["shop.test.inter"]


def test_blocks_of_any_size(tmp_path, monkeypatch):
    main(write(tmp_path / "one"))
    monkeypatch.setattr(amazon, "BLOCK", 300)
    main(write(tmp_path / "many"))
    assert written(tmp_path / "one") == written(tmp_path / "many")


def test_filters(tmp_path):
    """The published choice for Industrial and Office, and a minimum rating."""
    main(write(tmp_path, k_core=3, from_time="2016-12", to_time="2018-06", min_rating=2, split="chronological"))
    end = 1_527_811_200  # 2018-06-01
    kept = [row for row in log() if START + DAY * 61 <= row[3] < end and row[2] >= 2]
    steps = stats(tmp_path)["steps"]
    assert [step["step"] for step in steps] == ["read", "from 2016-12", "before 2018-06", "rating at least 2", "3-core"]
    assert steps[3]["interactions"] == len(kept) and steps[3]["dropped"] > 0
    assert stats(tmp_path)["time"]["first"] >= "2016-12-01" and stats(tmp_path)["time"]["last"] < "2018-06-01"


def test_items_without_a_usable_title(tmp_path):
    metas = [meta("2018", f"B{item:02}") for item in range(7)]
    metas[2]["title"] = "<span id='x'>var aPageStart = 1</span>"
    del metas[3]["title"]
    main(write(tmp_path, metas=lines_of(metas)))
    step = stats(tmp_path)["steps"][1]
    assert step["step"] == "with a title" and step["items"] == 5 and step["dropped"] == 36
    main(write(tmp_path, metas=lines_of(metas), untitled="keep", overwrite=True))
    assert json.loads((tmp_path / "out" / "shop.item.json").read_text())["2"]["title"] == "B02"


def test_other_scripts_tabs_and_newlines(tmp_path):
    metas = [meta("2018", f"B{item:02}") for item in range(8)]
    for item, title in zip(
        metas, ("Лампа\tА", "灯\n泡", "مصباح", "\x1b[31mred\u2028x", "&lt;b&gt;", "é", "🙂", "a  b"), strict=False
    ):
        item["title"] = title
    main(write(tmp_path, metas=lines_of(metas), untitled="keep"))
    titles = [item["title"] for item in json.loads((tmp_path / "out" / "shop.item.json").read_text()).values()]
    assert titles == ["Лампа А", "灯 泡", "مصباح", "[31mred x", "B04", "é", "🙂", "a b"]


# ------------------------------------------------------------------------------------------------ what is wrong

GOOD = [review("2018", *row) for row in log()]
ONE = {key: value for key, value in GOOD[0].items() if key != "asin"}
BROKEN = {
    "half a line": (json.dumps(GOOD[0])[:50], "a broken line", "expected a JSON object"),
    "a list": ("[1, 2]", "no valid user", "field reviewerID: found ''"),
    "deep": ("[" * 100_000, "a broken line", "found '[[["),
    "bytes": ('{"a": \ufffd', "a broken line", "expected a JSON object"),
    "no item": (json.dumps(ONE), "no valid item", "field asin: found '', expected an id"),
    "an empty user": (json.dumps(GOOD[0] | {"reviewerID": ""}), "no valid user", "field reviewerID: found ''"),
    "no time": (json.dumps(GOOD[0] | {"unixReviewTime": None}), "no valid time", "field unixReviewTime: found ''"),
    "a time before Amazon": (json.dumps(GOOD[0] | {"unixReviewTime": -5}), "no valid time", "found '-5'"),
    "milliseconds": (json.dumps(GOOD[0] | {"unixReviewTime": START * 1000}), "no valid time", "expected a time stamp in s"),
    "words": (json.dumps(GOOD[0] | {"unixReviewTime": "noon"}), "no valid time", "found 'noon'"),
    "no rating": (json.dumps(GOOD[0] | {"overall": "x"}), "no valid rating", "field overall: found 'x', expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records(tmp_path, case):
    """Refused above the limit, else counted with the line of the first one."""
    line, reason, found = BROKEN[case]
    text = lines_of(GOOD[:10]) + "\n" + line + "\n" + lines_of(GOOD[10:]) + line + "\n"
    with pytest.raises(UserError, match="2 of 98 records cannot be used") as refused:
        main(write(tmp_path, reviews=text))
    assert found in str(refused.value) and "shop.json, line 12" in str(refused.value) and "\n" not in str(refused.value)
    main(write(tmp_path, reviews=text, max_bad=0.05))
    [fault] = stats(tmp_path)["left_out"]
    assert (fault["reason"], fault["records"]) == (reason, 2) and "line 12" in fault["first"]
    assert stats(tmp_path)["interactions"] == 96


def test_broken_metadata(tmp_path):
    items = [meta("2014", f"B{item:02}") for item in range(8)]
    lines = lines_of(items, "2014").splitlines()
    hostile = f"{{'asin': 'B00', 'title': __import__('os').system('touch {tmp_path}/executed')}}"
    lines = [hostile, lines[0], lines[0], "{'title': 'no id'}", "(" * 5000, *lines[1:]]
    main(write(tmp_path, "2014", metas="\n".join(lines), max_bad=0.1))
    found = {fault["reason"]: (fault["records"], fault["first"]) for fault in stats(tmp_path)["left_out"]}
    assert {reason: count for reason, (count, _) in found.items()} == {
        "broken metadata": 3, "metadata of an item that came before": 1,
    }  # fmt: skip
    assert "meta.json, line 1" in found["broken metadata"][1] and not (tmp_path / "executed").exists()
    assert stats(tmp_path)["items"] == 8


@pytest.mark.parametrize(
    "release, changes, found",
    [
        ("2018", {"release": "2014"}, "shop.json: found release 2018, expected 2014 as in --release; check --reviews"),
        ("2018", {"metas": lines_of([meta("2023", "B00")])}, "meta.json: found release 2023, expected 2018 as in"),
        ("2014", {"metas": lines_of([meta("2018", "B00")])}, "meta.json: found release 2018, expected 2014 as in"),
        ("2018", {"reviews": '{"a": 1}\n'}, "found the fields ['a'], expected reviews of a release, with asin and reviewerID"),
        ("2018", {"reviews": ""}, "shop.json: the file is empty"),
        ("2018", {"metas": "x\n"}, "meta.json: found the fields [], expected metadata of a release, with asin or parent_asin"),
        ("2018", {"from_time": "2016-13"}, "--from_time 2016-13: expected a date like 2016, 2016-10"),
        ("2018", {"from_time": "2030"}, "from 2030: no interaction is left"),
        ("2018", {"k_core": 100}, "100-core: no interaction is left"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path, release, changes, found):
    with pytest.raises(UserError) as refused:
        main(write(tmp_path, release, **changes))
    assert found in str(refused.value) and not list((tmp_path / "out").glob("*.inter"))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-6] + b"\0" + data[-5:]])
def test_a_broken_gzip_file(tmp_path, damage):
    """Cut off in the middle; another checksum."""
    options = write(tmp_path)
    data = (tmp_path / "shop.json").read_bytes() * 50
    (tmp_path / "shop.json").write_bytes(damage(gzip.compress(data)))
    with pytest.raises(UserError, match="shop.json: found a broken gzip file"):
        main(options)


def test_the_command(tmp_path):
    write(tmp_path)
    arguments = [
        "--reviews",
        tmp_path / "shop.json",
        "--output_dir",
        tmp_path / "out",
        "--from",
        "2016-10",
        "--to",
        "2018-11",
    ]
    done = run_stage("preprocess.amazon", *arguments)
    assert "5-core" not in done.stderr and "before 2018-11: 12 users, 8 items" in done.stdout
    variables = {"REVIEWS": tmp_path / "no.json", "OUTPUT_DIR": tmp_path, "MINIONEREC_VARIABLES": 1}
    done = run_stage("preprocess.amazon", env=variables, check=False)
    assert done.returncode == 2 and done.stderr.endswith("no.json: no such file or folder; check --reviews\n")
