"""Stage 6: HR, NDCG and MRR of a checkpoint on a test CSV, by constrained beam search over the whole catalog.

    BASE_MODEL=output/sft TEST_DATA_PATH=D/test/X.csv INFO_FILE=D/info/X.txt TRAIN_FILE=D/train/X.csv bash evaluate.sh

Writes `result_json_data` (each test row with its lists of SIDs, items, titles and scores) and, next to it, the same as
.parquet, the metrics as .metrics.json and the ranks of the targets as .ranks.npz. Two protocols come from one run: with
all items, and without those that the user already has (minionerec/evaluation/protocols.py).

Several processes share the rows and give the same files as one. A killed evaluation keeps its finished parts in
`*.parts/`; re-running with the same options computes only what is missing.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minionerec.common import model_card, runs
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, read_json, write_json
from minionerec.common.options import INPUT, MOST_WEIGHT, OUTPUT, RUNTIME, StageOptions, is_weight, option, run
from minionerec.common.processes import on_main_process
from minionerec.decoding.backends import BACKENDS, require_vllm
from minionerec.decoding.spaces import SPACES
from minionerec.evaluation.metrics import format_table

DTYPES = ("float32", "bfloat16")


@dataclass
class Options(StageOptions):
    base_model: str = option("", "folder of the checkpoint", role=INPUT)
    test_data_path: str = option("", "test CSV", role=INPUT)
    info_file: str = option("", "the catalog: sid, title, item id per line", role=INPUT)
    train_file: str = option(
        "", "train CSV: popularity orders items that share a SID and groups targets, repeats choose the headline",
        role=INPUT,
    )  # fmt: skip
    result_json_data: str = option("output/predictions.json", "file for the predictions", role=OUTPUT)
    # prompts
    category: str = option("", "what the prompts call the items; default: as the checkpoint was trained")
    max_history: int = option(0, "items of history in a prompt; 0: as the checkpoint was trained")
    prompt_template: str = option("", "wording of the prompts; default: the checkpoint's prompt.yaml", role=INPUT)
    # search
    num_beams: int = option(50, "beams: SIDs predicted for a row")
    space: str = option(
        "", "what scores are normalised over, vocab or catalog; default: as the checkpoint was trained",
        aliases=["--logp_space"],
    )  # fmt: skip
    backend: str = option("transformers", "what searches: transformers (tree search), or vllm (docs/vllm.md)")
    unseen: bool = option(
        True, "also rank without the items that the user already has, by a second search", aliases=["--exclude_seen"]
    )
    length_penalty: float = option(0.0, "scores are divided by length ** length_penalty")
    max_new_tokens: int = option(256, "upper bound for the tokens of a SID; a deeper catalog is refused", role=RUNTIME)
    dtype: str = option("", "float32 or bfloat16; default: bfloat16 on a GPU that computes in it, else float32")
    # rows and results
    test_rows: int = option(-1, "evaluate this many rows, drawn by seed; -1: all", aliases=["--sample"])
    seed: int = option(42, "seed of drawn rows and of the bootstrap intervals")
    K: int = option(0, "predictions written for each row; 0: all. Metrics use all beams")
    # blend
    blend_path: list[str] = option(
        [], "folders of sasrec.sh: also rank by the weighted sum of the models' log-probabilities", role=INPUT
    )
    blend_weight: list[str] = option(
        ["auto"],
        "a weight for each; auto: the best ones on --blend_valid_file; user: the best ones there for each group of users "
        "of whom a baseline is about equally sure",
    )
    blend_valid_file: str = option("", "valid CSV, for --blend_weight auto and user", role=INPUT)
    blend_rows: int = option(3000, "rows of --blend_valid_file, drawn by seed; -1: all")
    # speed
    batch_size: int = option(8, "most prompts per forward", role=RUNTIME)
    batch_tokens: int = option(16384, "most prompt tokens per forward, padding included", role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "num_beams", "max_new_tokens", "batch_size", "batch_tokens")
        self.at_least(0, "max_history", "K")
        self.check(
            space=(self.space in ("", *SPACES), " or ".join(SPACES)),
            backend=(self.backend in BACKENDS, " or ".join(BACKENDS)),
            dtype=(self.dtype in ("", *DTYPES), " or ".join(DTYPES)),
            blend_weight=(
                self.chooses_weights
                or len(self.blend_weight) == len(self.blend_path)
                and all(map(is_weight, self.blend_weight)),
                f"auto, user, or {len(self.blend_path)} numbers, 0 to {MOST_WEIGHT}, one for each --blend_path",
            ),
            length_penalty=(-10 <= self.length_penalty <= 10, "-10 to 10"),
            blend_rows=(self.blend_rows >= 1 or self.blend_rows == -1, "at least 1, or -1 for all"),
            test_rows=(self.test_rows >= 1 or self.test_rows == -1, "at least 1, or -1 for all"),
        )
        unused = "nothing without --blend_path; give the folders of the baselines there, or leave it out"
        if not self.blend_path:
            self.check(
                blend_weight=(self.blend_weight == ["auto"], unused),
                blend_valid_file=(not self.blend_valid_file, unused),
                blend_rows=(self.blend_rows == Options.blend_rows, unused),
            )

    @property
    def chooses_weights(self) -> bool:
        """Whether the weights of the blend are chosen on --blend_valid_file."""
        return self.blend_weight in (["auto"], ["user"])


class Outputs(NamedTuple):
    """Where results go: each name is `result_json_data` without its .json, and a suffix."""

    predictions: Path
    parquet: Path
    metrics: Path
    ranks: Path
    blend_metrics: Path
    blend_ranks: Path
    parts: Path
    record: Path

    @classmethod
    def of(cls, predictions: str) -> "Outputs":
        stem = predictions.removesuffix(".json")
        blend = (".blend.metrics.json", ".blend.ranks.npz")
        suffixes = (".parquet", ".metrics.json", ".ranks.npz", *blend, ".parts", f".{runs.RECORD}")
        return cls(Path(predictions), *(Path(stem + suffix) for suffix in suffixes))

    @property
    def results(self) -> list[Path]:
        return [self.predictions, self.parquet, self.metrics, self.ranks]

    @property
    def blended(self) -> list[Path]:
        return [self.blend_metrics, self.blend_ranks]


# ------------------------------------------------------------------------------------------------ set-up


def join_processes():
    """This process among those of the launch, as an `accelerate.PartialState`."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())  # otherwise each process of a CPU launch has its own group


def begin(options: Options, outputs: Outputs) -> runs.Run:
    """Refuse a model whose training is not finished; find or start the record of this evaluation."""
    runs.require_finished(options.base_model)
    # With the parts, so that those of another unfinished evaluation are refused, not mixed in.
    results = [*outputs.results, *(outputs.blended if options.blend_path else [])]
    record = runs.begin(options, "evaluate", files=[*results, outputs.parts], record=outputs.record)
    record.files = results
    return record


def read(options: Options):
    """(settings of the prompts, data set, test rows)."""
    from data import drawn, load
    from minionerec.language_model.checkpoints import resolve_settings

    given = {"category": options.category, "max_history": options.max_history, "space": options.space}
    settings = on_main_process(lambda: resolve_settings(options.base_model, **given))
    files = {"info_file": options.info_file, "train": options.train_file, "test": options.test_data_path}
    data = load(**files, max_history=settings.max_history)
    return settings, data, drawn(data.test, options.test_rows, options.seed)


def load_engine(options: Options, device, catalog, space: str):
    """(the engine of `options.backend` for the catalog, the model in `options.dtype`; the tokenizer)"""
    import torch

    from minionerec.common.devices import device_has_bf16
    from minionerec.decoding.engine import TransformersEngine, vllm_engine
    from minionerec.language_model.checkpoints import load_model, load_tokenizer

    options.dtype = options.dtype or ("bfloat16" if device_has_bf16() else "float32")
    dtype, tokenizer = getattr(torch, options.dtype), load_tokenizer(options.base_model, "base_model")
    trie = catalog.trie(tokenizer)
    if options.max_new_tokens < trie.depth:
        raise UserError(
            f"--max_new_tokens {options.max_new_tokens}: the catalog's SIDs have up to {trie.depth} tokens; raise it"
        )
    if options.backend == "vllm":
        return vllm_engine(options.base_model, trie, tokenizer.eos_token_id, space, dtype=dtype), tokenizer
    # To "cpu", not a rank's "cpu:0": that copies weights to another alignment, and sums round differently.
    device = device if device.type != "cpu" else torch.device("cpu")
    model = load_model(options.base_model, "base_model", dtype).to(device)
    return TransformersEngine(model, trie.to(device), tokenizer.pad_token_id, space), tokenizer


def search(options: Options, process, settings, data, rows, engine, tokenizer, parts: Path, resume: bool):
    """{protocol: Predictions} for the test rows, in the main process; None in the others."""
    from data import Prompts, next_sid_prompts, template_of
    from minionerec.evaluation.predictions import predict

    prompts = Prompts(template_of(options.base_model, options.prompt_template), settings.category)
    exclusions = {"all": None}
    if options.unseen:
        exclusions["unseen"] = [data.catalog.rows_of(items) for items in rows["seen"].to_list()]
    return predict(
        process,
        engine,
        tokenizer,
        next_sid_prompts(rows, data.items, prompts),
        exclusions,
        parts,
        resume,
        num_beams=options.num_beams,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        length_penalty=options.length_penalty,
    )


# ------------------------------------------------------------------------------------------------ results


def prediction_rows(rows, items, catalog, found: Mapping, kept: int | None) -> list[dict]:
    """Each test row with its first `kept` predictions, and those without seen items under "unseen"."""

    def lists(predicted, row: int, seen: set[int]) -> dict[str, list]:
        best = [sid_row for sid_row in predicted.sid_rows[row, :kept].tolist() if sid_row >= 0]
        groups = [[item for item in catalog.items_of_sid[sid_row] if item not in seen] for sid_row in best]
        return {
            "predict": [catalog.sids[sid_row] for sid_row in best],
            "predict_item_id": groups,  # the items of each SID, in the catalog's order
            "predict_title": [items.titles[group[0]] for group in groups],
            "score": [round(score, 4) for score in predicted.scores[row, : len(best)].tolist()],
        }

    result = []
    for number, row in enumerate(rows.iter_rows(named=True)):
        known = {
            "user_id": row["user"],
            "history_item_id": row["history"],
            "history_item_title": [items.titles[item] for item in row["history"]],
            "item_id": row["target"],
            "item_title": items.titles[row["target"]],
            "output": items.sids[row["target"]],
        }
        result.append(known | lists(found["all"], number, set()))
        if "unseen" in found:
            result[-1]["unseen"] = lists(found["unseen"], number, set(row["seen"]))
    return result


def write(options: Options, outputs: Outputs, settings, data, rows, found: Mapping) -> None:
    """Write predictions, ranks and metrics of the test rows."""
    import polars as pl

    from minionerec.evaluation import protocols
    from minionerec.evaluation.metrics import CUTOFFS, illegal

    predictions = prediction_rows(rows, data.items, data.catalog, found, options.K or None)
    text = json.dumps(predictions, ensure_ascii=False)
    with atomic_file(outputs.predictions) as f:
        f.write(text + "\n")
    with atomic_file(outputs.parquet, "wb") as f:  # a tenth of the time that a table of Python's lists takes
        pl.read_json(text.encode(), infer_schema_length=None).write_parquet(f)

    ranks = protocols.by_beams({name: each.sid_rows for name, each in found.items()}, rows, data.catalog)
    protocols.write_ranks(outputs.ranks, ranks, rows, data.train, data.catalog.n_items)
    cutoffs = [k for k in CUTOFFS if k <= options.num_beams]  # the beams say nothing of later places
    metrics = {
        "base_model": options.base_model,
        "test_data_path": options.test_data_path,
        "num_beams": found["all"].sid_rows.shape[1],
        "space": settings.space,
        "backend": options.backend,
        "dtype": options.dtype,
        "illegal": sum(illegal(each.sid_rows, data.catalog) for each in found.values()),
    }
    write_json(
        outputs.metrics, metrics | protocols.report(ranks, rows, data.train, data.catalog, options.seed, cutoffs)
    )


def read_blend(options: Options, settings, data) -> tuple[list, object]:
    """(the models of --blend_path, the rows that choose their weights or None), read before anything is decoded."""
    from data import drawn, load
    from minionerec.baselines.models import load_checkpoint

    baselines = [load_checkpoint(path, "blend_path", data.catalog.n_items) for path in options.blend_path]
    if not baselines or not options.chooses_weights:
        return baselines, None
    files = {"info_file": options.info_file, "valid": options.blend_valid_file}
    valid = load(**files, max_history=settings.max_history, flags={"valid": "blend_valid_file"}).valid
    return baselines, drawn(valid, options.blend_rows, options.seed)


def blend_weights_of(options: Options, data, candidates, valid) -> tuple:
    """(the `UserWeights` of --blend_weight, what the metrics hold of them). candidates: from rows to `Candidates`."""
    from minionerec.evaluation import blend_weights, protocols

    if options.chooses_weights:
        known = candidates(valid)[protocols.headline(data.train)], valid["target"].to_numpy()
        if options.blend_weight == ["user"]:
            choice = blend_weights.choose_user_weights(*known, options.seed)
            return choice.user_weights, blend_weights.record(choice, options.blend_path)
        weights = blend_weights.choose_weights(*known)
    else:
        weights = tuple(map(float, options.blend_weight))
    return blend_weights.UserWeights((weights,)), {"weights": weights}


def blend(options: Options, outputs: Outputs, settings, data, rows, found, engine, tokenizer, baselines, valid) -> None:
    """Rank the test rows by the blend with `baselines`, with weights chosen on `valid`, and write metrics and ranks.

    found: the predictions of the test rows. Their beams are the blend's if they were searched in its space.
    """
    from data import Prompts, next_sid_prompts, template_of
    from minionerec.common.console import Progress
    from minionerec.evaluation import blend, protocols

    prompts = Prompts(template_of(options.base_model, options.prompt_template), settings.category)

    def candidates(rows, what: str, beams=None):
        fixed = (engine.model, tokenizer, engine.trie, next_sid_prompts(rows, data.items, prompts))
        others = (rows["seen"].to_list(), baselines, data.catalog)
        given = {"count": options.num_beams, "batch_size": options.batch_size, "beams": beams}
        with Progress(len(rows), what, unit="rows") as progress:
            return blend.collect(*fixed, *others, **given, progress=progress.update)

    weights, chosen = blend_weights_of(options, data, lambda rows: candidates(rows, "blend weights"), valid)
    same = settings.space == "catalog" and not options.length_penalty
    found = candidates(rows, "blending", found["all"] if same else None)
    targets = rows["target"].to_list()
    ranks = {name: blend.ranked(each, weights.of(each), targets, data.catalog) for name, each in found.items()}
    protocols.write_ranks(outputs.blend_ranks, ranks, rows, data.train, data.catalog.n_items)
    result = {"blend_path": options.blend_path} | chosen
    write_json(outputs.blend_metrics, result | protocols.report(ranks, rows, data.train, data.catalog, options.seed))


def show(outputs: Outputs) -> None:
    """Print the metrics of both protocols, by SID and by item."""
    metrics = read_json(outputs.metrics, "result_json_data")
    cutoffs = [int(name.removeprefix("HR@")) for name in metrics["item"] if name.startswith("HR@")]
    rows = {"all items, by SID": metrics["sid"], "all items, by item": metrics["item"]}
    if "unseen" in metrics:
        rows |= {f"unseen items, by {kind}": metrics["unseen"][kind.lower()] for kind in ("SID", "item")}
    print(format_table(rows, cutoffs))
    print(f"{metrics['rows']} rows; {outputs.predictions}, {outputs.metrics}")
    if outputs.blend_metrics.exists():
        mixed = read_json(outputs.blend_metrics, "result_json_data")
        rows = {"all items, by item": mixed["item"], "unseen items, by item": mixed["unseen"]["item"]}
        print(f"blend with {', '.join(mixed['blend_path'])}, weights {mixed['weights']}")
        if by_user := mixed.get("user_weights"):
            bounds = [f" to {cut:.3f}" for cut in by_user["cuts"]] + [""]
            parts = [f"{w}{bound}" for w, bound in zip(by_user["weights"], bounds, strict=True)]
            print(f"weights by the largest probability of {by_user['confidence_of']}: {'; '.join(parts)}")
        print(format_table(rows, cutoffs))
    seen = metrics["seen"]
    if seen["looks_cut"]:
        print(f"note: the histories look cut at {seen['longest']} items; only those count as seen")


def main(options: Options) -> None:
    options.require("base_model", "test_data_path", "info_file", "result_json_data")
    if options.blend_path and options.chooses_weights:
        options.require("blend_valid_file")
    if options.backend == "vllm":
        options.check(
            blend_path=(not options.blend_path, "nothing with --backend vllm: a blend needs the model itself")
        )
        require_vllm("backend")
    outputs = Outputs.of(options.result_json_data)
    if outputs.predictions.is_dir() or options.result_json_data.endswith("/"):
        raise UserError(f"--result_json_data {options.result_json_data}: found a folder, expected the name of a file")
    process = join_processes() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    record = on_main_process(lambda: begin(options, outputs))
    if record.complete:
        if process is None or process.is_main_process:
            # training that ended with the same weights has written a new card
            model_card.add_test(Path(options.base_model), read_json(outputs.metrics, "result_json_data"), replace=False)
            show(outputs)
        return

    from minionerec.evaluation.predictions import remove_parts

    process = process or join_processes()
    settings, data, rows = read(options)
    to_blend = read_blend(options, settings, data)
    engine, tokenizer = load_engine(options, process.device, data.catalog, settings.space)
    found = search(options, process, settings, data, rows, engine, tokenizer, outputs.parts, record.resume)
    if not process.is_main_process:
        return
    write(options, outputs, settings, data, rows, found)
    if options.blend_path:
        blend(options, outputs, settings, data, rows, found, engine, tokenizer, *to_blend)
    record.record["processes"] = process.num_processes
    model_card.add_test(Path(options.base_model), read_json(outputs.metrics, "result_json_data"))
    record.finish()
    remove_parts(outputs.parts)
    show(outputs)


if __name__ == "__main__":
    run(main, Options)
