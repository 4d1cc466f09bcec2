"""Rows as token ids.

Invariants: bulk tokenisation gives the ids of `tokenizer(text)`, whatever the tokenizer and whatever its file carries
from its last use (truncation, padding, dropout); a cache is read only for the same texts and tokenizer; rows that differ
from the tokenizer's are refused before the training; a long prompt loses its beginning.
"""

import copy
import functools
import json

import numpy as np
import polars as pl
import pytest
from helpers import QWEN_TOKENIZER
from language_model.small_models import rows_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import Prompts, load, sft_pairs
from minionerec.common.errors import UserError
from minionerec.language_model.base_model import smollm2_file
from minionerec.language_model.checkpoints import load_tokenizer
from minionerec.language_model.tokenizing import check_rows, cut, tokenize, tokenize_cached

TASKS = ("sid_seq", "title2sid", "sid2title", "sid_seq2title", "title_seq2title", "title_seq2sid", "sid_walk")


@pytest.fixture(scope="module")
def pairs(world):
    data = load(sid_index_path=world.index, item_meta_path=world.items, train=world.train)
    return sft_pairs(dict.fromkeys(TASKS, 1), data.train, data.items, Prompts(category="Toys_and_Games"), 0)


def metaspace_tokenizer(**options):
    """A Llama-like tokenizer: adds a beginning-of-sequence token, and marks words with an underscore."""
    pieces = [
        *"▁abcdefghijklmnopqrstuvwxyzIDNTA0123456789'\n:;,<>_",
        *("▁item", "▁number", "er", "▁the", ";▁", "▁b", "est"),
    ]
    backend = Tokenizer(
        models.Unigram([("<unk>", 0.0)] + [(p, -float(i % 7) - 1) for i, p in enumerate(pieces)], unk_id=0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


METASPACE = {"metaspace": {}, "metaspace uncut": {"split": False}, "metaspace first": {"prepend_scheme": "first"}}


def tokenizer_named(name, base_model):
    if name == "world":
        return load_tokenizer(base_model, "base_model")
    if name.startswith("metaspace"):
        return metaspace_tokenizer(**METASPACE[name])
    if name == "qwen2.5":
        if not QWEN_TOKENIZER.exists():
            pytest.skip("the Qwen2.5 tokenizer is absent")
        return AutoTokenizer.from_pretrained(QWEN_TOKENIZER)
    return copy.deepcopy(smollm2_tokenizer())


@functools.cache
def smollm2_tokenizer():
    return AutoTokenizer.from_pretrained(**smollm2_file())


def row(rows, i):
    return rows.tokens[rows.start[i] : rows.start[i + 1]].tolist()


@pytest.mark.parametrize("name", ["world", "qwen2.5", "smollm2", *METASPACE])
@pytest.mark.parametrize("separator", ["; ", ", ", "|"])
def test_tokens_are_those_of_the_tokenizer(name, separator, pairs, base_model):
    tokenizer = tokenizer_named(name, base_model)
    pairs = [*pairs, ("; ; a;b; , c, '; 1; ;x", "an answer; with a separator"), ("<a_1>; <a_9>;  <b_2>x", "<c_3>")]
    pairs = [(prompt.replace("; ", separator), answer) for prompt, answer in pairs]
    tokenizer.add_tokens([f"<{letter}_{code}>" for letter in "abc" for code in range(16)])
    found = cut(pl.Series([prompt for prompt, _ in pairs]), tokenizer, separator)
    assert (found is None) == (name == "metaspace first")  # it treats the beginning of a text differently
    cut_at_titles = separator != "|" and name != "metaspace uncut"
    assert found is None or any(text.startswith(" Item") for text in found[0].texts) == cut_at_titles
    rows = tokenize(pairs, tokenizer, "!", separator)
    for i, (prompt, answer) in enumerate(pairs):
        answer_ids = [*tokenizer(answer + "!", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert row(rows, i) == tokenizer(prompt)["input_ids"] + answer_ids
        assert rows.answer[i] == len(answer_ids)
    check_rows(rows, pairs, tokenizer, "!")


def test_text_that_looks_like_a_sid_token_is_tokenised_whole(base_model):
    tokenizer = load_tokenizer(base_model, "x")
    tokenizer.add_tokens(["<a_1>"])
    prompts = pl.Series(["by <a_1>", "by <a_2>"])
    assert cut(prompts, tokenizer, "; ") is None and cut(prompts[:1], tokenizer, "; ") is not None
    assert cut(pl.Series(["\x01"]), tokenizer, "; ") is None
    for text in ("a < b <a_1>", "1 <2> 3", "->", "<a_1"):
        assert cut(pl.Series([text, "<a_1>"]), tokenizer, "; ") is None


@pytest.mark.parametrize("state", ["truncation", "padding", "dropout"])
def test_state_of_the_last_use_is_cleared_on_loading(state, base_model, pairs, tmp_path):
    tokenizer = load_tokenizer(base_model, "base_model")
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    if state == "truncation":
        content["truncation"] = {"max_length": 6, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    elif state == "padding":
        strategy = {"strategy": {"Fixed": 200}, "direction": "Left", "pad_to_multiple_of": None}
        content["padding"] = strategy | {"pad_id": 0, "pad_type_id": 0, "pad_token": tokenizer.pad_token}
    else:
        content["model"]["dropout"] = 0.5
        rewritten = json.loads((tmp_path / "tokenizer_config.json").read_text())
        rewritten["tokenizer_class"] = "PreTrainedTokenizerFast"  # Qwen2's class rebuilds its BPE without dropout
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(rewritten))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = tokenize(pairs, tokenizer, "", "; ")
    found = tokenize(pairs, load_tokenizer(tmp_path, "base_model"), "", "; ")
    assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("call", [{"truncation": True, "max_length": 6}, {"padding": "max_length", "max_length": 200}])
def test_rows_that_differ_from_the_tokenizer_are_refused(call, base_model, pairs):
    tokenizer = load_tokenizer(base_model, "base_model")
    check_rows(tokenize(pairs, tokenizer, "", "; "), pairs, tokenizer, "")
    tokenizer("a text of some words", **call)  # leaves its state in the tokenizer
    with pytest.raises(
        UserError, match="row 0, prompt 'toys and games.*tokenised in bulk it has .* tokens, by the tokenizer"
    ):
        check_rows(tokenize(pairs, tokenizer, "", "; "), pairs, tokenizer, "")


def test_cached_rows_are_read_and_another_tokenizer_misses(pairs, base_model, tmp_path, capsys, monkeypatch):
    tokenizer = load_tokenizer(base_model, "x")
    first = tokenize_cached(pairs, tokenizer, "", "; ", tmp_path)
    assert capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("minionerec.language_model.tokenizing.tokenize", None)  # a second start does not call it
    again = tokenize_cached(pairs, tokenizer, "", "; ", tmp_path)
    assert "rows as tokens from" in capsys.readouterr().out
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.undo()
    tokenizer.add_tokens(["<a_1>"])
    tokenize_cached(pairs, tokenizer, "", "; ", tmp_path)
    tokenize_cached(pairs[1:], tokenizer, "", "; ", tmp_path)
    tokenize_cached(pairs, tokenizer, ".", "; ", tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("keep", [0, 40, -1])
def test_a_cache_that_was_cut_off_is_made_again(pairs, base_model, tmp_path, capsys, keep):
    tokenizer = load_tokenizer(base_model, "x")
    first = tokenize_cached(pairs, tokenizer, "", "; ", tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    again = tokenize_cached(pairs, tokenizer, "", "; ", tmp_path)
    assert f"{file} cannot be read" in capsys.readouterr().out
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True)) and file.read_bytes() == whole


def test_a_long_prompt_loses_its_beginning():
    rows = rows_of([5, 3, 9]).trimmed(4)
    assert [row(rows, i) for i in range(3)] == [[1, 2, 3, 4], [5, 6, 7], [13, 14, 15, 16]]


def test_an_answer_without_room_for_a_prompt_is_named():
    with pytest.raises(UserError, match="--cutoff_len 3: the answer 'a long title' of row 1 has 3 tokens"):
        rows_of([4, 5], [2, 3]).trimmed(3, [("p", "short"), ("p", "a long title")])
