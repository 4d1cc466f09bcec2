import io
import json
import re

import pytest
from helpers import N_ITEMS, run_stage

import recommend
from minionerec.catalog.items import Items
from minionerec.common.errors import UserError

TITLES = recommend.Titles(
    Items(["<a_0>"] * 5, ["Alien", "Aliens", "Alien Nation", "Blade Runner", "Star Wars, Part 4"]), [1, 9, 1, 0, 0]
)


def options(world, checkpoint_folder, **more):
    return recommend.Options(base_model=str(checkpoint_folder), info_file=str(world.info), **more)


@pytest.mark.parametrize(
    "text, items",
    [
        ("3, 0", [3, 0]),
        ("3;0 ; 1", [3, 0, 1]),
        ("alien; BLADE", [0, 3]),  # the title itself stands before a more popular match
        ("nat alien", [2]),
        ("alien; 4; star wars", [0, 4, 4]),
        ("alie", [1]),  # of several the most popular
        ("star wars, part", [4]),  # a comma in words separates nothing
    ],
)
def test_histories_by_ids_or_words(text, items):
    assert recommend.parse_history(text, TITLES) == items


@pytest.mark.parametrize(
    "text, found", [("77", "no item 77, expected ids 0..4"), ("blade runer", "is it Blade Runner"), (" ; ", "empty")]
)
def test_histories_that_name_nothing(text, found):
    with pytest.raises(UserError, match=re.escape(found)):
        recommend.parse_history(text, TITLES)


def test_filters_and_order(world, checkpoint_folder, policy):
    plain = recommend.Recommender(options(world, checkpoint_folder, K=100))([[3, 5], [7]])
    for found in plain:
        assert sorted(item["item_id"] for item in found) == list(range(N_ITEMS))
        scores = [item["score"] for item in found]
        assert scores == sorted(scores, reverse=True)
    unseen = recommend.Recommender(options(world, checkpoint_folder, K=100, exclude_seen=True))([[3, 5], [7]])
    for found, history in zip(unseen, ([3, 5], [7]), strict=True):
        assert sorted(item["item_id"] for item in found) == [i for i in range(N_ITEMS) if i not in history]
    few = recommend.Recommender(options(world, checkpoint_folder, only_items="4,6,9"))([[3, 5]])[0]
    assert sorted(item["item_id"] for item in few) == [4, 6, 9]  # 6 shares its SID with 5
    words = recommend.Recommender(options(world, checkpoint_folder, title_words="NUMBER 1"))([[3]])[0]
    assert all("number 1" in item["title"] for item in words)
    assert {item["item_id"] for item in words} <= {1, *range(10, 20)} and len(words) == 10
    both = options(world, checkpoint_folder, only_items="4", title_words="number 1")
    with pytest.raises(UserError, match="no item is left"):
        recommend.Recommender(both)


def test_the_prompt_takes_the_last_items(world, checkpoint_folder):
    short = recommend.Recommender(options(world, checkpoint_folder, max_history=2))
    assert short([[9, 9, 3, 5]]) == short([[3, 5]]) != short([[9, 9]])


def test_jsonl_answers_each_line_in_order(world, checkpoint_folder, monkeypatch, capsys):
    users = [{"user": n, "history": [n, f"number {n + 20}"]} for n in range(5)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, users)) + "\n\n"))
    settings = options(world, checkpoint_folder, K=3, batch_size=2)
    recommend.main(recommend.Options(**(settings.__dict__ | {"jsonl": True})))
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    alone = recommend.Recommender(settings)
    for user, answered in zip(users, answers, strict=True):
        assert {k: answered[k] for k in user} == user
        expected = alone([[user["user"], user["user"] + 20]])[0]
        assert [item["item_id"] for item in answered["predict"]] == [item["item_id"] for item in expected]


@pytest.mark.parametrize(
    "line", ['{"history": "49"}', '{"history": []}', "[1]", "{", '{"history": [900]}', '{"history": [true]}']
)
def test_bad_lines_are_named(line):
    with pytest.raises(UserError, match="stdin, line 2: "):
        list(recommend.read_users(['{"history": [1]}', line], TITLES))


def test_table_from_the_command_line(world, checkpoint_folder):
    command = ["recommend.py", "--base_model", checkpoint_folder, "--info_file", world.info]
    done = run_stage(*command, "--history", "number 12; 3", "--K", "4", "--max_history", "1")
    lines = done.stdout.split("\n")
    assert lines[1] == "history" and "Item number 12" in lines[2] and "not in the prompt" in lines[2]
    assert "Item number 3" in lines[3] and "not in the prompt" not in lines[3]
    shown = [line for line in lines[6:] if line.strip()]
    assert len(shown) == 4 and all(re.match(r" +\d+ +\d+\.\d\d%  Item number", line) for line in shown)
    refused = run_stage(*command, "--history", "nothing like it", check=False)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("error: history: no title has the words")
