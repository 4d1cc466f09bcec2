"""Parts of an unfinished evaluation: only whole parts of the current batches are used, only parts are deleted."""

import numpy as np

from minionerec.evaluation.predictions import PARTS, Parts, remove_parts


def test_parts_divide_the_batches():
    batches = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(PARTS + 40)]
    parts = Parts("nowhere", batches)
    assert len(parts.batches) == PARTS and len(parts.batches[0]) == 2
    rows = np.concatenate([parts.rows(part) for part in range(PARTS)])
    assert sorted(rows) == list(range(3 * len(batches)))
    assert parts.read() == {}


def test_parts_of_other_batches_and_broken_files_are_ignored(tmp_path):
    parts = Parts(tmp_path, [[0, 1], [2, 3], [4], [5]])
    for part in range(4):
        parts.write(part, {"scores": np.full((1, 2, 3), part)})
    content = (tmp_path / "2.npz").read_bytes()
    (tmp_path / "2.npz").write_bytes(content[: len(content) // 2])
    found = Parts(tmp_path, [[0, 1], [3, 2], [4], [5]]).read()  # another order in part 1
    assert sorted(found) == [0, 3] and found[3]["scores"].tolist() == [[[3] * 3] * 2]


def test_only_parts_are_removed(tmp_path):
    folder = tmp_path / "x.parts"
    Parts(folder, [[0]]).write(0, {})
    (folder / "notes.txt").write_text("mine")
    remove_parts(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    remove_parts(folder)
    assert not folder.exists()
    remove_parts(folder)
