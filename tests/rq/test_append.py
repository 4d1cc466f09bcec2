"""Items added to a catalog.

Invariants: old SIDs are kept; new items take free SIDs that use only tokens of the old tokenizer; no SID becomes a
prefix; an item that a checkpoint has never seen can be recommended after training on rows with its SID.
"""

import numpy as np
import pytest
import torch
from rq_helpers import index, train

from minionerec.catalog.catalog import Catalog
from minionerec.catalog.sids import codebook_tokens, read_index
from minionerec.common.errors import UserError
from minionerec.decoding.beam_search import beam_search, left_pad
from minionerec.language_model.checkpoints import load_model, load_tokenizer
from minionerec.language_model.new_tokens import add_tokens
from rq.append import append_codes, known_codes
from rq.codebooks import CodebookFile, write_codebooks
from rq.index_file import to_sids
from rq.models.rq import Codebooks

BOOKS = [np.array([[0.0], [10.0], [20.0], [30.0]]), np.array([[0.0], [1.0], [2.0], [3.0]])]
MODEL = Codebooks([torch.from_numpy(book).float() for book in BOOKS])


def appended(old_codes, old_values, new_values, mode="nearest_free", **options):
    """SIDs of the new items, after a check that old ones are as they were."""
    values = torch.tensor([*old_values, *new_values])[:, None]
    codes = append_codes(MODEL, values, np.array(old_codes), mode, **options)
    np.testing.assert_array_equal(codes[: len(old_codes)], old_codes)
    Catalog(["".join(sid) for sid in to_sids(codes)])  # refuses prefixes
    return codes[len(old_codes) :].tolist()


OLD = ([[0, 0], [0, 3], [1, 1], [3, 3]], [0.0, 3.0, 11.0, 33.0])


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("nearest_free", [21.0], [[2, 1]]),  # its nearest codes
        ("nearest_free", [0.2], [[0, 1]]),  # <b_0> is an old item's
        ("nearest_free", [0.2, 0.2], [[0, 1], [0, 2]]),  # and then a new one's
        ("extra_token", [0.2, 21.0], [[0, 1], [2, 1]]),  # no token may follow an old SID
        ("none", [0.2, 0.2], [[0, 0], [0, 0]]),
    ],
)
def test_appended_items_take_what_is_free(mode, values, expected):
    assert appended(*OLD, values, mode) == expected


# Items 0 and 1 carry extra tokens; 2 and 3 do not.
MIXED = ([[0, 0, 0], [0, 0, 1], [1, 1, -1], [3, 3, -1]], [0.0, 0.0, 11.0, 33.0])


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("extra_token", [0.2, 0.1], [[0, 0, 2], [0, 0, 3]]),  # the next extra tokens
        ("extra_token", [0.2, 0.1, 0.1], [[0, 0, 2], [0, 0, 3], [0, 1, -1]]),  # there are no more: K = 4
        ("extra_token", [11.0], [[1, 0, -1]]),  # a complete SID is there: the nearest free code
        ("nearest_free", [0.2], [[0, 1, -1]]),
        ("none", [0.2, 11.0], [[0, 1, -1], [1, 1, -1]]),  # a prefix cannot be shared, a SID can
    ],
)
def test_appended_items_beside_extra_tokens(mode, values, expected):
    assert appended(*MIXED, values, mode) == expected


def test_appended_items_use_known_tokens_alone():
    """With the largest code 1 in use, the old tokenizer has <_0> and <_1> only."""
    old = [[0, 0], [0, 1], [1, 1]]
    known = known_codes(np.array(old), [4, 4], used_only=False)
    assert [mask.tolist() for mask in known] == [[True, True, False, False]] * 2
    assert appended(old, [0.0, 1.0, 11.0], [33.0]) == [[1, 0]]
    assert appended([[0, 0], [3, 3]], [0.0, 33.0], [21.0]) == [[2, 1]]
    assert appended([[0, 0], [3, 3]], [0.0, 33.0], [21.0], used_only=True) == [[3, 0]]


def test_appended_items_find_no_code():
    old = ([[0, 0], [0, 1], [0, 2], [0, 3]], [0.0, 1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="item 4: every known code after its prefix <a_0> is taken"):
        appended(*old, [0.0])


@pytest.mark.parametrize(
    ("old", "values", "mode", "message"),
    [
        (OLD[0], [*OLD[1], 5.0], "sinkhorn", "--append keeps old SIDs"),
        (OLD[0], OLD[1], "nearest_free", "the index has 4 items and the embeddings 4 rows"),
        ([[0], [1], [2], [3]], [*OLD[1], 5.0], "nearest_free", "not made by this quantizer"),
        ([[0, 4], [0, 3], [1, 1], [3, 3]], [*OLD[1], 5.0], "nearest_free", "not made by this quantizer"),
        ([[3, 0], [2, 3], [0, 1], [1, 3]], [*OLD[1], 5.0], "nearest_free", "not made by this quantizer"),
    ],
)
def test_bad_append(old, values, mode, message):
    with pytest.raises(UserError, match=message):
        append_codes(MODEL, torch.tensor(values)[:, None], np.array(old), mode)


def quantizer(kind, folder, embeddings):
    """A trained model or codebooks: what generate_indices reads."""
    np.save(folder / "D.npy", embeddings)
    if kind == "rqvae":
        train(folder / "D.npy", folder / "rqvae", num_emb_list=[8, 8, 8], epochs=3)
        return folder / "rqvae"
    books = np.random.default_rng(0).normal(size=(3, 8, embeddings.shape[1]))
    write_codebooks(folder / "books.npz", CodebookFile(books, np.zeros((0, 3))))
    return folder / "books.npz"


@pytest.mark.parametrize("kind", ["rqvae", "codebooks"])
def test_appended_item_is_recommended(kind, tmp_path, base_model):
    """By a model whose tokenizer knows the old catalog only, after training on rows with the new SID."""
    embeddings = np.random.default_rng(1).normal(size=(60, 6)).astype(np.float32)
    ckpt = quantizer(kind, tmp_path, embeddings[:50])
    old = read_index(index(ckpt, tmp_path / "D.npy", tmp_path / "old.index.json"))
    np.save(tmp_path / "all.npy", embeddings)
    more = {"append": str(tmp_path / "old.index.json")}
    new = read_index(index(ckpt, tmp_path / "all.npy", tmp_path / "new.index.json", **more))
    assert new[:50] == old and len(set(new)) == 60

    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(base_model, "base_model"), load_model(base_model, "base_model")
    add_tokens(model, tokenizer, codebook_tokens(old))
    size = len(tokenizer)
    trie = Catalog(new).trie(tokenizer)  # refuses a token that the tokenizer does not know
    prompt, answer = tokenizer("Item number 7")["input_ids"], tokenizer(new[57])["input_ids"]
    assert len(answer) == 3, "one token per level"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    row = torch.tensor([prompt + answer])
    labels = row.masked_fill(torch.arange(row.shape[1]) < len(prompt), -100)
    for _ in range(30):
        model(input_ids=row, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    beams = beam_search(model.eval(), trie, *left_pad([prompt], 0, "cpu"), num_beams=5)
    assert beams.row[0, 0] == 57 and len(tokenizer) == size
