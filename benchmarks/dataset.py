"""The files of a data set in the published layout, as the options of the stages take them."""

from pathlib import Path
from typing import NamedTuple

from minionerec.common.errors import UserError
from minionerec.common.files import require_file


class Files(NamedTuple):
    """Paths of one data set; `index` and `items` are empty where only the samples are asked for."""

    train: str
    valid: str
    test: str
    info: str
    index: str = ""
    items: str = ""


def files_of(folder: str, flag: str = "dataset_dir", sids: bool = True) -> Files:
    """The files in `folder`: {train,valid,test}/*.csv, info/*.txt and, with `sids`, *.{index,item}.json.

    The JSON files may be in index/. Raises `UserError` where there is no file of a kind, or more than one.
    """
    root = require_file(folder, flag)
    patterns = [["train/*.csv"], ["valid/*.csv"], ["test/*.csv"], ["info/*.txt"]]
    patterns += [[f"*.{kind}.json", f"index/*.{kind}.json"] for kind in ("index", "item") if sids]
    return Files(*(_one(root, kinds, flag) for kinds in patterns))


def _one(root: Path, patterns: list[str], flag: str) -> str:
    found = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    if len(found) != 1:
        raise UserError(f"{root}: found {len(found)} files like {' or '.join(patterns)}, expected one; check --{flag}")
    return str(found[0])
