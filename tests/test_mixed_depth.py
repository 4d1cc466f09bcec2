"""SIDs of mixed depth, where only colliding items have an extra token, through every stage after SID construction.

Invariants: conversion, data, decoding and metrics keep whole SIDs; each item of either depth is found once; scores equal
a plain forward pass token by token.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import N_ITEMS, run_stage

import convert_dataset
from data import Prompts, load, next_sid_prompts, parse_tasks, rl_rows, sft_pairs
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.sids import codebook_tokens, read_index
from minionerec.decoding.engine import TransformersEngine, recommend
from minionerec.evaluation import metrics
from minionerec.language_model.checkpoints import load_model, load_tokenizer
from minionerec.language_model.new_tokens import add_tokens
from rq.collisions import extra_token
from rq.index_file import read_codes, write_index


@pytest.fixture(scope="module")
def mixed_world(world, tmp_path_factory):
    """The small world, with an extra token for its colliding items."""
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

    data = load(info_file=mixed_world / "info" / "toy.txt", train=mixed_world / "train" / "toy.csv")
    items, rows = data.items, data.train
    assert items.sids == sids
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
    found, scores = recommend(
        TransformersEngine(model, trie, 0), tokenizer, columns["prompt"][:3], N_ITEMS, batch_size=2
    )
    assert (np.sort(found, axis=1) == np.arange(N_ITEMS)).all(), "every item once, of either depth"
    for prompt, best, own in zip(columns["prompt"][:3], found, scores, strict=True):  # scores token by token
        for row in (5, 6, 7):
            start, sid = tokenizer(prompt)["input_ids"], tokenizer(catalog.sids[row])["input_ids"]
            assert len(sid) == depths[row]
            logits = model(torch.tensor([start + sid])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(sid)[:, None]).sum().item()
            assert own[best.tolist().index(row)] == pytest.approx(expected, abs=1e-3)
    sid_ranks, item_ranks = metrics.sid_and_item_ranks(found, [5, 6, 7], catalog)
    expected = [best.tolist().index(target) for best, target in zip(found, [5, 6, 7], strict=True)]
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
