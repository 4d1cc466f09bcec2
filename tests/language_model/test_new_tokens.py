"""SID tokens added to a tokenizer and a model.

Invariants: every SID is its level tokens, as a whole text and in a prompt, and decodes to itself, whatever the tokenizer's
normalizer; ids come from the tokenizer and none is taken twice; old rows stay bit-identical; new rows follow the
distribution of the old ones or the text of their items; a new token's bias is the mean of the old ones.
"""

import json

import numpy as np
import pytest
import torch
from language_model.small_models import WITH_BIAS, random_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minionerec.catalog.items import Items, read_titles
from minionerec.catalog.sids import codebook_tokens, read_index
from minionerec.common.errors import UserError
from minionerec.language_model import new_tokens
from minionerec.language_model.checkpoints import load_model, load_tokenizer, new_model
from minionerec.language_model.new_tokens import (
    add_tokens,
    draw_like,
    embedding_matrices,
    require_sid_tokens,
    start_from_codebooks,
)  # fmt: skip

SIDS = ["<a_0><b_1>", "<a_1><b_0>", "<a_1><b_1>"]
TOKENS = ["<a_0>", "<a_1>", "<b_0>", "<b_1>"]


def tokenizer_of(normalizer=None, pre_tokenizer=None, vocabulary=None):
    """A character tokenizer with an underscore for a blank, as sentencepiece models have."""
    letters = ["<unk>", "</s>", *"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>_:;.,\n"]
    backend = Tokenizer(
        models.BPE(vocabulary or {letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>")
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


NORMALIZERS = {
    "none": dict,
    "prepend": lambda: {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
    "lowercase": lambda: {"normalizer": normalizers.Lowercase()},
    "strip accents": lambda: {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])},
    "regex": lambda: {"normalizer": normalizers.Replace(Regex("[_<>]"), " ")},  # would remove what makes a SID token
    "metaspace": lambda: {"pre_tokenizer": pre_tokenizers.Metaspace()},
    "digits": lambda: {"pre_tokenizer": pre_tokenizers.Digits(individual_digits=True)},
}


@pytest.mark.parametrize("name", NORMALIZERS)
def test_sids_survive_every_normalizer(name, tmp_path):
    tokenizer = tokenizer_of(**NORMALIZERS[name]())
    add_tokens(random_model("qwen2"), tokenizer, TOKENS)
    require_sid_tokens(tokenizer, SIDS)
    for sid in SIDS:
        ids = tokenizer(f"Next: {sid} and", add_special_tokens=False)["input_ids"]
        assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token in TOKENS] == [sid[:5], sid[5:]]
    tokenizer.save_pretrained(tmp_path)
    require_sid_tokens(load_tokenizer(tmp_path, "base_model"), SIDS)


def test_sids_that_a_normalizer_splits_are_refused():
    tokenizer = tokenizer_of(**NORMALIZERS["prepend"]())
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in TOKENS])
    with pytest.raises(
        UserError, match=r"the tokenizer splits <a_0><b_1> in .*expected the tokens \['<a_0>', '<b_1>'\]"
    ):
        require_sid_tokens(tokenizer, SIDS)


def test_of_many_sids_one_for_each_token_is_tried(monkeypatch):
    monkeypatch.setattr(new_tokens, "CHECKED", 3)
    tokenizer = tokenizer_of(**NORMALIZERS["prepend"]())
    good = [f"<{letter}_{code}>" for letter in "ab" for code in range(10)]
    tokenizer.add_tokens([AddedToken(token, normalized=token == "<a_7>") for token in good])
    sids = [f"<a_{a}><b_{b}>" for a in range(10) for b in range(10)]
    require_sid_tokens(tokenizer, [sid for sid in sids if "<a_7>" not in sid])
    with pytest.raises(UserError, match=r"the tokenizer splits <a_7><b_0>"):
        require_sid_tokens(tokenizer, sids)


@pytest.mark.parametrize("how", ["special", "extra_special_tokens", "normalized", "lstrip"])
def test_tokens_of_a_foreign_checkpoint_become_ordinary_on_loading(how, tmp_path):
    tokenizer = tokenizer_of(**NORMALIZERS["prepend"]())
    if how == "extra_special_tokens":
        tokenizer.add_special_tokens({"extra_special_tokens": TOKENS})
    else:
        tokenizer.add_tokens([AddedToken(token, **{"normalized": False} | {how: True}) for token in TOKENS])
    tokenizer.save_pretrained(tmp_path / "foreign")
    loaded = load_tokenizer(tmp_path / "foreign", "base_model")
    require_sid_tokens(loaded, SIDS)
    ids = loaded(SIDS[0], add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids, skip_special_tokens=True).replace(" ", "") == SIDS[0]
    loaded.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")  # also for a reader that repairs nothing
    require_sid_tokens(again, SIDS)
    assert not set(TOKENS) & set(again.all_special_tokens)


def test_special_tokens_are_refused_where_nobody_repaired_them():
    tokenizer = tokenizer_of()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in TOKENS])
    with pytest.raises(UserError, match="decodes the tokens of <a_0><b_1> to ''.*special=False"):
        require_sid_tokens(tokenizer, SIDS)


# ------------------------------------------------------------------------------------------------ ids


def holed(largest: int) -> PreTrainedTokenizerFast:
    """A tokenizer of four tokens with ids 0, 1, 2 and `largest`."""
    return tokenizer_of(vocabulary={"<unk>": 0, "</s>": 1, "a": 2, "b": largest})


def test_an_id_that_is_taken_is_refused():
    tokenizer = holed(5)  # the tokenizer counts on from 4
    with pytest.raises(UserError, match="gives <a_1> the id 5, which 'b' has.* has a hole below its largest id 5"):
        add_tokens(random_model("qwen2"), tokenizer, TOKENS)


def test_embeddings_are_sized_by_the_largest_id():
    tokenizer, model = holed(150), random_model("qwen2")  # the model has 120 rows
    new = add_tokens(model, tokenizer, TOKENS)
    assert new == [4, 5, 6, 7] == tokenizer.convert_tokens_to_ids(TOKENS)
    assert model.get_input_embeddings().weight.shape[0] == 151 == model.config.vocab_size


def test_padded_embeddings_never_shrink_and_tokens_are_new_once(base_model):
    tokenizer, model = load_tokenizer(base_model, "x"), random_model("qwen2", vocab_size=500)
    old = {name: weight.clone() for name, weight in model.state_dict().items()}
    first = len(tokenizer)
    new = add_tokens(model, tokenizer, TOKENS)
    assert new == list(range(first, first + 4)) and model.get_input_embeddings().weight.shape[0] == 500
    for name, weight in model.state_dict().items():
        changed = [row for row in range(len(weight)) if weight.ndim and not torch.equal(weight[row], old[name][row])]
        assert changed == (new if weight.shape[0] == 500 else [])
    assert add_tokens(model, tokenizer, TOKENS) == []


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("name", ["qwen2", "llama"])  # tied, untied
def test_new_rows_have_mean_and_covariance_of_the_old_ones(name, base_model):
    tokenizer, model = load_tokenizer(base_model, "x"), random_model(name, vocab_size=400)
    n_old = len(tokenizer)
    shape = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)) / 5
    with torch.no_grad():
        for weight in embedding_matrices(model):
            weight.copy_(torch.randn(weight.shape) @ shape + 3)
    new = add_tokens(model, tokenizer, [f"<a_{code}>" for code in range(6000)])
    for weight in embedding_matrices(model):
        old, drawn = weight[:n_old], weight[new]
        torch.testing.assert_close(drawn.mean(0), old.mean(0), atol=0.1, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), old.T.cov(correction=0), atol=0.12, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 20, 20_000])  # fewer rows than dimensions; several blocks
def test_samples_have_the_law_of_their_rows(rows):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 3
    drawn = draw_like(weight, range(rows), 50_000)
    torch.testing.assert_close(drawn.mean(0), weight.mean(0), atol=0.1, rtol=0)
    expected = weight.T.cov(correction=0) if rows > 1 else torch.zeros(8, 8)
    torch.testing.assert_close(drawn.T.cov(), expected, atol=0.02 * float(expected.diagonal().max()) + 1e-6, rtol=0)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of a tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        self.elements = max(self.elements, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


def test_memory_does_not_grow_with_new_tokens_times_vocabulary():
    weight = torch.randn(20_000, 16)
    with LargestTensor() as largest:
        assert draw_like(weight, range(20_000), 10_000).shape == (10_000, 16)
    assert largest.elements <= weight.numel()


def test_rows_start_from_the_text_of_their_items(base_model, world):
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


@pytest.mark.parametrize("padding", [0, 64])
@pytest.mark.parametrize("name", WITH_BIAS)
def test_the_bias_of_new_tokens_is_the_mean_of_the_old_ones(name, padding, base_model):
    tokenizer = load_tokenizer(base_model, "x")
    n_old = len(tokenizer)
    model = random_model(name, vocab_size=n_old + padding)
    bias = model.get_output_embeddings().bias
    with torch.no_grad():
        bias[n_old:] = -20.0  # spare entries of a padded vocabulary, pushed down in pre-training
    before = bias[:n_old].clone()
    new = add_tokens(model, tokenizer, TOKENS)
    bias = model.get_output_embeddings().bias
    assert torch.equal(bias[:n_old], before)
    torch.testing.assert_close(bias[new], before.mean().expand(4))


def test_a_model_of_the_saved_world_keeps_its_tokens(checkpoint_folder, policy):
    tokenizer, model = load_tokenizer(checkpoint_folder, "x"), load_model(checkpoint_folder, "x")
    assert add_tokens(model, tokenizer, codebook_tokens(policy.items.sids)) == []
    require_sid_tokens(tokenizer, policy.catalog.sids)
    added = json.loads((checkpoint_folder / "tokenizer.json").read_text())["added_tokens"]
    assert all(not token["normalized"] and not token["special"] for token in added if "_" in token["content"])


# ------------------------------------------------------------------------------------------------ codebooks


def codebooks(sizes, dim=12) -> list:
    rng = np.random.default_rng(0)
    return [(5 + rng.normal(size=(size, dim))).astype(np.float32) for size in sizes]


def test_codes_start_at_their_centroids(base_model, world):
    """The geometry of the centroids survives the projection; nothing else changes."""
    model, tokenizer = new_model(base_model, "base_model"), load_tokenizer(base_model, "base_model")
    tokens = codebook_tokens(read_index(world.index), used_only=False)
    new_ids = add_tokens(model, tokenizer, tokens)
    [weight] = embedding_matrices(model)
    before = weight.detach().clone()
    books = codebooks([256, 256, 256])
    start_from_codebooks(model, tokenizer, new_ids, books)
    old = sorted(set(range(len(weight))) - set(new_ids))
    assert torch.equal(weight[old], before[old])
    for letter, book in zip("abc", books, strict=True):
        ids = [tokenizer.convert_tokens_to_ids(t) for t in sorted(tokens) if t.startswith(f"<{letter}_")]
        codes = [int(tokenizer.convert_ids_to_tokens(id)[3:-1]) for id in ids]
        assert weight[ids].std().item() == pytest.approx(before[ids].std().item(), rel=0.2)
        distances = torch.pdist(weight[ids].detach()), torch.pdist(torch.from_numpy(book[codes]))
        assert torch.corrcoef(torch.stack(distances))[0, 1] > 0.5


def test_a_code_that_its_codebook_lacks_is_refused(base_model, world):
    model, tokenizer = new_model(base_model, "base_model"), load_tokenizer(base_model, "base_model")
    new_ids = add_tokens(model, tokenizer, ["<a_0>", "<a_3>", "<b_0>"])
    with pytest.raises(UserError, match=r"codebook_0 has 3 codes, and the index has <a_3>; expected the codebooks"):
        start_from_codebooks(model, tokenizer, new_ids, codebooks([3, 3]))


def test_levels_without_a_codebook_keep_their_rows(base_model):
    model, tokenizer = new_model(base_model, "base_model"), load_tokenizer(base_model, "base_model")
    new_ids = add_tokens(model, tokenizer, ["<a_0>", "<a_1>", "<b_0>", "<b_1>"])
    [weight] = embedding_matrices(model)
    before = weight.detach().clone()
    start_from_codebooks(model, tokenizer, new_ids, codebooks([3]))
    changed = [bool((weight[id] != before[id]).any()) for id in new_ids]
    assert changed == [True, True, False, False]


def test_tokens_that_the_model_had_keep_their_rows(base_model):
    model, tokenizer = new_model(base_model, "base_model"), load_tokenizer(base_model, "base_model")
    [known] = add_tokens(model, tokenizer, ["<a_0>"])
    new_ids = add_tokens(model, tokenizer, ["<a_0>", "<a_1>", "<a_2>"])
    [weight] = embedding_matrices(model)
    before = weight.detach().clone()
    start_from_codebooks(model, tokenizer, new_ids, codebooks([3]))
    assert torch.equal(weight[known], before[known]) and not torch.equal(weight[new_ids], before[new_ids])
