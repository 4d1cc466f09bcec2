"""What the catalog makes of SIDs: items appended later, SIDs of mixed depth through every stage, quality reports."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import N_ITEMS, run_stage

import convert_dataset
from data import Prompts, next_sid_prompts, parse_tasks, read_sequences, rl_rows, sft_pairs
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.items import read_info
from minionerec.catalog.sids import codebook_tokens, read_index
from minionerec.common.errors import UserError
from minionerec.decoding.beam_search import beam_search, left_pad, recommend
from minionerec.evaluation import metrics
from minionerec.language_model.checkpoints import load_model, load_tokenizer
from minionerec.language_model.new_tokens import add_tokens
from rq import generate_indices, rqvae, sid_report
from rq.append import append_codes, known_codes
from rq.codebooks import CodebookFile, write_codebooks
from rq.collisions import extra_token
from rq.index_file import read_codes, to_sids, write_index
from rq.models.rq import Codebooks
from rq.quality import quality

# ---- items added later

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
        ("extra_token", [0.2, 21.0], [[0, 1], [2, 1]]),  # behind an old SID no token may come
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
        ("extra_token", [11.0], [[1, 0, -1]]),  # a whole SID stands there: the nearest free code
        ("nearest_free", [0.2], [[0, 1, -1]]),
        ("none", [0.2, 11.0], [[0, 1, -1], [1, 1, -1]]),  # a prefix cannot be shared, a SID can
    ],
)
def test_appended_items_beside_extra_tokens(mode, values, expected):
    assert appended(*MIXED, values, mode) == expected


def test_appended_items_use_known_tokens_alone():
    """With the largest code 1 in use, the old tokenizer has <_0> and <_1> alone."""
    old = [[0, 0], [0, 1], [1, 1]]
    known = known_codes(np.array(old), [4, 4], used_only=False)
    assert [mask.tolist() for mask in known] == [[True, True, False, False]] * 2
    assert appended(old, [0.0, 1.0, 11.0], [33.0]) == [[1, 0]]
    assert appended([[0, 0], [3, 3]], [0.0, 33.0], [21.0]) == [[2, 1]]
    assert appended([[0, 0], [3, 3]], [0.0, 33.0], [21.0], used_only=True) == [[3, 0]]


def test_appended_items_find_no_code():
    old = ([[0, 0], [0, 1], [0, 2], [0, 3]], [0.0, 1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="item 4: every known code behind its prefix <a_0> is taken"):
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


def quantizers(folder, embeddings):
    """A checkpoint of each kind of file that generate_indices reads, on the same embeddings."""
    rng = np.random.default_rng(0)
    data = folder / "D.npy"
    np.save(data, embeddings)
    rqvae.main(
        rqvae.Options(
            data_path=str(data), ckpt_dir=str(folder / "rqvae"), layers=[16], e_dim=4, num_emb_list=[8, 8, 8], epochs=3,
            warmup_epochs=0, device="cpu",
        )
    )  # fmt: skip
    books = [rng.normal(size=(8, embeddings.shape[1])) for _ in range(3)]
    write_codebooks(folder / "books.npz", CodebookFile(books, np.zeros((0, 3)), {}))
    return [folder / "rqvae", folder / "books.npz"]


def index(ckpt, data, output, **options):
    generate_indices.main(
        generate_indices.Options(
            ckpt_path=str(ckpt), data_path=str(data), output_file=str(output), device="cpu", **options
        )
    )
    return read_index(output)


@pytest.mark.parametrize("kind", [0, 1])
def test_appended_item_is_recommended(kind, tmp_path, base_model):
    """By a model whose tokenizer knows the old catalog alone, after training on rows with the new SID."""
    embeddings = np.random.default_rng(1).normal(size=(60, 6)).astype(np.float32)
    ckpt = quantizers(tmp_path, embeddings[:50])[kind]
    old = index(ckpt, tmp_path / "D.npy", tmp_path / "old.index.json")
    np.save(tmp_path / "all.npy", embeddings)
    new = index(ckpt, tmp_path / "all.npy", tmp_path / "new.index.json", append=str(tmp_path / "old.index.json"))
    assert new[:50] == old and len(set(new)) == 60

    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(base_model, "base_model"), load_model(base_model, "base_model")
    add_tokens(model, tokenizer, codebook_tokens(old))
    size = len(tokenizer)
    trie = Catalog(new).trie(tokenizer)  # refuses a token that the tokenizer does not know
    prompt, answer = tokenizer("Item number 7")["input_ids"], tokenizer(new[57])["input_ids"]
    assert len(answer) == 3, "a token a level"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    row = torch.tensor([prompt + answer])
    labels = row.masked_fill(torch.arange(row.shape[1]) < len(prompt), -100)
    for _ in range(30):
        model(input_ids=row, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    beams = beam_search(model.eval(), trie, *left_pad([prompt], 0, "cpu"), num_beams=5)
    assert beams.row[0, 0] == 57 and len(tokenizer) == size


# ---- SIDs of mixed depth through the stages


@pytest.fixture(scope="module")
def mixed_world(world, tmp_path_factory):
    """The small world, its colliding items told apart by an extra token."""
    folder = tmp_path_factory.mktemp("mixed")
    for path in world.folder.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    write_index(folder / "toy.index.json", extra_token(read_codes(world.index, "index")))
    convert_dataset.main(
        convert_dataset.Options(dataset_name="toy", data_dir=str(folder), output_dir=str(folder), max_history=10)
    )
    return folder


def test_mixed_depth_survives_conversion_data_decoding_and_metrics(mixed_world, base_model):
    sids = read_index(mixed_world / "toy.index.json")
    depths = [sid.count("<") for sid in sids]
    assert depths == [4 if item in (5, 6) else 3 for item in range(N_ITEMS)] and len(set(sids)) == N_ITEMS

    items = read_info(mixed_world / "info" / "toy.txt")
    assert items.sids == sids
    rows = read_sequences(mixed_world / "train" / "toy.csv", items.sids, "train_file")
    prompts = Prompts(category="toys")
    answers = {answer for _, answer in sft_pairs(parse_tasks("sid_seq,title2sid"), rows, items, prompts, seed=0)}
    assert {sids[5], sids[6]} <= answers <= set(sids)
    columns = rl_rows(rows, items, prompts)
    assert columns["target_sid"] == [sids[target] for target in columns["target_item"]]
    assert any(sids[5] in prompt for prompt in next_sid_prompts(rows, items, prompts))

    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(base_model, "base_model"), load_model(base_model, "base_model")
    add_tokens(model, tokenizer, codebook_tokens(sids))
    catalog = Catalog(sids)
    trie = catalog.trie(tokenizer)
    assert trie.depth == 4
    leaves, scores = recommend(model, tokenizer, trie, columns["prompt"][:3], N_ITEMS, batch_size=2)
    assert (np.sort(leaves, axis=1) == np.arange(N_ITEMS)).all(), "every item once, of either depth"
    for prompt, best, own in zip(columns["prompt"][:3], leaves, scores, strict=True):  # scores token by token
        for leaf in (5, 6, 7):
            start, sid = tokenizer(prompt)["input_ids"], tokenizer(catalog.sids[leaf])["input_ids"]
            assert len(sid) == depths[leaf]
            logits = model(torch.tensor([start + sid])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(sid)[:, None]).sum().item()
            assert own[best.tolist().index(leaf)] == pytest.approx(expected, abs=1e-3)
    sid_ranks, item_ranks = metrics.sid_and_item_ranks(leaves, [5, 6, 7], catalog)
    expected = [best.tolist().index(target) for best, target in zip(leaves, [5, 6, 7], strict=True)]
    assert sid_ranks.tolist() == item_ranks.tolist() == expected


@pytest.mark.slow
def test_mixed_depth_survives_sft_rl_and_evaluation(mixed_world, base_model, tmp_path):
    files = {
        "TRAIN_FILE": mixed_world / "train" / "toy.csv",
        "EVAL_FILE": mixed_world / "valid" / "toy.csv",
        "TEST_DATA_PATH": mixed_world / "test" / "toy.csv",
        "INFO_FILE": mixed_world / "info" / "toy.txt",
        "SID_INDEX_PATH": mixed_world / "toy.index.json",
        "ITEM_META_PATH": mixed_world / "toy.item.json",
        "CATEGORY": "Toys_and_Games",
        "NPROC": 1,
    }
    sft = {"BASE_MODEL": base_model, "TRAIN_FROM_SCRATCH": "True", "OUTPUT_DIR": tmp_path / "sft", "NUM_EPOCHS": 1}
    sft |= {"BATCH_SIZE": 16, "MICRO_BATCH_SIZE": 8, "LEARNING_RATE": 5e-3, "EVAL_STEP": 0.5}
    run_stage("sft.sh", env=files | sft)
    rl = {"MODEL_PATH": tmp_path / "sft", "OUTPUT_DIR": tmp_path / "rl", "NUM_TRAIN_EPOCHS": 1, "EVAL_STEP": 0.5}
    rl |= {"NUM_GENERATIONS": 4, "TRAIN_BATCH_SIZE": 16, "GRADIENT_ACCUMULATION_STEPS": 1, "TEST_BEAM": 10}
    rl |= {"REWARD_TYPE": "ranking", "METRIC_FOR_BEST_MODEL": "NDCG@10", "LEARNING_RATE": 1e-3}
    run_stage("rl.sh", env=files | rl)
    evaluation = {"BASE_MODEL": tmp_path / "rl", "RESULT_JSON_DATA": tmp_path / "out.json", "NUM_BEAMS": N_ITEMS}
    run_stage("evaluate.sh", env=files | evaluation)
    predictions = json.loads((tmp_path / "out.json").read_text())
    sids = read_index(mixed_world / "toy.index.json")
    assert all(sorted(row["predict"]) == sorted(sids) for row in predictions), "every SID of either depth, once"
    result = json.loads((tmp_path / "out.metrics.json").read_text())
    assert result["sid"] == result["item"], "no SID is shared"


# ---- index files and reports


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"0": ["<a_1>"], "1": ["<a_1>", "<b_0>"]}, "item 0 has SID <a_1>, a prefix of item 1's <a_1><b_0>"),
        ({"0": ["<b_1>"]}, "item 0 has <b_1> at level 0, expected <a_1> there"),
        ({"0": ["<a_1>"], "2": ["<a_2>"]}, "item 1 is missing"),
        ({"0": "a_1"}, "expected a list like"),
    ],
)
@pytest.mark.parametrize("user", ["report", "append"])
def test_bad_index(user, index, message, tmp_path):
    path = tmp_path / "bad.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as error:
        if user == "report":
            sid_report.main(sid_report.Options(index=[str(path)]))
        else:
            np.save(tmp_path / "D.npy", np.random.default_rng(0).normal(size=(9, 2)))
            write_codebooks(tmp_path / "b.npz", CodebookFile([np.eye(4, 2), np.eye(4, 2)], np.zeros((0, 2)), {}))
            generate_indices.main(
                generate_indices.Options(
                    ckpt_path=str(tmp_path / "b.npz"),
                    data_path=str(tmp_path / "D.npy"),
                    append=str(path),
                    output_file=str(tmp_path / "x.index.json"),
                )
            )
    assert str(path) in str(error.value) and not (tmp_path / "x.index.json").exists()


def test_fitted_error_of_hand_set_codes():
    x = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    variance = sum((v - 6) ** 2 for v in (0, 2, 10, 12))
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert sid_report.fitted_error(x, codes) == pytest.approx([4 / variance, 0], abs=1e-6)
    mixed = np.column_stack([codes[:, :1], [0, 1, -1, -1]])
    assert sid_report.fitted_error(x, mixed) == pytest.approx([4 / variance], abs=1e-6)


def test_report_beside_the_index_and_side_by_side(tmp_path, capsys):
    embeddings = np.random.default_rng(1).normal(size=(90, 6)).astype(np.float32)
    ckpt = quantizers(tmp_path, embeddings)[1]
    paths = []
    for mode in ("none", "extra_token"):
        paths.append(tmp_path / f"{mode}.index.json")
        index(ckpt, tmp_path / "D.npy", paths[-1], collision=mode)
    report = json.loads((tmp_path / "extra_token.index.quality.json").read_text())
    model, _ = generate_indices.load_model(ckpt)
    x = torch.from_numpy(embeddings)
    nearest = model.encode(x).codes
    left = [(x - model.quantizer.decode(nearest[:, :depth])).square().sum() for depth in (1, 2, 3)]
    expected = torch.stack(left) / (x - x.mean(0)).square().sum()
    assert report["before"]["reconstruction_error"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert report["before"] | quality(nearest.numpy()) == report["before"]
    assert report["after"]["collision_rate"] == 0 < report["before"]["collision_rate"]
    assert sum(int(n) * c for n, c in report["before"]["items_per_sid"].items()) == 90

    output = tmp_path / "compare.json"
    options = {"index": [str(path) for path in paths], "output_file": str(output)}
    sid_report.main(sid_report.Options(**options, data_path=str(tmp_path / "D.npy")))
    header, *lines = capsys.readouterr().out.splitlines()[-4:-1]
    assert header.startswith("index") and [line.split()[0] for line in lines] == options["index"]
    assert json.loads(output.read_text())[str(paths[1])] == report
    for path in (output.with_suffix(".png"), tmp_path / "none.index.quality.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000

    # The figures of an index from elsewhere: without what stands beside it, and without trusting what is stale.
    shutil.copy(tmp_path / "none.index.quality.json", tmp_path / "extra_token.index.quality.json")
    stale = sid_report.report_of(paths[1], x)
    assert "before" not in stale and "reconstruction_error" not in stale["after"]
    assert stale["after"]["fitted_error"] == report["after"]["fitted_error"]


def test_report_from_the_command_line(tmp_path):
    write_index(tmp_path / "A.index.json", np.array([[0, 0], [0, 0], [0, 1]]))
    done = run_stage("rq.sid_report", tmp_path / "A.index.json")
    assert "0.3333" in done.stdout
    done = run_stage("rq.sid_report", check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "one or more index files" in done.stderr
