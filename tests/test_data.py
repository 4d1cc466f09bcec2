"""The data entry, prompts and tasks.

Invariants: files that do not belong together are refused; one wording for SFT, RL and evaluation; no prompt of any task
shows its answer; every row carries its own target; upstream's wording gives upstream's prompts.
"""

import json
import random
import re

import polars as pl
import pytest
import yaml
from helpers import INDUSTRIAL, N_ITEMS, QWEN_TOKENIZER, ROOT

from data import (
    DEFAULT_TASKS,
    DEFAULT_TEMPLATE,
    RL_TASKS,
    TASKS,
    Prompts,
    drawn,
    load,
    next_sid_prompts,
    parse_rl_tasks,
    parse_tasks,
    read_items,
    readable,
    rl_rows,
    sft_pairs,
    template_of,
)
from minionerec.catalog.items import MAX_TITLE, Items
from minionerec.common.errors import UserError

ITEMS = Items(["<a_0><b_1>", "<a_1><b_0>", "<a_2><b_2>", "<a_0><b_3>"], ["One", "Two; or so", "Same", "Same"])
ROWS = pl.DataFrame({"user": ["u", "v", "w"], "history": [[0, 1], [2], [0, 1]], "target": [2, 3, 3]})
UPSTREAM = ROOT / "config" / "prompt_upstream.yaml"


# ------------------------------------------------------------------------------------------------ loading


def test_load(world):
    data = load(info_file=world.info, train=world.train, test=world.test, max_history=3)
    assert data.valid is None and len(data.items.sids) == N_ITEMS == data.catalog.n_items
    assert data.test["history"].list.len().max() == 3
    counts = dict(data.train["target"].value_counts().iter_rows())
    first, second = data.catalog.items_of_sid[data.catalog.sid_of_item[5]]
    assert {first, second} == {5, 6} and (counts.get(first, 0), -first) > (counts.get(second, 0), -second)
    assert load(sid_index_path=world.index, item_meta_path=world.items).items == data.items


def test_files_must_agree(world, tmp_path):
    index = json.loads(world.index.read_text())
    del index[str(N_ITEMS - 1)]
    (tmp_path / "short.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="found 48 items, expected the 47"):
        read_items("", tmp_path / "short.json", world.items)
    index = json.loads(world.index.read_text()) | {"0": ["<a_9>", "<b_9>", "<c_9>"]}
    (tmp_path / "other.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="48 items that differ from the 48"):
        read_items(world.info, tmp_path / "other.json")
    with pytest.raises(UserError, match="--max_history 0: expected at least 1"):
        load(info_file=world.info, max_history=0)


def test_errors_name_the_option_of_the_caller(world, tmp_path):
    with pytest.raises(UserError, match="check --valid_file"):
        load(info_file=world.info, valid=tmp_path / "none.csv", flags={"valid": "valid_file"})
    with pytest.raises(UserError, match="check --eval_file"):
        load(info_file=world.info, valid=tmp_path / "none.csv")


def test_titles_are_made_fit_for_prompts_once(tmp_path, capsys, monkeypatch):
    (tmp_path / "info.txt").write_text(f"<a_0>\tSee <a_0>\t0\n<a_1>\t{'x' * 1000}\t1\n")
    assert read_items(tmp_path / "info.txt").titles == ["See", "x" * MAX_TITLE]
    assert capsys.readouterr().out.count("info.txt: ") == 2
    monkeypatch.setenv("RANK", "1")
    read_items(tmp_path / "info.txt")
    assert capsys.readouterr().out == ""


def test_drawn_rows():
    rows = pl.DataFrame({"target": range(100)})
    assert drawn(rows, -1, 0).equals(rows) and drawn(rows, 100, 0).equals(rows)
    assert drawn(rows, 10, 1).equals(drawn(rows, 10, 1)) and not drawn(rows, 10, 1).equals(drawn(rows, 10, 2))


# ------------------------------------------------------------------------------------------------ prompts and answers


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


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, UPSTREAM])
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_never_contains_its_answer(task, template):
    items, rows = random_world(0)
    examples = list(TASKS[task].examples(rows, items, Prompts(template, category="Video_Games")))
    assert len(examples) in (30, 50)
    for prompt, answer, history, target in examples:
        assert answer and answer not in prompt and target not in history


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_never_contains_its_answer_where_titles_hold_sids_and_histories_are_empty(task, tmp_path):
    """Titles that hold the SID of their item, of the next item or of all items; rows without history."""
    items, rows = random_world(1)
    titles = [f"xq{i}xq {sid} {items.sids[(i + 1) % 30]} {' '.join(items.sids)}" for i, sid in enumerate(items.sids)]
    lines = [f"{sid}\t{title}\t{i}\n" for i, (sid, title) in enumerate(zip(items.sids, titles, strict=True))]
    (tmp_path / "info.txt").write_text("".join(lines))
    items = read_items(tmp_path / "info.txt")
    empty = rows.with_columns(history=pl.lit([], dtype=pl.List(pl.Int64)))
    for prompt, answer, *_ in TASKS[task].examples(pl.concat([rows, empty]), items, Prompts()):
        assert answer and answer not in prompt


def test_rows_that_a_task_cannot_use_are_counted(capsys):
    rows = pl.concat([ROWS, pl.DataFrame({"user": ["x"], "history": [[]], "target": [1]}, schema=ROWS.schema)])
    pairs = sft_pairs({"sid_walk": 1, "sid_seq": 1}, rows, ITEMS, Prompts(), seed=0)
    assert len(pairs) == 3 + 4
    assert capsys.readouterr().out == "sid_walk: 1 of 4 rows are left out, those without history\n"
    with pytest.raises(UserError, match="--sft_tasks sid_walk: no row is left"):
        sft_pairs({"sid_walk": 1}, rows.tail(1), ITEMS, Prompts(), seed=0)


def test_a_preference_that_contains_the_answer_is_refused():
    rows = ROWS.with_columns(preference=pl.Series([None, "things", "likes <a_0> <b_3>"]))
    with pytest.raises(UserError, match="the text of user w contains <a_0><b_3>"):
        sft_pairs({"preference2sid": 1}, rows, ITEMS, Prompts(), seed=0)
    with pytest.raises(UserError, match="need --user_preference_file"):
        sft_pairs({"preference2sid": 1}, ROWS, ITEMS, Prompts(), seed=0)


def test_one_wording_for_sft_rl_and_evaluation():
    items, rows = random_world(1)
    prompts = Prompts(category="Video_Games")
    asked = next_sid_prompts(rows, items, prompts)
    assert [prompt for prompt, *_ in TASKS["sid_seq"].examples(rows, items, prompts)] == asked
    assert rl_rows(rows, items, prompts)["prompt"] == asked
    assert all(prompts.tasks["sid_seq"]["instruction"].format(category="video games") in prompt for prompt in asked)


def test_equal_prompts_keep_their_own_targets():
    """Two users with one history and different targets; two items with one title."""
    columns = rl_rows(ROWS, ITEMS, Prompts())
    assert columns["prompt"][0] == columns["prompt"][2]
    assert columns["target_sid"] == ["<a_2><b_2>", "<a_0><b_3>", "<a_0><b_3>"] and columns["target_item"] == [2, 3, 3]
    title2sid = list(TASKS["title2sid"].examples(ROWS, ITEMS, Prompts()))
    assert [example.answer for example in title2sid] == ITEMS.sids
    assert [example.target for example in title2sid] == [0, 1, 2, 3]
    assert title2sid[2].prompt == title2sid[3].prompt


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="the industrial data is not available")
def test_published_rows_share_prompts():
    """A dictionary from prompt text to target would be wrong for at least 137 rows."""
    name = "Industrial_and_Scientific"
    data = load(info_file=next(INDUSTRIAL.glob("info/*.txt")), test=next(INDUSTRIAL.glob("test/*.csv")))
    rows = rl_rows(data.test, data.items, Prompts(category=name))
    by_prompt = {}
    for prompt, target in zip(rows["prompt"], rows["target_item"], strict=True):
        by_prompt.setdefault(prompt, set()).add(target)
    assert sum(len(by_prompt[prompt]) > 1 for prompt in rows["prompt"]) >= 137


# ------------------------------------------------------------------------------------------------ templates


def test_categories():
    assert readable("Video_Games") == "video games"
    assert Prompts(category="Video_Games").category == "video games"
    assert Prompts(category="Office_Products").category == "office products"
    assert Prompts(category="Industrial_and_Scientific").category == "industrial and scientific items"
    assert Prompts().category == "items"
    for category in ("x" * 300, "{history} {0} {", "../etc", "a\nb", "<é>"):
        assert Prompts(category=category).category
        next_sid_prompts(ROWS, ITEMS, Prompts(category=category))


def test_template_of_a_checkpoint(tmp_path):
    assert template_of(tmp_path) == DEFAULT_TEMPLATE
    (tmp_path / "prompt.yaml").write_text("own")
    assert template_of(tmp_path) == tmp_path / "prompt.yaml"
    assert template_of(tmp_path, str(UPSTREAM)) == UPSTREAM
    with pytest.raises(UserError, match="not a prompt template"):
        Prompts(tmp_path / "prompt.yaml")
    with pytest.raises(UserError, match="no wording for task 'other'"):
        Prompts().render("other")


# ------------------------------------------------------------------------------------------------ upstream's wording


def upstream_prompt(history: list[str]) -> tuple[str, str]:
    """The two texts that upstream's EvalSidDataset tokenises, one after the other."""
    asked = "Can you predict the next possible item"
    instruction = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        f"response that appropriately completes the request. \n\n### Instruction:\n{asked} that the user may expect?\n\n"
    )
    asked += f" the user may expect, given the following chronological interaction history: {', '.join(history)}"
    return instruction, f"### User Input: \n{asked}\n\n### Response:\n"


def test_upstreams_wording():
    prompts = Prompts(UPSTREAM)
    asked = next_sid_prompts(ROWS, ITEMS, prompts)
    assert asked == ["".join(upstream_prompt([ITEMS.sids[i] for i in history])) for history in ROWS["history"]]
    assert prompts.response_suffix == "\n"
    assert set(prompts.tasks) == set(TASKS)
    [prompt, *_] = [example.prompt for example in TASKS["title_seq2sid"].examples(ROWS, ITEMS, prompts)]
    assert 'the following items items in chronological order: "One", "Two; or so". Can you' in prompt


@pytest.mark.skipif(not INDUSTRIAL.exists() or not QWEN_TOKENIZER.exists(), reason="the data is not available")
def test_upstreams_token_ids():
    """For all 4 533 test rows of the published Industrial set, with the tokenizer of Qwen2.5."""
    from transformers import AutoTokenizer

    from minionerec.catalog.sids import codebook_tokens

    data = load(info_file=next(INDUSTRIAL.glob("info/*.txt")), test=next(INDUSTRIAL.glob("test/*.csv")))
    tokenizer = AutoTokenizer.from_pretrained(QWEN_TOKENIZER)
    tokenizer.add_tokens(codebook_tokens(data.items.sids))
    asked = next_sid_prompts(data.test, data.items, Prompts(UPSTREAM, category="Industrial_and_Scientific"))
    ours = tokenizer(asked)["input_ids"]
    parts = []
    for history in data.test["history"].to_list():
        instruction, part = upstream_prompt([data.items.sids[i] for i in history])
        parts.append(part)
    before = tokenizer(instruction)["input_ids"]
    assert len(ours) == 4533 and ours == [before + ids for ids in tokenizer(parts)["input_ids"]]


# ------------------------------------------------------------------------------------------------ tasks


def test_task_weights():
    assert parse_tasks("sid_seq, title2sid:0.5") == {"sid_seq": 1.0, "title2sid": 0.5}
    assert list(parse_tasks(DEFAULT_TASKS)) == ["sid_seq", "title2sid", "sid2title", "sid_seq2title", "title_seq2title"]
    items, rows = random_world(2)
    pairs = sft_pairs({"sid_seq": 2.5, "title2sid": 0.1}, rows, items, Prompts(), seed=0)
    assert len(pairs) == 125 + 3 and pairs == sft_pairs({"sid_seq": 2.5, "title2sid": 0.1}, rows, items, Prompts(), 0)
    for bad in ("nonsense", "sid_seq:x", "sid_seq:-1", "", "sid_seq:0", "sid_seq:nan", "sid_seq:inf", "sid_seq:1e9"):
        with pytest.raises(UserError, match="--sft_tasks"):
            parse_tasks(bad)


def test_rl_tasks_answer_with_a_sid():
    assert RL_TASKS == ["sid_seq", "title2sid", "title_seq2sid"]
    assert parse_rl_tasks("sid_seq, title2sid:10") == {"sid_seq": None, "title2sid": 10}
    for bad in ("sid2title", "sid_seq:0", "sid_seq:x", "", "sid_seq,sid_seq", "sid_seq:-1", "sid_seq:1.5"):
        with pytest.raises(UserError, match="--rl_tasks"):
            parse_rl_tasks(bad)


def test_rl_rows_of_several_tasks():
    items, rows = random_world(3)
    columns = rl_rows(rows, items, Prompts(), {"title2sid": 5, "title_seq2sid": None}, seed=1)
    assert columns["task"] == ["title2sid"] * 5 + ["title_seq2sid"] * 50
    assert columns["history_items"][:5] == [[]] * 5 and columns["history_items"][5:] == rows["history"].to_list()
    assert columns["target_sid"] == [items.sids[target] for target in columns["target_item"]]
    assert columns["target_item"][5:] == rows["target"].to_list()


# ------------------------------------------------------------------------------------------------ safety


def test_no_module_evaluates_or_unpickles():
    """What it finds would be a way to execute a data file."""
    unsafe = re.compile(
        r"(?<![\w.])(eval|exec)\(|import pickle|allow_pickle=True|weights_only=False"
        r"|trust_remote_code=True|yaml\.(unsafe_)?load\("
    )
    for room in ("*.py", "minionerec/**/*.py", "rq/**/*.py", "preprocess/**/*.py"):
        for path in ROOT.glob(room):
            assert not unsafe.search(path.read_text(encoding="utf-8")), path


def test_an_answer_may_continue_the_history(tmp_path):
    """The default template does; one with a response marker in sid_seq does not."""
    prompts = Prompts(category="toys")
    assert prompts.continues and prompts.render("sid_seq", history="<a_1>") == "toys:\n<a_1>"
    assert not Prompts(DEFAULT_TEMPLATE.parent / "prompt_upstream.yaml", "toys").continues
    template = yaml.safe_load(DEFAULT_TEMPLATE.read_text())
    template["tasks"]["sid_seq"]["response_marker"] = " ->"
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(template))
    marked = Prompts(tmp_path / "template.yaml", "toys")
    assert not marked.continues and marked.render("sid_seq", history="<a_1>") == "toys:\n<a_1> ->"
    template["tasks"]["sid_seq"]["response_marker"] = 3
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(template))
    with pytest.raises(UserError, match="response_marker is '3', expected a text"):
        Prompts(tmp_path / "template.yaml")
