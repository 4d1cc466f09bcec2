"""recommend.py: histories by ids and words, filters, and a server of JSON lines that answers each line as it comes.

A line with an error gets an error, the others their answers; what a title holds never reaches the terminal raw.
"""

import io
import json
import queue
import re
import shutil
import subprocess
import threading

import pytest
from helpers import N_ITEMS, ROOT, environment_of, forked_python, run_stage

import recommend
from minionerec.common.errors import UserError
from minionerec.language_model.checkpoints import Settings, save_settings

TITLES = recommend.Titles(
    ["Alien", "Aliens", "Alien Nation", "Blade Runner", "Star Wars, Part 4", "Bad \x1b[31m\x9b2J\u202e one"],
    [1, 9, 1, 0, 0, 0],
)


def options(world, checkpoint_folder, **more):
    return recommend.Options(base_model=str(checkpoint_folder), info_file=str(world.info), **more)


@pytest.mark.parametrize(
    "text, items",
    [
        ("3, 0", [3, 0]),
        ("3;0 ; 1", [3, 0, 1]),
        ("alien; BLADE", [0, 3]),  # the title itself comes before a more popular match
        ("nat alien", [2]),
        ("alien; 4; star wars", [0, 4, 4]),
        ("alie", [1]),  # of several the most popular
        ("star wars, part", [4]),  # a comma in words separates nothing
    ],
)
def test_histories_by_ids_or_words(text, items):
    assert recommend.parse_history(text, TITLES) == items


@pytest.mark.parametrize(
    "text, found",
    [
        ("77", "no item 77, expected ids 0..5"),
        ("9" * 5000, "no item 9999"),
        ("blade runer", "is it Blade Runner"),
        ("bda 31m 2j ono", r"is it Bad \x1b[31m\x9b2J\u202e one"),
        (" ; ", "empty"),
        ("!", "no title has the words '!'"),
    ],
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
    unseen = recommend.Recommender(options(world, checkpoint_folder, K=100, unseen=True))([[3, 5], [7]])
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


def test_the_default_for_seen_items_follows_from_train(world, checkpoint_folder, tmp_path):
    known = options(world, checkpoint_folder, train_file=str(world.train))
    assert recommend.Recommender(known).unseen  # no target of the walks repeats
    assert not recommend.Recommender(options(world, checkpoint_folder)).unseen
    assert not recommend.Recommender(
        options(world, checkpoint_folder, train_file=str(world.train), unseen=False)
    ).unseen


@pytest.mark.parametrize(
    "line",
    [
        '{"history": "49"}', '{"history": []}', "[1]", "{", '{"history": [900]}', '{"history": [true]}', "[" * 100_000,
        '{"history": [' + "9" * 5000 + "]}", '{"history": [1e400]}', '{"history": ["\\ud800"]}', "null", "\udcff\udcfe",
        '{"history": [1], "x": NaN}', '{"history": [1], "x": -1e999}', '{"history": [-5]}', '{"history": ["-5"]}',
    ],
)  # fmt: skip
def test_bad_lines_are_errors_of_one_line(line):
    user = recommend.read_user(2, line, TITLES)
    assert user.error and user.number == 2 and not user.history and len(user.error.splitlines()) == 1


def test_a_byte_order_mark_is_no_part_of_a_line():
    assert recommend.read_user(1, '\ufeff{"history": [1]}', TITLES).history == [1]


class FewAnswers:
    """A recommender that refuses a history with item 3."""

    def __call__(self, histories):
        if any(3 in history for history in histories):
            raise UserError("too long")
        return [[{"item_id": history[-1]}] for history in histories]


def test_an_empty_history_is_named():
    assert "with at least one item" in recommend.read_user(1, '{"history": []}', TITLES).error


def test_a_line_that_fails_costs_no_other_line_its_answer():
    lines = ['{"history": [1], "user": "x"}', "{", '{"history": [3], "user": "y"}', '{"history": [0]}']
    users = [recommend.read_user(number, line, TITLES) for number, line in enumerate(lines, start=1)]
    found = recommend.answers(FewAnswers(), users)
    assert found[0] == {"predict": [{"item_id": 1}]} and found[3] == {"predict": [{"item_id": 0}]}
    assert found[1]["line"] == 2 and "expected an object like" in found[1]["error"]
    assert found[2] == {"line": 3, "error": "too long"}


def test_an_answer_replaces_an_older_one_of_its_line(monkeypatch, capsys):
    lines = ['{"history": [1], "error": "old"}', '{"history": [900], "predict": []}']
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    recommender = FewAnswers()
    recommender.titles, recommender.options = TITLES, recommend.Options()
    recommend.serve(recommender)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first.keys() == {"history", "predict"} and second.keys() == {"history", "line", "error"}


def test_lines_that_wait_form_a_batch():
    lines = queue.Queue()
    batches = recommend.waiting_lines(iter(lines.get, None), 3)
    lines.put("a")
    first = []
    thread = threading.Thread(target=lambda: first.extend(next(batches)), daemon=True)  # waiting for more would hang
    thread.start()
    thread.join(timeout=20)
    assert first == [(1, "a")]
    for line in ("b", " \n", "c", "d", "e", None):
        lines.put(line)
    rest = list(batches)
    assert [line for batch in rest for line in batch] == [(2, "b"), (4, "c"), (5, "d"), (6, "e")]
    assert all(len(batch) <= 3 for batch in rest)
    assert list(recommend.waiting_lines(io.StringIO(""), 3)) == []


def test_a_client_gets_its_answer_before_it_sends_the_next_line(world, checkpoint_folder):
    """And a bad line gets an error; bytes that are no text are one of them."""
    command = [forked_python().executable, "recommend.py", "--base_model", checkpoint_folder, "--info_file", world.info]
    server = subprocess.Popen(
        [*command, "--jsonl", "True", "--K", "2", "--category", "books"], cwd=ROOT, env=environment_of(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    ended = threading.Timer(120, server.kill)
    ended.start()
    try:
        for line in (b'{"history": [3], "user": 1}', b"\xff\xfe{", b'{"history": ["number 12"], "user": 3}'):
            server.stdin.write(line + b"\n")
            server.stdin.flush()
            answer = json.loads(server.stdout.readline())
            assert "error" in answer if b"user" not in line else len(answer["predict"]) == 2
        _, errors = server.communicate()
    finally:
        ended.cancel()
    assert server.returncode == 0 and b"1 lines have an error" in errors and b"note: --category" in errors


def test_titles_with_terminal_escapes_are_shown_escaped(world, checkpoint_folder, tmp_path):
    bad = "\x1b]0;pwned\x07 \x9b31m \u202e"
    info = tmp_path / "info.txt"
    info.write_text(re.sub(r"Item number (\d+),", rf"Item {bad} number \1,", world.info.read_text()))
    command = ["recommend.py", "--base_model", checkpoint_folder, "--info_file", info]
    shown = run_stage(*command, "--history", "3", "--K", "4").stdout
    assert r"\x1b]0;pwned\x07 \x9b31m \u202e number 3," in shown
    assert not set(bad) & set(shown) - set(" 0123456789abcdefghijklmnopqrstuvwxyz];")
    served = subprocess.run(
        [forked_python().executable, *command, "--jsonl", "True"],
        cwd=ROOT, env=environment_of(), input='{"history": [3]}\n', capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert not set(served) & {"\x1b", "\x07", "\x9b", "\u202e"} and bad in json.loads(served)["predict"][0]["title"]


def test_the_checkpoints_settings_are_the_default(world, checkpoint_folder, tmp_path):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "checkpoint")
    save_settings(folder, ROOT / "config" / "prompt.yaml", Settings("Toys_and_Games", 1, "catalog"))
    stored = recommend.Recommender(options(world, folder))
    given = {"category": "Toys_and_Games", "max_history": 1, "space": "catalog"}
    assert stored([[9, 3]]) == recommend.Recommender(options(world, checkpoint_folder, **given))([[9, 3]])
    assert stored([[9, 3]]) != recommend.Recommender(options(world, checkpoint_folder))([[9, 3]])
    (folder / "run.json").write_text(json.dumps({"stage": "rl", "complete": False}))
    with pytest.raises(UserError, match="rl has not finished there"):
        recommend.main(options(world, folder, history="3"))


@pytest.mark.parametrize(
    "wrong, found",
    [
        ({"K": 0}, "--K 0: expected at least 1"),
        ({"K": -3}, "--K -3: expected at least 1"),
        ({"num_beams": -1}, "--num_beams -1: expected at least 0"),
        ({"num_beams": 5}, "--num_beams 5: expected at least --K 10, or 0"),
        ({"batch_size": 0}, "--batch_size 0: expected at least 1"),
        ({"max_history": -1}, "--max_history -1: expected at least 0"),
        ({"space": "words"}, "--space words: expected vocab or catalog"),
        ({"jsonl": True, "history": "3"}, "--jsonl True: expected False with --history"),
    ],
)
def test_bad_options(world, checkpoint_folder, wrong, found):
    with pytest.raises(UserError, match=found):
        options(world, checkpoint_folder, **wrong)


def test_table_from_the_command_line(world, checkpoint_folder):
    command = ["recommend.py", "--base_model", checkpoint_folder, "--info_file", world.info]
    done = run_stage(*command, "--history", "number 12; 3", "--K", "4", "--max_history", "1")
    lines = done.stdout.split("\n")
    assert lines[0].startswith("note: --max_history 1 is used")
    lines = lines[1:]
    assert lines[1] == "history" and "Item number 12" in lines[2] and "not in the prompt" in lines[2]
    assert "Item number 3" in lines[3] and "not in the prompt" not in lines[3]
    shown = [line for line in lines[6:] if line.strip()]
    assert len(shown) == 4 and all(re.match(r" +\d+ +\d+\.\d\d%  Item number", line) for line in shown)
    refused = run_stage(*command, "--history", "nothing like it", check=False)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("error: history: no title has the words")
