"""Stage 6: a checkpoint's HR, NDCG and MRR on a test CSV, by constrained beam search over the whole catalog.

    python evaluate.py --base_model output/sft --test_data_path test.csv --info_file info.txt --train_file train.csv \
        --category Video_Games --result_json_data output/predictions.json

Writes the predictions, each test row with its list `predict` (SIDs, best first), and beside them `*.metrics.json`:
`{"rows", "item", "sid", "intervals", "distinct_sids", "seconds", …}`. By SID, any item that shares the target's SID is a
hit; by item, only the target is. Start it with torchrun to share the rows among processes: the metrics are the same.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

import checkpoint
import metrics
from beam_search import recommend
from catalog import Catalog
from cli import HfArg, UserError, require_file, run, write_json
from data import Prompts, next_sid_prompts, read_info, read_sequences, target_counts, template_of


@dataclass
class Options:
    base_model: str = HfArg(default="", help="folder of the checkpoint")
    test_data_path: str = HfArg(default="", help="test CSV")
    info_file: str = HfArg(default="", help="info file: the catalog")
    train_file: str = HfArg(default="", help="train CSV: orders items that share a SID by popularity; default: by id")
    category: str = HfArg(default="", help="what the prompts call the items")
    result_json_data: str = HfArg(default="output/predictions.json", help="where the predictions go")
    batch_size: int = HfArg(default=8, help="prompts a forward")
    num_beams: int = HfArg(default=50, help="beams: SIDs predicted for a row")
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
        for flag in ("batch_size", "num_beams"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} {getattr(self, flag)}: expected at least 1")


def main(options: Options) -> None:
    options.check()
    started = time.perf_counter()
    process = PartialState()

    # data
    items = read_info(options.info_file)
    rows = read_sequences(options.test_data_path, items.sids, "test_data_path", options.max_history)
    if 0 <= options.sample < len(rows):
        rows = rows.sample(options.sample, seed=options.seed)
    popularity = None
    if options.train_file:
        train = read_sequences(options.train_file, items.sids, "train_file", options.max_history)
        popularity = target_counts(train, len(items.sids))
    catalog = Catalog(items.sids, popularity)
    prompts = Prompts(template_of(options.base_model, options.prompt_template), options.category)

    # model
    dtype = torch.bfloat16 if checkpoint.device_has_bf16() else torch.float32
    tokenizer = checkpoint.load_tokenizer(options.base_model, "base_model")
    model = checkpoint.load_model(options.base_model, "base_model", dtype).to(process.device)
    trie = catalog.trie(tokenizer)
    if options.max_new_tokens < trie.depth:
        raise UserError(f"--max_new_tokens {options.max_new_tokens}: the catalog's SIDs have up to {trie.depth} tokens")

    # predictions: each process takes every n-th row
    texts = next_sid_prompts(rows, items, prompts)
    own = range(process.process_index, len(texts), process.num_processes)
    leaves, scores = recommend(
        model,
        tokenizer,
        trie,
        [texts[i] for i in own],
        options.num_beams,
        options.batch_size,
        options.length_penalty,
        progress="evaluate" if process.is_main_process else None,
    )
    gathered = gather_object([(list(own), leaves, scores)])
    if not process.is_main_process:
        return
    predicted = np.zeros((len(texts), leaves.shape[1]), dtype=np.int64)
    predicted_scores = np.zeros(predicted.shape)
    for indices, part, part_scores in gathered:
        predicted[indices], predicted_scores[indices] = part, part_scores

    # metrics
    cutoffs = [k for k in metrics.CUTOFFS if k <= options.num_beams]  # beyond the beams nothing was asked for
    sid_ranks, item_ranks = metrics.sid_and_item_ranks(predicted, rows["target"].to_list(), catalog)
    result = {
        "base_model": options.base_model,
        "test_data_path": options.test_data_path,
        "rows": len(rows),
        "num_beams": predicted.shape[1],
        "item": metrics.table(item_ranks, cutoffs),
        "sid": metrics.table(sid_ranks, cutoffs),
        "intervals": metrics.bootstrap(item_ranks, options.seed, cutoffs),
        "distinct_sids": len(np.unique(predicted[:, :10])),
        "seconds": time.perf_counter() - started,
    }
    kept = options.K or predicted.shape[1]
    predictions = [
        {
            "user_id": row["user"],
            "history_item_id": row["history"],
            "item_id": row["target"],
            "output": items.sids[row["target"]],
            "predict": [catalog.sids[leaf] for leaf in best[:kept]],
            "score": [round(float(score), 4) for score in best_scores[:kept]],
        }
        for row, best, best_scores in zip(rows.to_dicts(), predicted, predicted_scores, strict=True)
    ]
    path = Path(options.result_json_data)
    write_json(path, predictions, indent=None)
    write_json(path.with_suffix(".metrics.json"), result)
    print(metrics.format_table({"by SID": result["sid"], "by item": result["item"]}, cutoffs))
    print(f"{len(rows)} rows in {result['seconds']:.0f} s; wrote {path} and {path.with_suffix('.metrics.json')}")


if __name__ == "__main__":
    run(main, Options)
