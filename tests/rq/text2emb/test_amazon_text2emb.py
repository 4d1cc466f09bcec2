"""Text embedding: what an item's text is, and that it is embedded unchanged.

Invariants: nothing of a text is executed; ids must be consecutive; an item without text gets a text with its id; a missing
field is no word; embeddings do not depend on the batch size; a finished file is not made again.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from rq_helpers import refusal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from minionerec.common.errors import UserError
from rq.text2emb import amazon_text2emb
from rq.text2emb.amazon_text2emb import drop_words, item_texts, plain_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        ("nan", ""),  # as pandas writes a missing text
        ("Nan", "Nan"),
        ("nan bread", "nan bread"),
        (0, "0"),
        (["Lamps", float("nan"), "nan"], "Lamps"),
        ('["a", NaN, null]', "a"),
        ({"en": "Lamp", "de": ["Lampe", None], "fr": float("nan")}, "Lamp Lampe"),
        ("{'en': 'Lamp', 'size': {'width': 3}}", "Lamp 3"),
        ("{'b', 'a'}", "{'b', 'a'}"),  # a set has no order
        ("", ""),
        ("[]", ""),
        ("  a\n b ", "a b"),
        (["a", "", ["b"]], "a b"),
        ("['it''s', \"b\"]", "its b"),
        ("[not a list]", "[not a list]"),
        ("__import__('os')", "__import__('os')"),
        ("5 &lt; 6 &amp; <b>bold</b>", "5 < 6 & bold"),
    ],
)
def test_plain_text(value, text):
    assert plain_text(value) == text


def test_item_texts(tmp_path):
    path = tmp_path / "D.item.json"
    path.write_text(
        '{"1": {"title": "", "description": "[]"}, "0": {"title": "T", "brand": "B", "description": ["x"]}}'
    )
    assert item_texts(path) == ["T x B", "item 1"]
    path.write_text(
        '{"0": {"title": "Lamp", "description": NaN, "brand": NaN}, "1": {"title": NaN, "categories": [NaN]}}'
    )
    assert item_texts(path) == ["Lamp", "item 1"]
    path.write_text(json.dumps({"0": {"title": "T", "description": json.loads("[" * 700 + "]" * 700)}}))
    with pytest.raises(UserError, match="item 0 has lists in lists"):
        item_texts(path)
    path.write_text('{"0": {"title": "T"}, "2": {"title": "U"}}')
    with pytest.raises(UserError, match="item 1 is missing, expected ids 0..1"):
        item_texts(path)


def test_drop_words():
    text = " ".join(map(str, range(1000)))
    (kept,) = drop_words([text], 0.3, seed=0)
    assert 600 < len(kept.split()) < 800 and drop_words([text], 0.3, seed=0) == [kept]
    assert drop_words(["word"], 0.999, seed=0) == ["word"]


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A two-layer BERT of width 16 that knows a few words."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "desk", "lamp", "light", "bulb", "item", *map(str, range(9))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def items(tmp_path):
    titles = ["desk lamp", "light", "", "light bulb light bulb light bulb light bulb light bulb"]
    content = {str(i): {"title": title, "brand": None} for i, title in enumerate(titles)}
    (tmp_path / "D.item.json").write_text(json.dumps(content))
    return tmp_path


def embed(root, encoder, **options) -> np.ndarray:
    paths = {"dataset": "D", "root": str(root), "plm_name": "tiny", "plm_checkpoint": str(encoder), "device": "cpu"}
    amazon_text2emb.main(amazon_text2emb.Options(**paths | options))
    return np.load(root / f"D.emb-{options.get('plm_name', 'tiny')}-td.npy")


def test_embedding_equals_a_plain_mean(items, encoder, capsys):
    found = embed(items, encoder)
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), PreTrainedTokenizerFast.from_pretrained(encoder)
    for text, row in zip(["desk lamp", "light", "item 2", "light bulb " * 4], found, strict=True):  # cut at 8 tokens
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(row, hidden.mean(0).numpy(), atol=1e-6)
    output = capsys.readouterr().out
    assert "4 items, 1 without any text" in output and "texts are cut at 8 tokens" in output
    one_by_one = embed(items, encoder, plm_name="single", batch_size=1)
    np.testing.assert_allclose(found, one_by_one, atol=1e-6)


def test_a_finished_file_is_kept_and_another_refused(items, encoder, tmp_path, capsys):
    before = embed(items, encoder)
    capsys.readouterr()
    embed(items, encoder, batch_size=1)
    assert "nothing to do" in capsys.readouterr().out
    text = (items / "D.item.json").read_text()
    (items / "D.item.json").write_text(text.replace("desk", "light"))
    with pytest.raises(UserError, match="the content of items has changed"):
        embed(items, encoder)
    with pytest.raises(UserError, match="max_sent_len"):
        (items / "D.item.json").write_text(text)
        embed(items, encoder, max_sent_len=2)
    after = embed(items, encoder, max_sent_len=2, overwrite=True)
    assert (after[:2] == before[:2]).all() and (after[3] != before[3]).any()
    np.testing.assert_array_equal(np.load(items / "D.emb-tiny-td.npy.1"), before)


def nan_weights(folder):
    model = BertModel.from_pretrained(folder)
    model.embeddings.word_embeddings.weight.data.fill_(torch.nan)
    model.save_pretrained(folder)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD_ENCODERS = {
    "empty": (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "not an encoder"),
    "truncated weights": (truncate, "not an encoder"),
    "NaN weights": (nan_weights, "NaN or Inf for 4 items, first item 0"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "not an encoder"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not an encoder"),
    "broken modules": (lambda folder: (folder / "modules.json").write_text("{"), "modules.json: not valid JSON"),
    "wrong modules": (lambda folder: (folder / "modules.json").write_text("{}"), "found a dict, expected a list"),
}


@pytest.mark.parametrize("case", BAD_ENCODERS)
def test_a_bad_encoder_is_one_line(case, items, encoder, tmp_path):
    change, message = BAD_ENCODERS[case]
    shutil.copytree(encoder, tmp_path / "bad")
    change(tmp_path / "bad")
    with pytest.raises(UserError, match=message):
        embed(items, tmp_path / "bad")
    assert not list(items.glob("*.npy"))


def test_bad_options_are_one_line(items, encoder):
    given = ["--dataset", "D", "--root", items, "--plm_name", "tiny", "--plm_checkpoint", encoder]
    for more, found in (
        (["--plm_name", "org/model"], "--plm_name org/model: expected a short name without /"),
        (["--max_sent_len", "0"], "--max_sent_len 0: expected at least 1"),
        (["--batch_size", "-1"], "--batch_size -1: expected at least 1"),
        (["--word_drop_ratio", "1"], "--word_drop_ratio 1.0: expected below 1"),
        (["--word_drop_ratio", "nan"], "--word_drop_ratio nan: expected a finite number"),
        (["--seed", "-1"], "--seed -1: expected 0 to"),
        (["--root", items / "D.item.json"], "D.item.json: no such file"),
        (["--dataset", "E"], "E.item.json: no such file"),
        (["--plm_checkpoint", items / "D.item.json"], "not an encoder"),
        (["--plm_name", ""], "--plm_name is required"),
    ):
        assert found in refusal(amazon_text2emb, *given, *more)
    assert not list(items.glob("*.npy"))
