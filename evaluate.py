"""Stage 6: a checkpoint's HR, NDCG and MRR on a test CSV, by constrained beam search over the whole catalog.

    python evaluate.py --base_model output/sft --test_data_path test.csv --info_file info.txt --train_file train.csv \
        --category Video_Games --result_json_data output/predictions.json

Writes the predictions, each test row with its list `predict` (SIDs, best first), their items, titles and scores, as JSON
and as parquet, and beside them `*.metrics.json`: `{"rows", "item", "sid", "intervals", "coverage", "illegal", …}`. By
SID, any item that shares the target's SID is a hit; by item, only the target is.

Start it with torchrun to share the batches among processes. The batches are those of one process, so that the metrics
are the same to the last digit. Each part of a hundredth or less is kept in `*.parts/` until the end: a killed
evaluation, started again with the same options, computes only what is missing.
"""

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data import Prompts, next_sid_prompts, read_sequences, template_of
from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.items import Items, read_info
from minionerec.catalog.trie import Trie
from minionerec.common.devices import device_has_bf16
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, require_file, write_json
from minionerec.common.options import run
from minionerec.common.runs import begin
from minionerec.decoding.beam_search import length_batches, recommend_batch
from minionerec.decoding.lm_head import SPACES
from minionerec.evaluation import metrics
from minionerec.language_model.checkpoints import load_model, load_tokenizer

PARTS = 256  # at most so many part files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Options:
    base_model: str = HfArg(default="", help="folder of the checkpoint")
    test_data_path: str = HfArg(default="", help="test CSV")
    info_file: str = HfArg(default="", help="info file: the catalog")
    train_file: str = HfArg(default="", help="train CSV: orders items that share a SID by popularity; default: by id")
    category: str = HfArg(default="", help="what the prompts call the items")
    result_json_data: str = HfArg(default="output/predictions.json", help="where the predictions go")
    batch_size: int = HfArg(default=8, help="prompts a forward, at most")
    batch_tokens: int = HfArg(default=16384, help="tokens of prompts a forward, padding included, at most")
    num_beams: int = HfArg(default=50, help="beams: SIDs predicted for a row")
    space: str = HfArg(
        default="",
        help="vocab: scores over the whole vocabulary; catalog: over what may follow; default: as the checkpoint's RL",
    )
    exclude_seen: bool = HfArg(default=False, help="recommend no item of the row's own history")
    dtype: str = HfArg(default="", help="float32 or bfloat16; default: bfloat16 where a GPU has it")
    K: int = HfArg(default=0, help="predictions kept for each row in the JSON; 0: all")
    length_penalty: float = HfArg(default=0.0, help="scores are divided by length ** length_penalty")
    max_new_tokens: int = HfArg(default=256, help="at most this many tokens a SID; must hold the catalog's depth")
    max_history: int = HfArg(default=10, help="items of history in a prompt")
    prompt_template: str = HfArg(default="", help="wording of the prompts; default: the checkpoint's own")
    seed: int = HfArg(default=42, help="seed of the bootstrap intervals")
    sample: int = HfArg(default=-1, help="evaluate this many rows, drawn by seed; -1 for all")

    def check(self) -> None:
        for flag in ("base_model", "test_data_path", "info_file"):
            require_file(getattr(self, flag), flag)
        for flag in ("batch_size", "batch_tokens", "num_beams"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} {getattr(self, flag)}: expected at least 1")
        if self.space not in ("", *SPACES):
            raise UserError(f"--space {self.space}: expected one of {', '.join(SPACES)}")
        self.dtype = self.dtype or ("bfloat16" if device_has_bf16() else "float32")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}")


@dataclass
class Predictions:
    leaves: np.ndarray  # (rows, beams) rows of the catalog's SIDs, best first, -1 where there are no more
    scores: np.ndarray  # (rows, beams) nats


# ------------------------------------------------------------------------------------------------ data


def read(options: Options) -> tuple[Items, pl.DataFrame, Catalog, list[str]]:
    """Items, test rows, catalog, and the prompt of each row."""
    items = read_info(options.info_file)
    rows = read_sequences(options.test_data_path, items.sids, "test_data_path", options.max_history)
    if 0 <= options.sample < len(rows):
        rows = rows.sample(options.sample, seed=options.seed)
    popularity = None
    if options.train_file:
        train = read_sequences(options.train_file, items.sids, "train_file", options.max_history)
        popularity = target_counts(train, len(items.sids))
    prompts = Prompts(template_of(options.base_model, options.prompt_template), options.category)
    return items, rows, Catalog(items.sids, popularity), next_sid_prompts(rows, items, prompts)


# ------------------------------------------------------------------------------------------------ predictions


def predict(
    options: Options, process: PartialState, model, tokenizer, trie: Trie, texts: list[str], excluded: list | None
) -> Predictions | None:
    """The predictions of all rows on the main process, None on the others; parts that a killed run left are taken."""
    folder = Path(options.result_json_data).with_suffix(".parts")
    tokens = tokenizer(texts)["input_ids"]
    batches = length_batches([len(t) for t in tokens], options.batch_size, options.batch_tokens)
    parts = [batches[i::PARTS] for i in range(min(PARTS, len(batches)))]
    found = read_parts(folder, options, parts) if process.is_main_process else {}
    pending = broadcast_object_list([[i for i in range(len(parts)) if i not in found]])[0]

    own = pending[process.process_index :: process.num_processes]
    bar = tqdm(total=sum(len(parts[i]) for i in own), desc="evaluate", disable=not process.is_main_process)
    computed = []
    for part in own:
        results = []
        for rows in parts[part]:
            leaves, scores = recommend_batch(
                model,
                [tokens[i] for i in rows],
                tokenizer.pad_token_id or 0,
                trie,
                options.num_beams,
                excluded and [excluded[i] for i in rows],
                length_penalty=options.length_penalty,
                space=options.space,
            )
            results.append((leaves, scores))
            bar.update()
        leaves, scores = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
        with atomic_file(folder / f"{part}.npz", "wb") as f:
            np.savez(f, rows=np.concatenate(parts[part]), leaves=leaves, scores=scores)
        computed.append((part, leaves, scores))
    bar.close()

    computed = gather_object(computed)
    if not process.is_main_process:
        return None
    found |= {part: (leaves, scores) for part, leaves, scores in computed}
    leaves = np.zeros((len(texts), min(options.num_beams, trie.n_leaves)), dtype=np.int64)
    scores = np.zeros(leaves.shape)
    for part, (part_leaves, part_scores) in found.items():
        rows = np.concatenate(parts[part])
        leaves[rows], scores[rows] = part_leaves, part_scores
    return Predictions(leaves, scores)


def read_parts(folder: Path, options: Options, parts: list[list[list[int]]]) -> dict[int, tuple]:
    """`{part: (leaves, scores)}` of the parts that a killed run with the same options and files wrote."""
    # Not the predictions themselves: writing them must not make a part look out of date.
    if begin(folder, dataclasses.replace(options, result_json_data="")) != "resume":
        for file in folder.glob("*.npz"):
            file.unlink()
    found = {}
    for part, batches in enumerate(parts):
        if (folder / f"{part}.npz").exists():
            with np.load(folder / f"{part}.npz", allow_pickle=False) as content:
                if np.array_equal(content["rows"], np.concatenate(batches)):
                    found[part] = (content["leaves"], content["scores"])
    if found:
        print(f"{folder}: {len(found)} of {len(parts)} parts were computed before")
    return found


# ------------------------------------------------------------------------------------------------ results


def prediction_rows(
    rows: pl.DataFrame, items: Items, catalog: Catalog, predicted: Predictions, kept: int, exclude_seen: bool
) -> list[dict]:
    """Each test row with its first `kept` predictions: lists of one length, best first."""
    result = []
    for row, best, scores in zip(rows.to_dicts(), predicted.leaves, predicted.scores, strict=True):
        best = [leaf for leaf in best[:kept].tolist() if leaf >= 0]
        seen = set(row["history"]) if exclude_seen else set()
        groups = [[item for item in catalog.items_of_sid[leaf] if item not in seen] for leaf in best]
        result.append(
            {
                "user_id": row["user"],
                "history_item_id": row["history"],
                "history_item_title": [items.titles[item] for item in row["history"]],
                "item_id": row["target"],
                "item_title": items.titles[row["target"]],
                "output": items.sids[row["target"]],
                "predict": [catalog.sids[leaf] for leaf in best],
                "predict_item_id": groups,  # the items of each SID, in the catalog's order
                "predict_title": [items.titles[group[0]] for group in groups],
                "score": [round(float(score), 4) for score in scores[: len(best)]],
            }
        )
    return result


def summary(options: Options, rows: pl.DataFrame, catalog: Catalog, predicted: Predictions, cutoffs: list[int]) -> dict:
    seen = rows["history"].to_list() if options.exclude_seen else None
    sid_ranks, item_ranks = metrics.sid_and_item_ranks(predicted.leaves, rows["target"].to_list(), catalog, seen)
    return {
        "base_model": options.base_model,
        "test_data_path": options.test_data_path,
        "rows": len(rows),
        "num_beams": predicted.leaves.shape[1],
        "space": options.space,
        "exclude_seen": options.exclude_seen,
        "dtype": options.dtype,
        "item": metrics.table(item_ranks, cutoffs),
        "sid": metrics.table(sid_ranks, cutoffs),
        "intervals": metrics.bootstrap(item_ranks, options.seed, cutoffs),
        "coverage": metrics.coverage(predicted.leaves, catalog),
        "distinct_sids": len(np.unique(predicted.leaves[:, :10][predicted.leaves[:, :10] >= 0])),
        "illegal": metrics.illegal(predicted.leaves, catalog),
    }


def main(options: Options) -> None:
    options.check()
    started = time.perf_counter()
    process = PartialState(cpu=not torch.cuda.is_available())  # else every process of a CPU run believes it is alone
    items, rows, catalog, texts = read(options)

    # Plain "cpu": to "cpu:0", a rank's name for it, weights are copied to other alignments and sums round otherwise.
    device = process.device if process.device.type != "cpu" else torch.device("cpu")
    tokenizer = load_tokenizer(options.base_model, "base_model")
    model = load_model(options.base_model, "base_model", DTYPES[options.dtype]).to(device)
    options.space = options.space or getattr(model.config, "sid_space", "vocab")
    trie = catalog.trie(tokenizer).to(device)
    if options.max_new_tokens < trie.depth:
        raise UserError(f"--max_new_tokens {options.max_new_tokens}: the catalog's SIDs have up to {trie.depth} tokens")

    excluded = [catalog.leaves_of(history) for history in rows["history"].to_list()] if options.exclude_seen else None
    predicted = predict(options, process, model, tokenizer, trie, texts, excluded)
    if predicted is None:
        return

    cutoffs = [k for k in metrics.CUTOFFS if k <= options.num_beams]  # beyond the beams nothing was asked for
    result = summary(options, rows, catalog, predicted, cutoffs)
    path = Path(options.result_json_data)
    kept = options.K or predicted.leaves.shape[1]
    predictions = prediction_rows(rows, items, catalog, predicted, kept, options.exclude_seen)
    write_json(path, predictions, indent=None)
    with atomic_file(path.with_suffix(".parquet"), "wb") as f:
        pl.DataFrame(predictions).write_parquet(f)
    result["processes"] = process.num_processes
    result["seconds"] = time.perf_counter() - started
    write_json(path.with_suffix(".metrics.json"), result)
    shutil.rmtree(path.with_suffix(".parts"))
    print(metrics.format_table({"by SID": result["sid"], "by item": result["item"]}, cutoffs))
    print(f"{len(rows)} rows in {result['seconds']:.0f} s; wrote {path}, .parquet and .metrics.json beside it")


if __name__ == "__main__":
    run(main, Options)
