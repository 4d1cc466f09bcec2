import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT
from transformers.hf_argparser import HfArg

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, read_json, require_file, write_json
from minionerec.common.runs import begin, finish


@dataclass
class Options:
    output_dir: str = HfArg(default="")
    data: str = HfArg(default="")
    lr: float = HfArg(default=1.0)
    cache_dir: str = HfArg(default="")


def test_begin_and_finish(tmp_path):
    """Complete and resume need the same options and the same input files, those of a folder included."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    options = Options(output_dir=str(tmp_path / "out"), data=str(tmp_path / "model"), cache_dir=str(tmp_path / "cache"))
    assert begin(options.output_dir, options) == "fresh"
    assert begin(options.output_dir, options) == "resume"
    Path(options.cache_dir).mkdir()
    finish(options.output_dir, options)
    (Path(options.cache_dir) / "rows.npz").write_text("what the stage wrote on its way")
    assert begin(options.output_dir, options) == "complete"
    (tmp_path / "model" / "weights").write_text("22")
    assert begin(options.output_dir, options) == "fresh"
    finish(options.output_dir, options)
    options.lr = 2.0
    assert begin(options.output_dir, options) == "fresh"


def test_atomic_file_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "a" / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as f:
        f.write("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_reading(tmp_path):
    with pytest.raises(UserError, match="--flag is required"):
        require_file("", "flag")
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "x", "flag")


ONE_OF_SEVERAL = """
import atexit, os, sys
import torch.distributed
from dataclasses import dataclass
from minionerec.common.errors import UserError
from minionerec.common.options import run

class Aborts:
    def __del__(self, abort=os.abort):  # as a gloo thread does that frees a tensor while Python is taken down
        abort()

@dataclass
class Options:
    wrong: bool = False

def main(options):
    sys.aborts = Aborts()
    torch.distributed.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=0, world_size=1)
    atexit.register(print, "tracker finished")
    print("result")
    if options.wrong:
        raise UserError("wrong")

run(main, Options)
"""


@pytest.mark.parametrize("wrong", [False, True])
def test_one_of_several_processes_ends_without_taking_python_down(tmp_path, wrong):
    done = subprocess.run(
        [sys.executable, "-c", ONE_OF_SEVERAL, "--wrong", str(wrong)],
        env=os.environ | {"STORE": str(tmp_path / "store")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (2 if wrong else 0), done.stderr
    assert done.stdout.split("\n") == ["result", "tracker finished", ""]
    assert done.stderr.endswith("error: wrong\n" if wrong else "")
