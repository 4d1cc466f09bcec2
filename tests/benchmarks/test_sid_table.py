"""benchmarks/sid_table.py runs at a tiny size: every quantizer in every mode, finished ones skipped."""

import numpy as np
from helpers import run_stage

from benchmarks.sid_table import QUANTIZERS
from rq.collisions import MODES


def test_the_command(tmp_path):
    path = tmp_path / "toy.emb-x-td.npy"
    np.save(path, np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32))
    tiny = {"data_path": path, "output_dir": tmp_path / "out", "k": 6, "l": 2, "epochs": 2, "layers": 8}

    def table(**more):
        done = run_stage("benchmarks.sid_table", *(f"--{name}={value}" for name, value in (tiny | more).items()))
        return [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]

    first, again = table(), table()
    rows = [line.split(" | ")[:2] for line in first]
    assert rows == [[f"| {name}", mode] for name in QUANTIZERS for mode in MODES]
    made = [line for line in first if "refused" not in line]
    assert len(made) >= len(first) - len(QUANTIZERS) and not any(line.endswith("| - |") for line in made)
    skipped = [line for line in again if "refused" not in line]
    assert all(line.endswith("| - |") for line in skipped)
    assert [line.rsplit(" | ", 1)[0] for line in made] == [line.rsplit(" | ", 1)[0] for line in skipped]
