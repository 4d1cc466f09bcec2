import ast
import json
import random
import re

import numpy as np
import polars as pl
import pytest
from helpers import INDUSTRIAL, N_ITEMS, ROOT

from data import (
    DEFAULT_TASKS,
    SFT_TASKS,
    Prompts,
    next_sid_prompts,
    parse_tasks,
    read_sequences,
    readable,
    rl_rows,
    sft_pairs,
    template_of,
)
from minionerec.catalog.catalog import target_counts
from minionerec.catalog.items import Items, read_info, read_titles
from minionerec.common.errors import UserError

ITEMS = Items(["<a_0><b_1>", "<a_1><b_0>", "<a_2><b_2>", "<a_0><b_3>"], ["One", "Two; or so", "Same", "Same"])
ROWS = pl.DataFrame({"user": ["u", "v", "w"], "history": [[0, 1], [2], [0, 1]], "target": [2, 3, 3]})
HEADER = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"


def test_conversion_round_trip(world):
    """What convert_dataset writes is what read_sequences reads, quotes and commas in titles included."""
    items = read_info(world.info)
    assert items.titles == read_titles(world.items) and len(items.sids) == N_ITEMS
    for split in ("train", "valid", "test"):
        written = (world.folder / f"toy.{split}.inter").read_text().splitlines()[1:]
        rows = read_sequences(getattr(world, split), items.sids, "file")
        assert len(rows) == len(written)
        for line, (user, history, target) in zip(written, rows.iter_rows(), strict=True):
            assert line == f"{user}\t{' '.join(map(str, history))}\t{target}"
    table = pl.read_csv(world.train)
    row = table.row(0, named=True)
    ids = ast.literal_eval(row["history_item_id"])
    assert ast.literal_eval(row["history_item_title"]) == [items.titles[i] for i in ids]
    assert ast.literal_eval(row["history_item_sid"]) == [items.sids[i] for i in ids]


def test_history_is_cut_to_the_latest(world):
    items = read_info(world.info)
    long = read_sequences(world.train, items.sids, "file")
    short = read_sequences(world.train, items.sids, "file", max_history=2)
    assert short["history"].to_list() == [history[-2:] for history in long["history"].to_list()]
    assert short["seen"].to_list() == long["seen"].to_list() == long["history"].to_list()  # never cut


def csv(tmp_path, body, header=HEADER):
    path = tmp_path / "rows.csv"
    path.write_text(header + body)
    return path


GOOD = "u,['One'],Two,[0],1,['<a_0><b_1>'],<a_1><b_0>\n"


@pytest.mark.parametrize(
    "body, header, found",
    [
        (GOOD, HEADER.replace("item_sid\n", "sid\n").replace("history_item_sid", "x"), "no column 'history_item_sid'"),
        ("", HEADER, "found no rows"),
        (
            GOOD + "u,['One'],Two,nonsense,1,['<a_0><b_1>'],<a_1><b_0>\n",
            HEADER,
            "row 3, column history_item_id: found 'nonsense'",
        ),
        (GOOD + "u,['One'],Two,\"[0, 'x']\",1,['<a_0><b_1>'],<a_1><b_0>\n", HEADER, "row 3, column history_item_id"),
        ("u,['One'],Two,[0],9,['<a_0><b_1>'],<a_1><b_0>\n", HEADER, "row 2, column item_id: found '9'"),
        ("u,['One'],Two,[7],1,['<a_0><b_1>'],<a_1><b_0>\n", HEADER, "row 2, column history_item_id: found '\\[7\\]'"),
        ("u,['One'],Two,[0],1,['<a_0><b_1>'],<a_9><b_9>\n", HEADER, "row 2, column item_sid: found '<a_9><b_9>'"),
        ("u,['One'],Two,[0],1,['<a_9><b_1>'],<a_1><b_0>\n", HEADER, "row 2, column history_item_sid"),
        ("u,['One'],Two,\"[0, 0]\",1,['<a_0><b_1>'],<a_1><b_0>\n", HEADER, "row 2, column history_item_sid"),
    ],
)
def test_bad_csv(tmp_path, body, header, found):
    with pytest.raises(UserError, match=found):
        read_sequences(csv(tmp_path, body, header), ITEMS.sids, "train_file")


def test_missing_file_names_the_flag(tmp_path):
    with pytest.raises(UserError, match="no such file.*--train_file"):
        read_sequences(tmp_path / "none.csv", ITEMS.sids, "train_file")


def test_cells_are_never_executed(tmp_path):
    victim = tmp_path / "executed"
    cell = f"\"[__import__('pathlib').Path('{victim}').touch()]\""
    with pytest.raises(UserError, match="expected a list literal"):
        read_sequences(csv(tmp_path, f"u,x,Two,{cell},1,x,<a_1><b_0>\n"), ITEMS.sids, "train_file")
    assert not victim.exists()


def test_unusual_literals_still_read(tmp_path):
    path = csv(
        tmp_path, "u,x,Two,\"('0', 1)\",1,\"['<a_0><b_1>', '<a_1><b_0>']\",<a_1><b_0>\nu,x,Two,[],1,[],<a_1><b_0>\n"
    )
    assert read_sequences(path, ITEMS.sids, "train_file")["history"].to_list() == [[0, 1], []]


@pytest.mark.parametrize(
    "content, found",
    [
        ("<a_0>\tOne\n", "line 1"),
        ("<a_0>\tOne\t0\n<a_1>\tTwo\t2\n", "expected each of 0..n-1"),
        ("x\tOne\t0\n", "line 1"),
    ],
)
def test_bad_info(tmp_path, content, found):
    path = tmp_path / "info.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=found):
        read_info(path)


def test_info_titles_may_hold_anything_but_the_first_and_last_tab(tmp_path):
    path = tmp_path / "info.txt"
    path.write_text("<a_0>\tA\ttab and \u2028 a separator\t0\n", encoding="utf-8")
    assert read_info(path).titles == ["A\ttab and \u2028 a separator"]


# ------------------------------------------------------------------------------------------------ prompts


def random_world(seed):
    """Items and rows where no item repeats in a row and no title is a part of another or of the wording."""
    rng = random.Random(seed)
    items = Items([f"<a_{i}><b_{i % 3}><c_{i // 3}>" for i in range(30)], [f"xq{i:02d}xq" for i in range(30)])
    walks = [rng.sample(range(30), 5) for _ in range(50)]
    return items, pl.DataFrame(
        {
            "user": ["u"] * 50,
            "history": [w[:-1] for w in walks],
            "target": [w[-1] for w in walks],
            "preference": [f"likes things like {i}" for i in range(50)],
        }
    )


@pytest.mark.parametrize("task", SFT_TASKS)
def test_a_prompt_never_contains_its_answer(task):
    items, rows = random_world(0)
    pairs = list(SFT_TASKS[task](rows, items, Prompts(category="Video_Games")))
    assert len(pairs) in (30, 50)
    for prompt, answer in pairs:
        assert answer and answer not in prompt


def test_one_wording_for_sft_rl_and_evaluation():
    items, rows = random_world(1)
    prompts = Prompts(category="Video_Games")
    asked = next_sid_prompts(rows, items, prompts)
    assert [prompt for prompt, _ in SFT_TASKS["sid_seq"](rows, items, prompts)] == asked
    assert rl_rows(rows, items, prompts)["prompt"] == asked
    assert all(prompts.tasks["sid_seq"]["instruction"].format(category="video games") in prompt for prompt in asked)


def test_equal_prompts_keep_their_own_targets():
    """Two users with one history and different targets; two items with one title (design section 13, 2 and 9)."""
    columns = rl_rows(ROWS, ITEMS, Prompts())
    assert columns["prompt"][0] == columns["prompt"][2]
    assert columns["target_sid"] == ["<a_2><b_2>", "<a_0><b_3>", "<a_0><b_3>"] and columns["target_item"] == [2, 3, 3]
    title2sid = list(SFT_TASKS["title2sid"](ROWS, ITEMS, Prompts()))
    assert [answer for _, answer in title2sid] == ITEMS.sids
    assert title2sid[2][0] == title2sid[3][0]


def test_categories():
    assert readable("Video_Games") == "video games"
    assert Prompts(category="Video_Games").category == "video games"
    assert Prompts(category="Office_Products").category == "office products"
    assert Prompts(category="Industrial_and_Scientific").category == "industrial and scientific items"
    assert Prompts().category == "items"


def test_template_of_a_checkpoint(tmp_path):
    assert template_of(tmp_path).name == "prompt.yaml" and template_of(tmp_path).parent.name == "config"
    (tmp_path / "prompt.yaml").write_text("own")
    assert template_of(tmp_path) == tmp_path / "prompt.yaml"
    with pytest.raises(UserError, match="not a prompt template"):
        Prompts(tmp_path / "prompt.yaml")


def test_task_weights():
    assert parse_tasks("sid_seq, title2sid:0.5") == {"sid_seq": 1.0, "title2sid": 0.5}
    assert list(parse_tasks(DEFAULT_TASKS)) == ["sid_seq", "title2sid", "sid2title", "sid_seq2title", "title_seq2title"]
    items, rows = random_world(2)
    pairs = sft_pairs({"sid_seq": 2.5, "title2sid": 0.1}, rows, items, Prompts(), seed=0)
    assert len(pairs) == 125 + 3 and pairs == sft_pairs({"sid_seq": 2.5, "title2sid": 0.1}, rows, items, Prompts(), 0)
    for bad in ("nonsense", "sid_seq:x", "sid_seq:-1", "", "sid_seq:0"):
        with pytest.raises(UserError, match="--sft_tasks"):
            parse_tasks(bad)


def test_popularity_counts():
    assert target_counts(ROWS, 4) == [0, 0, 1, 2]


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="the industrial data is not beside the project")
def test_published_files_read():
    name = "Industrial_and_Scientific"
    info = read_info(INDUSTRIAL / "info" / f"{name}_5_2016-10-2018-11.txt")
    rows = {
        s: read_sequences(INDUSTRIAL / s / f"{name}_5_2016-10-2018-11.csv", info.sids, s)
        for s in ("train", "valid", "test")
    }
    assert {split: len(r) for split, r in rows.items()} == {"train": 10393, "valid": 4532, "test": 4533}
    test = rl_rows(rows["test"], info, Prompts(category=name))
    by_prompt = {}
    for prompt, target in zip(test["prompt"], test["target_item"], strict=True):
        by_prompt.setdefault(prompt, set()).add(target)
    shared = sum(len(by_prompt[prompt]) > 1 for prompt in test["prompt"])
    assert shared >= 137  # a dictionary from prompt text to target would be wrong for these rows


def test_movielens(tmp_path):
    """Preprocessing by hand: order by time, ties in file order, leave-one-out, unrated items left out."""
    from preprocess import movielens

    ratings = [(1, 10, 5), (1, 30, 1), (2, 10, 1), (1, 20, 5), (2, 20, 2), (2, 30, 3), (1, 40, 9), (3, 10, 1)]
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"{user}\t{item}\t5\t{time}" for user, item, time in ratings]
    (tmp_path / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    films = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    films += "".join(f"{i}\tFilm {i}\t199{i // 10}\tDrama War\n" for i in (10, 20, 30, 40, 50))
    (tmp_path / "ml-100k.item").write_text(films)
    movielens.main(movielens.Options(output_dir=str(tmp_path / "out"), input_dir=str(tmp_path), max_history=2))
    inter = {
        split: sorted((tmp_path / "out" / f"ml-100k.{split}.inter").read_text().splitlines()[1:])
        for split in ("train", "valid", "test")
    }
    # user 1: 30, 10, 20, 40 by time; user 2: 10, 20, 30; user 3 has one rating; ids are 0..3 for films 10..40
    assert inter == {"train": ["1\t2\t0"], "valid": ["1\t2 0\t1", "2\t0\t1"], "test": ["1\t0 1\t3", "2\t0 1\t2"]}
    items = json.loads((tmp_path / "out" / "ml-100k.item.json").read_text())
    assert len(items) == 4 and items["0"]["title"] == "Film 10 (1991)" and items["0"]["categories"] == "Drama, War"


def test_no_module_evaluates_or_unpickles():
    """Design section 13, 14; what it finds would be a way to execute a data file."""
    unsafe = re.compile(r"(?<![\w.])eval\(|import pickle|allow_pickle=True|weights_only=False|trust_remote_code=True")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("rq/**/*.py"), *ROOT.glob("preprocess/*.py")]:
        assert not unsafe.search(path.read_text()), path


def test_a_pickled_array_is_refused(tmp_path):
    from minionerec.common.embeddings import load_embeddings

    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a .npy array"):
        load_embeddings(tmp_path / "x.npy")
