"""SFT: rows as tokens, batches, logits at answers alone, what is trained, what is saved; each against a plain twin."""

import copy
import functools
import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from helpers import INDUSTRIAL, QWEN_TOKENIZER, ROOT
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import data
import sft
from data import DEFAULT_TASKS, SFT_TASKS, Prompts, read_sequences, sft_pairs
from minionerec.catalog.items import Items, read_titles
from minionerec.catalog.sids import codebook_tokens, read_index
from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.decoding.beam_search import beam_search
from minionerec.language_model.adapters import add_lora, train_rows_alone
from minionerec.language_model.base_model import smollm2_file
from minionerec.language_model.batches import BLANK, IGNORED, Collator, EpochOrder, Lines, pack
from minionerec.language_model.checkpoints import load_tokenizer, new_model, save_trained
from minionerec.language_model.new_tokens import add_tokens
from minionerec.language_model.tokenizing import Rows, cut, tokenize, tokenize_cached

PROMPTS = Prompts(category="Toys_and_Games")


def rows_of(lengths, answers=None):
    """Rows of given lengths whose tokens count up from 0."""
    answers = answers or [min(2, n - 1) for n in lengths]
    return Rows(np.arange(sum(lengths), dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)]), np.array(answers))


@pytest.fixture(scope="module")
def pairs(world):
    items = Items(read_index(world.index), read_titles(world.items))
    train = read_sequences(world.train, items.sids, "train_file")
    return sft_pairs(
        dict.fromkeys([*data.parse_tasks(DEFAULT_TASKS), "title_seq2sid", "sid_walk"], 1), train, items, PROMPTS, 0
    )


# ------------------------------------------------------------------------------------------------ tokens


def metaspace_tokenizer(**options):
    """A Llama-like tokenizer: begins every text with a token of its own, and marks words with an underscore."""
    pieces = [
        *"▁abcdefghijklmnopqrstuvwxyzIDNTA0123456789'\n:;,<>_",
        "▁item",
        "▁number",
        "er",
        "▁the",
        ";▁",
        "▁b",
        "est",
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


def real_tokenizer(name):
    if name.startswith("metaspace"):
        return metaspace_tokenizer(**METASPACE[name])
    if name == "qwen2.5":
        if not QWEN_TOKENIZER.exists():
            pytest.skip("the Qwen2.5 tokenizer is not beside the project")
        return AutoTokenizer.from_pretrained(QWEN_TOKENIZER)
    return copy.deepcopy(smollm2_tokenizer())


@functools.cache
def smollm2_tokenizer():
    return AutoTokenizer.from_pretrained(**smollm2_file())


@pytest.mark.parametrize("name", ["world", "qwen2.5", "smollm2", *METASPACE])
@pytest.mark.parametrize("separator", ["; ", ", ", "|"])
def test_tokens_are_the_tokenizers(name, separator, pairs, base_model):
    tokenizer = load_tokenizer(base_model, "x") if name == "world" else real_tokenizer(name)
    pairs = [*pairs, ("; ; a;b; , c, '; 1; ;x", "an answer; with a separator"), ("<a_1>; <a_9>;  <b_2>x", "<c_3>")]
    pairs = [(prompt.replace("; ", separator), answer) for prompt, answer in pairs]
    tokenizer.add_tokens([f"<{letter}_{code}>" for letter in "abc" for code in range(16)])
    found = cut(pl.Series([prompt for prompt, _ in pairs]), tokenizer, separator)
    assert (found is None) == (name == "metaspace first")  # it treats the beginning of a text apart
    cut_at_titles = separator != "|" and name != "metaspace uncut"
    assert found is None or any(text.startswith(" Item") for text in found[0].texts) == cut_at_titles
    rows = tokenize(pairs, tokenizer, "!", separator)
    for i, (prompt, answer) in enumerate(pairs):
        answer_ids = [*tokenizer(answer + "!", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert rows.tokens[rows.start[i] : rows.start[i + 1]].tolist() == tokenizer(prompt)["input_ids"] + answer_ids
        assert rows.answer[i] == len(answer_ids)


def test_a_lookalike_of_a_sid_token_is_tokenised_whole(base_model):
    tokenizer = load_tokenizer(base_model, "x")
    tokenizer.add_tokens(["<a_1>"])
    prompts = pl.Series(["by <a_1>", "by <a_2>"])
    assert cut(prompts, tokenizer, "; ") is None and cut(prompts[:1], tokenizer, "; ") is not None
    assert cut(pl.Series(["\x01"]), tokenizer, "; ") is None
    for text in ("a < b <a_1>", "1 <2> 3", "->", "<a_1"):
        assert cut(pl.Series([text, "<a_1>"]), tokenizer, "; ") is None


def test_cached_rows_are_read_and_another_tokenizer_misses(pairs, base_model, tmp_path, capsys, monkeypatch):
    tokenizer = load_tokenizer(base_model, "x")
    first = tokenize_cached(pairs, tokenizer, "", "; ", tmp_path)
    assert capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("tokens.tokenize", None)  # a second start must not come here
    again = tokenize_cached(pairs, tokenizer, "", "; ", tmp_path)
    assert "rows as tokens from" in capsys.readouterr().out
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.undo()
    tokenizer.add_tokens(["<a_1>"])
    tokenize_cached(pairs, tokenizer, "", "; ", tmp_path)
    tokenize_cached(pairs[1:], tokenizer, "", "; ", tmp_path)
    tokenize_cached(pairs, tokenizer, ".", "; ", tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_long_prompt_loses_its_beginning():
    rows = rows_of([5, 3, 9]).trimmed(4)
    assert [rows.tokens[a:b].tolist() for a, b in zip(rows.start, rows.start[1:], strict=False)] == [
        [1, 2, 3, 4],
        [5, 6, 7],
        [13, 14, 15, 16],
    ]
    with pytest.raises(UserError, match="--cutoff_len 2 leaves no room beside an answer of 2 tokens"):
        rows.trimmed(2)


# ------------------------------------------------------------------------------------------------ lines and order


def test_packed_lines_hold_every_row_once():
    lengths = np.random.default_rng(0).integers(2, 60, 500)
    lines = Lines(rows_of(lengths.tolist()), capacity=64)
    assert sorted(row for line in lines.rows_of for row in line) == list(range(500))
    assert lines.lengths.max() <= 64 and lines.lengths.mean() > 0.94 * 64
    assert pack(np.array([3, 3, 2]), 5) == [[0, 2], [1]]


def test_order_is_of_seed_and_epoch_and_ends_with_blanks():
    lengths = np.random.default_rng(0).integers(5, 100, 1000)
    order = EpochOrder(lengths, 64, seed=1, by_length=True)
    first = order.order()
    assert (
        len(first) == len(order) == 1024 and first[1000:] == [BLANK] * 24 and sorted(first[:1000]) == list(range(1000))
    )
    assert first == EpochOrder(lengths, 64, seed=1, by_length=True).order()
    order.set_epoch(1)
    assert order.order() != first
    assert EpochOrder(lengths, 64, seed=2, by_length=True).order() != first
    grouped, shuffled = (EpochOrder(lengths, 64, 1, by_length=by).padding_share(8) for by in (True, False))
    assert grouped < 0.1 < 0.3 < shuffled


@functools.cache
def industrial():
    """(SIDs, items, train samples) of the real data set."""
    sids = read_index(next(INDUSTRIAL.glob("index/*.index.json")))
    items = Items(sids, read_titles(next(INDUSTRIAL.glob("index/*.item.json"))))
    return sids, items, read_sequences(next(INDUSTRIAL.glob("train/*.csv")), sids, "train_file")


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="the Industrial data set is not beside the project")
@pytest.mark.parametrize("packing", [False, True])
def test_padding_of_real_rows_stays_under_a_tenth(packing):
    sids, items, train = industrial()
    tokenizer = real_tokenizer("smollm2")
    tokenizer.add_tokens(codebook_tokens(sids))
    rows = tokenize(sft_pairs(data.parse_tasks(DEFAULT_TASKS), train, items, PROMPTS, 0)[::8], tokenizer, "", "; ")
    lines = Lines(rows.trimmed(512), 512 if packing else 0)
    assert EpochOrder(lines.lengths, 64, 0, by_length=not packing).padding_share(8) < 0.1


def test_batches_show_blank_lines_no_loss():
    lines = Lines(rows_of([4, 6]))
    batch = Collator(pad_token_id=99)([lines[0], lines[BLANK], lines[1]])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 99, 99], [99] * 6, [4, 5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 2, 3, -100, -100], [-100] * 6, [-100] * 4 + [8, 9]]
    packed = Collator(99, packed=True)([Lines(rows_of([4, 3, 6]), capacity=8)[1], []])
    assert packed["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [99] * 7]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]
    assert packed["labels"].tolist() == [[-100, -100, 2, 3, -100, 5, 6], [-100] * 7]


# ------------------------------------------------------------------------------------------------ the loss

SMALL = {"vocab_size": 120, "max_position_embeddings": 256}
ARCHITECTURES = {
    "qwen2": Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **SMALL),
    "llama": LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=False, **SMALL),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, vocab_size=120),
}  # fmt: skip


def random_model(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=torch.float32).eval()


def plain_loss_and_gradients(model, rows, side="right"):
    """Mean loss over answers by full logits of padded rows with a mask: what any trainer does."""
    longest = rows.lengths.max()
    ids, labels = (
        torch.zeros(len(rows.answer), longest, dtype=torch.long),
        torch.full((len(rows.answer), longest), IGNORED),
    )
    mask = torch.zeros_like(ids)
    for i, length in enumerate(rows.lengths):
        begin = 0 if side == "right" else longest - length
        tokens = torch.from_numpy(rows.tokens[rows.start[i] : rows.start[i + 1]]).long()
        ids[i, begin : begin + length], mask[i, begin : begin + length] = tokens, 1
        labels[i, begin + length - rows.answer[i] : begin + length] = tokens[-rows.answer[i] :]
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("capacity", [0, 40])
def test_loss_and_gradients_equal_the_plain_ones(name, capacity):
    assert_loss_and_gradients_equal(random_model(name), random_rows(9), capacity)


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="the Industrial data set is not beside the project")
@pytest.mark.parametrize("capacity", [0, 200])
def test_loss_and_gradients_equal_the_plain_ones_on_real_rows(capacity):
    sids, items, train = industrial()
    tokenizer = smollm2_tokenizer()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(codebook_tokens(sids))
    pairs = sft_pairs(dict.fromkeys(data.parse_tasks(DEFAULT_TASKS), 1), train, items, PROMPTS, 0)
    rows = tokenize(pairs[:: len(pairs) // 12], tokenizer, "", "; ").trimmed(150)
    config = copy.deepcopy(ARCHITECTURES["qwen2"])
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert_loss_and_gradients_equal(model, rows, capacity)


def assert_loss_and_gradients_equal(model, rows, capacity):
    expected, gradients = plain_loss_and_gradients(model, rows)

    lines = Lines(rows, capacity)
    batch = Collator(0, packed=capacity > 0)([*(lines[i] for i in range(len(lines))), []])
    labels, seen = batch.pop("labels"), []
    model.get_output_embeddings().register_forward_hook(lambda head, inputs, output: seen.append(tuple(output.shape)))
    model.zero_grad()
    outputs = sft.AnswerLogits(model).of(labels, lambda: model(**batch, use_cache=False))
    loss = sft.answer_loss(outputs, labels)
    loss.backward()
    assert seen == [(rows.answer.sum(), model.config.vocab_size)]  # no logits but the answers'
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    for parameter, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[parameter], atol=1e-6, rtol=1e-5)


def train(tmp_path, model, rows, valid=None, capacity=0, **arguments):
    """Two epochs of SFTTrainer on given rows; returns the trainer."""
    lines = Lines(rows, capacity)
    args = sft.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, num_train_epochs=2, learning_rate=1e-2, seed=1, logging_steps=1,
        save_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True, **arguments,
    )  # fmt: skip
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    trainer = sft.SFTTrainer(
        model=model, args=args, train_dataset=lines, eval_dataset=Lines(valid or rows),
        data_collator=Collator(0, packed=capacity > 0), order=EpochOrder(lines.lengths, size, 1, by_length=True),
    )  # fmt: skip
    trainer.train()
    return trainer


def random_rows(n=21):
    generator = np.random.default_rng(3)
    rows = rows_of(generator.integers(6, 20, n).tolist(), generator.integers(1, 5, n).tolist())
    return rows._replace(tokens=generator.integers(1, 120, len(rows.tokens)).astype(np.int32))


def test_accumulation_does_not_change_the_run(tmp_path):
    runs = [
        train(tmp_path / "a", random_model("qwen2"), random_rows(), per_device_train_batch_size=8),
        train(tmp_path / "b", random_model("qwen2"), random_rows(), per_device_train_batch_size=1, gradient_accumulation_steps=8),
    ]  # fmt: skip
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_evaluation_is_the_mean_over_all_answer_tokens(tmp_path):
    rows = random_rows(11)
    trainer = train(tmp_path, random_model("gpt2"), rows, per_device_train_batch_size=4, per_device_eval_batch_size=4)
    measured = trainer.evaluate()["eval_loss"]
    trainer.model.eval()
    assert measured == pytest.approx(plain_loss_and_gradients(trainer.model, rows)[0], abs=1e-5)


# ------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])  # tied, untied, tied
def test_frozen_llm_trains_the_new_rows_alone(tmp_path, name):
    model = random_model(name)
    base = copy.deepcopy(model.state_dict())
    new = list(range(100, 120))
    trainer = train(
        tmp_path,
        train_rows_alone(model, new, "x"),
        random_rows(),
        per_device_train_batch_size=8,
        weight_decay=0.1,
    )
    states = [state["exp_avg"].shape for state in trainer.optimizer.state.values()]
    matrices = 2 if name == "llama" else 1
    assert states == [(20, 32)] * matrices  # optimizer state is for the new rows and nothing else
    merged = trainer.model.merge_and_unload().state_dict()
    assert merged.keys() == base.keys()
    embeddings = [key for key in base if base[key].shape == (120, 32)]
    for key in base:
        if key in embeddings:
            assert torch.equal(merged[key][:100], base[key][:100])
            assert (merged[key][100:] != base[key][100:]).any(dim=1).all()
        else:
            assert torch.equal(merged[key], base[key])


def test_freezing_without_new_tokens_is_refused():
    with pytest.raises(UserError, match="base already knows every SID token: there is no new row to train"):
        train_rows_alone(random_model("qwen2"), [], "base")


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
def test_lora_trains_adapters_and_new_rows_and_saves_them_merged(tmp_path, name, base_model):
    model = random_model(name)
    base = copy.deepcopy(model.state_dict())
    adapted = add_lora(model, list(range(100, 120)), 4, 8, 0.0, "all-linear")
    trainer = train(tmp_path / "run", adapted, random_rows(), per_device_train_batch_size=8)
    trainer.model.eval()
    ids = torch.arange(90, 118)[None]
    expected = trainer.model(input_ids=ids).logits
    trainer.processing_class = load_tokenizer(base_model, "x")
    save_trained(trainer, data.DEFAULT_TEMPLATE, tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    saved = plain.state_dict()
    assert saved.keys() == base.keys()
    inner = [key for key in base if ".0." in key and base[key].ndim == 2]  # the first layer's matrices
    assert inner and all(not torch.equal(saved[key], base[key]) for key in inner)
    for key in base:
        if base[key].shape == (120, 32):
            assert torch.equal(saved[key][:100], base[key][:100]) and not torch.equal(saved[key][100:], base[key][100:])


@pytest.mark.parametrize("name", ["qwen2", "llama"])
@pytest.mark.parametrize("adapt", [train_rows_alone, add_lora])
def test_search_with_adapters_is_search_with_merged_weights(tmp_path, name, adapt):
    arguments = ("x",) if adapt is train_rows_alone else (4, 8, 0.0, "all-linear")
    trainer = train(
        tmp_path,
        adapt(random_model(name), list(range(100, 120)), *arguments),
        random_rows(),
        per_device_train_batch_size=8,
    )
    trie = Trie.build([[100 + i, 110 + j] for i in range(5) for j in range(5)])
    ids = torch.arange(1, 13).view(2, 6)
    trainer.model.eval()
    found = beam_search(trainer.model, trie, ids, torch.ones_like(ids), 8)
    merged = beam_search(trainer.model.merge_and_unload(), trie, ids, torch.ones_like(ids), 8)
    assert torch.equal(found.row, merged.row)
    torch.testing.assert_close(found.score, merged.score, atol=1e-5, rtol=1e-5)


def test_lora_names_a_module_that_is_not_there():
    with pytest.raises(UserError, match="--lora_target_modules nonsense"):
        add_lora(random_model("qwen2"), [100], 4, 8, 0.0, "nonsense")


def test_rows_start_from_their_items_text(base_model, world):
    tokenizer, model = load_tokenizer(base_model, "x"), new_model(base_model, "x")
    items = Items(read_index(world.index), read_titles(world.items))
    add_tokens(model, tokenizer, codebook_tokens(items.sids), items)
    weight = model.get_input_embeddings().weight
    carriers = [i for i, sid in enumerate(items.sids) if "<b_2>" in sid]
    means = [weight[tokenizer(items.titles[i], add_special_tokens=False)["input_ids"]].mean(0) for i in carriers]
    row = weight[tokenizer.convert_tokens_to_ids("<b_2>")]
    torch.testing.assert_close(row, torch.stack(means).mean(0), atol=1e-6, rtol=1e-5)
    unused = weight[tokenizer.convert_tokens_to_ids("<b_3>")]  # K = 4 codes a level, of which level b uses three
    assert unused.abs().sum() > 0 and not torch.equal(unused, row)


# ------------------------------------------------------------------------------------------------ tasks


def example_table() -> str:
    """What every task makes of one sample, as the README shows it."""
    sids = ["<a_1><b_7><c_2>", "<a_1><b_3><c_9>", "<a_4><b_0><c_5>"]
    items = Items(sids, ["Desk lamp", "Light bulb", "Picture hook"])
    sample = {"user": ["u"], "history": [[0, 1]], "target": [2], "preference": ["Bright rooms."]}
    sequences = pl.DataFrame(sample)
    prompts = Prompts(category="Office_Products")
    lines = ["| task | prompt | answer |", "|---|---|---|"]
    for name, pairs in SFT_TASKS.items():
        prompt, answer = next(iter(pairs(sequences, items, prompts)))
        lines.append(f"| `{name}` | `{prompt.encode('unicode_escape').decode()}` | `{answer}` |")
    return "\n".join(lines)


def test_readme_shows_the_tasks_as_they_are():
    assert example_table() in (ROOT / "README.md").read_text(encoding="utf-8"), f"README.md wants\n{example_table()}"


def test_preferences_ask_and_answer_only_where_there_are_any(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"u1": " likes\n lamps "}))
    sequences = pl.DataFrame({"user": ["u0", "u1"], "history": [[0], [1]], "target": [1, 0]})
    items = Items(["<a_0>", "<a_1>"], ["x", "y"])
    joined = sequences.join(data.read_preferences(tmp_path / "p.json"), on="user", how="left")
    weights = {"sid_seq2preference": 1, "preference2sid": 1}
    to_text, to_sid = sft_pairs(weights, joined, items, PROMPTS, 0)
    assert "<a_1>" in to_text[0] and to_text[1] == "likes lamps" and "likes lamps" in to_sid[0] and to_sid[1] == "<a_0>"
    with pytest.raises(UserError, match="need --user_preference_file"):
        sft_pairs(weights, sequences, items, PROMPTS, 0)
    with pytest.raises(UserError, match="user u1's text holds <a_0>"):
        sft_pairs(weights, joined.with_columns(preference=pl.lit("wants <a_0>")), items, PROMPTS, 0)
    (tmp_path / "p.json").write_text(json.dumps({"u1": ["lamps"]}))
    with pytest.raises(UserError, match="user 'u1' has .*expected a text"):
        data.read_preferences(tmp_path / "p.json")


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"freeze_LLM": True, "use_lora": True}, "exclude each other"),
        ({"freeze_LLM": True, "train_from_scratch": True}, "random weights"),
        ({"sid_init": "zeros"}, "--sid_init zeros: expected mean or text"),
        ({"report_to": "paper"}, "--report_to paper"),
    ],
)
def test_options_that_cannot_work(flags, message):
    with pytest.raises(UserError, match=message):
        sft.Options(**flags).check()


def test_metric_that_the_beams_cannot_give(world, policy):
    train = read_sequences(world.train, policy.items.sids, "train_file")
    options = sft.Options(metric_for_best_model="HR@50", eval_beams=20)
    with pytest.raises(UserError, match=r"--metric_for_best_model HR@50: expected eval_loss or, with 20 beams"):
        sft.build_validation(options, policy.items, train, train, PROMPTS, policy.tokenizer)


def test_rows_longer_than_the_models_positions_are_refused():
    from minionerec.language_model import memory as preflight

    rows = rows_of([300])
    order = SimpleNamespace()
    with pytest.raises(
        UserError, match="the longest row has 300 tokens, the model 256 positions; lower --cutoff_len to 256"
    ):
        preflight.check_and_print(random_model("gpt2"), [], Lines(rows), order, None)


# ------------------------------------------------------------------------------------------------ the whole stage


@pytest.mark.parametrize("name, tokenizer", [("llama", "smollm2"), ("gpt2", "smollm2"), ("qwen2", "qwen2.5")])
def test_any_causal_lm_folder_is_a_base_model(world, tmp_path, name, tokenizer):
    tokenizer = real_tokenizer(tokenizer)
    config = copy.deepcopy(ARCHITECTURES[name])
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    files = {
        "train_file": world.train,
        "eval_file": world.valid,
        "sid_index_path": world.index,
        "item_meta_path": world.items,
    }
    files |= {"base_model": tmp_path / "base", "output_dir": tmp_path / "sft", "cache_dir": tmp_path / "cache"}
    options = {
        "batch_size": 32,
        "micro_batch_size": 16,
        "num_epochs": 1,
        "eval_step": 0.5,
        "sft_tasks": "sid_seq,sid2title",
    }
    options |= {"metric_for_best_model": "NDCG@10", "sid_init": "text", "category": "Toys_and_Games"}
    sft.main(sft.Options(**{key: str(value) for key, value in files.items()}, **options))
    saved, base = load_file(tmp_path / "sft" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    assert saved.keys() == base.keys() and any(not torch.equal(saved[key], base[key]) for key in base)
    again = AutoTokenizer.from_pretrained(tmp_path / "sft")
    assert len(again("<a_3><b_0><c_2>", add_special_tokens=False)["input_ids"]) == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
