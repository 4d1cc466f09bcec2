"""What every reader of stage 0 does around its reading: the run record, the names of the files, skipping."""

from collections.abc import Callable, Mapping
from pathlib import Path

from minionerec.common import runs
from minionerec.common.errors import UserError
from preprocess.options import PreprocessOptions

SPLITS = ("train", "valid", "test")


def preprocess(options: PreprocessOptions, name: str, files: Mapping[str, Path], read: Callable) -> None:
    """Stage 0: `read()` the source into a `Source`, filter, number, split and write it; a finished run is skipped.

    files: what is read. Writes `<D>.item.json`, `<D>.{train,valid,test}.inter`, `<D>.{user,item}2id` and
    `<D>.stats.json` into the output folder.
    """
    folder = Path(options.output_dir)
    written = {kind: folder / f"{name}.{kind}" for kind in ("item.json", "user2id", "item2id", "stats.json")}
    written |= {split: folder / f"{name}.{split}.inter" for split in SPLITS}
    for path in files.values():
        if path.resolve() in {file.resolve() for file in written.values()}:
            raise UserError(f"{path}: would be read and written; give another --output_dir or --dataset_name")
    record = runs.begin(
        options,
        "preprocess",
        files=list(written.values()),
        record=folder / f"{name}.preprocess.run.json",
        inputs=files,
    )
    if record.complete:
        return
    from preprocess.dataset import build

    build(options, read(), written)
    record.finish()
