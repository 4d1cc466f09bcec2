"""benchmarks/dataset.py: the one file of each kind, or a line that says what was found."""

import shutil

import pytest

from benchmarks.dataset import files_of
from minionerec.common.errors import UserError


def test_files_of_a_data_set(world, tmp_path):
    paths = {"train": world.train, "valid": world.valid, "test": world.test, "info": world.info}
    paths |= {"index": world.index, "items": world.items}
    assert files_of(str(world.folder))._asdict() == {name: str(path) for name, path in paths.items()}
    folder = tmp_path / "data"
    shutil.copytree(world.folder, folder)
    (folder / "index").mkdir()
    for name in ("toy.index.json", "toy.item.json"):
        (folder / name).rename(folder / "index" / name)
    assert files_of(str(folder)).items == str(folder / "index" / "toy.item.json")

    (folder / "test" / "second.csv").touch()
    with pytest.raises(UserError, match=r"data: found 2 files like test/\*.csv, expected one; check --dataset_dir"):
        files_of(str(folder))
    (folder / "index" / "toy.index.json").unlink()
    (folder / "test" / "second.csv").unlink()
    assert files_of(str(folder), sids=False).index == ""
    with pytest.raises(UserError, match=r"found 0 files like \*.index.json or index/\*.index.json"):
        files_of(str(folder))
    with pytest.raises(UserError, match="nowhere: no such file or folder; check --dataset_dir"):
        files_of("nowhere")
