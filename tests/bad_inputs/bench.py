"""The folder that every case of bad input starts from, the stages' commands in it, and ways to damage its files.

A command is valid as it is here; a case changes one option or damages one file. All paths are relative: a case runs in
its own copy of the folder.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from helpers import write_encoder

CSVS = {"train_file": "train/toy.csv", "eval_file": "valid/toy.csv"}
LISTS = {"train_file": "train/toy.csv", "valid_file": "valid/toy.csv", "test_file": "test/toy.csv"}
TINY = {"layers": 16, "epochs": 2, "eval_step": 1, "warmup_epochs": 0, "batch_size": 48, "device": "cpu"}
KMEANS = {"data_path": "toy.emb-x-td.npy", "output_file": "out/toy.index.json", "k": 8, "l": 2}
KMEANS |= {"collision": "extra_token"}
INDEX = {"ckpt_path": "rqvae", "data_path": "toy.emb-x-td.npy", "output_file": "out/toy.index.json", "device": "cpu"}

STAGES: dict[str, tuple[str, dict]] = {
    "preprocess": ("preprocess.movielens", {"output_dir": "out", "input_dir": "ml"}),
    "text2emb": (
        "rq.text2emb.amazon_text2emb",
        {"dataset": "toy", "root": ".", "plm_name": "y", "plm_checkpoint": "encoder", "device": "cpu"},
    ),
    "rqvae": (
        "rq.rqvae",
        {"data_path": "toy.emb-x-td.npy", "ckpt_dir": "out", "num_emb_list": "8 16", "e_dim": 4} | TINY,
    ),
    "rqkmeans_constrained": ("rq.rqkmeans_constrained", KMEANS),
    "rqkmeans_faiss": ("rq.rqkmeans_faiss", KMEANS),
    "rqkmeans_plus": (
        "rq.rqkmeans_plus",
        {"data_path": "toy.emb-x-td.npy", "ckpt_dir": "out", "pretrained_codebook_path": "books.npz"}
        | TINY
        | {"collision": "extra_token"},
    ),
    "generate_indices": ("rq.generate_indices", INDEX),
    "append": ("rq.generate_indices", INDEX | {"data_path": "more.emb-x-td.npy", "append": "rqvae.index.json"}),
    "sid_report": ("rq.sid_report", {"index": "toy.index.json", "output_file": "out/compare.json"}),
    "convert_dataset": ("convert_dataset", {"dataset_name": "toy", "data_dir": ".", "output_dir": "out"}),
    "base_model": (
        "minionerec.language_model.base_model",
        {"output_dir": "out", "item_meta_path": "toy.item.json", "vocab_size": 400},
    ),
    "sasrec": (
        "sasrec",
        LISTS | {"info_file": "info/toy.txt", "output_dir": "out", "hidden_size": 8, "epochs": 1, "device": "cpu"},
    ),
    "fuse_embeddings": (
        "rq.fuse_embeddings",
        {"data_path": "toy.emb-x-td.npy", "baseline_path": "sasrec", "train_file": "train/toy.csv"}
        | {"info_file": "info/toy.txt", "output_file": "out/toy.emb-fused-td.npy"},
    ),
    "sft": (
        "sft",
        CSVS
        | {"sid_index_path": "toy.index.json", "item_meta_path": "toy.item.json", "base_model": "base"}
        | {"output_dir": "out", "train_from_scratch": True, "batch_size": 16, "micro_batch_size": 8, "cache_dir": ""}
        | {"sft_tasks": "sid_seq", "num_epochs": 0.5},
    ),
    "rl": (
        "rl",
        CSVS
        | {"model_path": "sft", "info_file": "info/toy.txt", "output_dir": "out", "num_generations": 4}
        | {"train_batch_size": 16, "eval_step": 100, "eval_rows": 2, "num_train_epochs": 0.1},
    ),
    "evaluate": (
        "evaluate",
        {"base_model": "sft", "test_data_path": "test/toy.csv", "info_file": "info/toy.txt"}
        | {"train_file": "train/toy.csv", "result_json_data": "out/p.json", "num_beams": 4, "test_rows": 2},
    ),
    "recommend": (
        "recommend",
        {"base_model": "sft", "info_file": "info/toy.txt", "train_file": "train/toy.csv", "history": "3, 4"},
    ),
    "report": ("report", {"output_dir": "run"}),
}


def write_bench(folder: Path, world, base_model: Path, checkpoint: Path) -> None:
    """Fill `folder` with the inputs of every stage. The quantizer and the baseline are trained for two epochs."""
    import shutil

    for path in world.folder.rglob("*"):
        if path.is_file() and not path.name.endswith("run.json"):
            target = folder / path.relative_to(world.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copytree(base_model, folder / "base", ignore=shutil.ignore_patterns("run.json"))
    shutil.copytree(checkpoint, folder / "sft")
    write_encoder(folder / "encoder")
    write_films(folder / "ml")

    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    np.save(folder / "more.emb-x-td.npy", rows)
    np.save(folder / "toy.emb-x-td.npy", rows[:48])
    from rq.codebooks import CodebookFile, write_codebooks

    books = [rows[:8], 0.1 * rows[8:16]]
    write_codebooks(folder / "books.npz", CodebookFile(books, np.zeros((0, 2), dtype=np.int64)))
    made = {"rqvae": {"ckpt_dir": "rqvae"}, "generate_indices": {"output_file": "rqvae.index.json"}}
    for stage, options in (made | {"sasrec": {"output_dir": "sasrec"}}).items():
        call(stage, options)
    write_run(folder / "run")


def write_films(folder: Path) -> None:
    """A MovieLens of 3 users and 4 films."""
    folder.mkdir()
    films = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    films += [f"{film}\tFilm {film}\t199{film}\tDrama" for film in range(1, 5)]
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    ratings += [f"{user}\t{film}\t5\t{100 * user + film}" for user in range(3) for film in range(1, 5)]
    (folder / "ml-100k.item").write_text("\n".join(films) + "\n")
    (folder / "ml-100k.inter").write_text("\n".join(ratings) + "\n")


def write_run(folder: Path) -> None:
    """What a run of run.sh leaves for its report: metrics and ranks of two models, a record."""
    metrics = {f"{metric}@{k}": 0.5 for metric in ("HR", "NDCG") for k in (5, 10, 20)}
    content = {"item": metrics, "headline": "all", "unseen": {"item": metrics}, "rows": 3}
    for model in ("popularity", "sasrec"):
        (folder / model).mkdir(parents=True)
        (folder / model / "metrics.json").write_text(json.dumps(content))
        with open(folder / model / "ranks.npz", "wb") as f:
            np.savez(f, all_item=np.array([0, 3, 7]), unseen_item=np.array([0, 2, 7]))
        record = {"complete": True, "stage": "baseline", "started": 1.0, "seconds": 2.0}
        (folder / model / "run.json").write_text(json.dumps(record))


def arguments_of(stage: str, options: dict) -> list[str]:
    """The command line of a stage with some options changed; None leaves one out."""
    found = []
    for name, value in (STAGES[stage][1] | options).items():
        if value is not None:
            found += [f"--{name}", *(str(value).split() if name in LIST_OPTIONS else [str(value)])]
    return found


LIST_OPTIONS = ("layers", "num_emb_list", "sk_epsilons", "index", "blend_path", "blend_weight")


def module_of(stage: str):
    return importlib.import_module(STAGES[stage][0])


def call(stage: str, options: dict) -> None:
    """Run a stage in this process."""
    from minionerec.common.options import parse

    module = module_of(stage)
    module.main(parse(module.Options, arguments_of(stage, options)))


# ------------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """One bad input of a stage: the parts that its line must have, options that differ, and what is done to files."""

    stage: str
    kind: str  # its class in docs/reliability.md
    found: tuple[str, ...]
    options: dict
    damage: Callable[[], None] | None = None


def option_case(stage: str, *found: str, **options) -> Case:
    """A wrong option."""
    return Case(stage, "option", found, options)


def file_case(stage: str, kind: str, damage: Callable[[], None], *found: str, **options) -> Case:
    """A damaged file. `kind` is what the file is."""
    return Case(stage, kind, found, options, damage)


# ------------------------------------------------------------------------------------------------ damage


def put(path: str, content: str | bytes) -> Callable[[], None]:
    """Write `content` to a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda: (Path(path).parent.mkdir(exist_ok=True, parents=True), Path(path).write_bytes(data))


def edit(path: str, change: Callable[[bytes], bytes]) -> Callable[[], None]:
    """Replace the bytes of a file by change(bytes)."""
    return lambda: Path(path).write_bytes(change(Path(path).read_bytes()))


def half(path: str) -> Callable[[], None]:
    """Keep the first half of a file, as an interrupted copy does."""
    return edit(path, lambda data: data[: len(data) // 2])


def replace(path: str, old: str, new: str | bytes) -> Callable[[], None]:
    """Replace the first `old` in a file, which must be there."""
    new = new.encode() if isinstance(new, str) else new

    def change(data: bytes) -> bytes:
        assert old.encode() in data, f"{path} has no {old}"
        return data.replace(old.encode(), new, 1)

    return edit(path, change)


def cell(path: str, row: int, column: str, value: str) -> Callable[[], None]:
    """Put `value` into a cell of a CSV; row 2 is the first after the header."""

    def write() -> None:
        import csv

        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.reader(f))
        rows[row - 1][rows[0].index(column)] = value
        with open(path, "w", newline="", encoding="utf-8") as f:
            csv.writer(f, lineterminator="\n").writerows(rows)

    return write


def json_edit(path: str, change: Callable[[dict], object]) -> Callable[[], None]:
    """Change the object in a JSON file in place, or replace it by what `change` returns."""

    def write() -> None:
        content = json.loads(Path(path).read_text())
        result = change(content)
        Path(path).write_text(json.dumps(content if result is None else result))

    return write


def array(path: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[], None]:
    """Replace the array in a .npy by make(array); object arrays are pickled."""

    def write() -> None:
        changed = make(np.load(path))
        np.save(path, changed, allow_pickle=changed.dtype == object)

    return write


def arrays(path: str, **content: np.ndarray) -> Callable[[], None]:
    """Replace an .npz."""
    return lambda: np.savez(path, **content)


def tensors(path: str, change: Callable[[dict], object]) -> Callable[[], None]:
    """Change the tensors of a .safetensors file in place."""

    def write() -> None:
        from safetensors.torch import load_file, save_file

        content = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(content)
        save_file(content, path, metadata={"format": "pt"})

    return write


def remove(path: str) -> Callable[[], None]:
    return lambda: Path(path).unlink()


def folder_there(path: str) -> Callable[[], None]:
    """A folder where a file should be."""
    return lambda: (Path(path).unlink(missing_ok=True), Path(path).mkdir(parents=True))
