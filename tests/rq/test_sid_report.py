"""Quality reports next to an index and in one table: figures equal a plain computation, stale ones are not used."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import run_stage
from rq_helpers import index, refusal

from minionerec.common.errors import UserError
from rq import sid_report
from rq.checkpoints import load_model
from rq.codebooks import CodebookFile, write_codebooks
from rq.index_file import write_index
from rq.quality import quality


def test_report_beside_the_index_and_side_by_side(tmp_path, capsys):
    embeddings = np.random.default_rng(1).normal(size=(90, 6)).astype(np.float32)
    ckpt = tmp_path / "books.npz"
    np.save(tmp_path / "D.npy", embeddings)
    books = [np.random.default_rng(level).normal(size=(8, 6)) for level in range(3)]
    write_codebooks(ckpt, CodebookFile(books, np.zeros((0, 3))))
    paths = []
    for mode in ("none", "extra_token"):
        paths.append(tmp_path / f"{mode}.index.json")
        index(ckpt, tmp_path / "D.npy", paths[-1], collision=mode)
    report = json.loads((tmp_path / "extra_token.index.quality.json").read_text())
    model = load_model(ckpt)
    x = torch.from_numpy(embeddings)
    nearest = model.encode(x).codes
    left = [(x - model.quantizer.decode(nearest[:, :depth])).square().sum() for depth in (1, 2, 3)]
    expected = torch.stack(left) / (x - x.mean(0)).square().sum()
    assert report["before"]["reconstruction_error"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert report["before"] | quality(nearest.numpy()) == report["before"]
    assert report["after"]["collision_rate"] == 0 < report["before"]["collision_rate"]
    assert sum(int(n) * c for n, c in report["before"]["items_per_sid"].items()) == 90

    output = tmp_path / "compare.json"
    options = {"index": [str(path) for path in paths], "output_file": str(output)}
    sid_report.main(sid_report.Options(**options, data_path=str(tmp_path / "D.npy")))
    header, *lines = capsys.readouterr().out.splitlines()[-4:-1]
    assert header.startswith("index") and [line.split()[0] for line in lines] == options["index"]
    assert json.loads(output.read_text())[str(paths[1])] == report
    for path in (output.with_suffix(".png"), tmp_path / "none.index.quality.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000

    # The report of another index is not used.
    shutil.copy(tmp_path / "none.index.quality.json", tmp_path / "extra_token.index.quality.json")
    stale = sid_report.report_of(paths[1], x)
    assert "before" not in stale and "reconstruction_error" not in stale["after"]
    assert stale["after"]["fitted_error"] == report["after"]["fitted_error"]


def test_report_from_the_command_line(tmp_path):
    write_index(tmp_path / "A.index.json", np.array([[0, 0], [0, 0], [0, 1]]))
    done = run_stage("rq.sid_report", tmp_path / "A.index.json")
    assert "0.3333" in done.stdout
    assert "one or more index files are required" in refusal(sid_report)


def test_its_own_files_are_written_again_and_others_move_aside_on_request(tmp_path):
    write_index(tmp_path / "A.index.json", np.array([[0, 0], [0, 0], [0, 1]]))
    output = tmp_path / "notes.json"
    options = {"index": [str(tmp_path / "A.index.json")], "output_file": str(output)}
    for _ in range(2):
        sid_report.main(sid_report.Options(**options))
    output.write_text('["mine"]')
    with pytest.raises(UserError, match="notes.json: holds another result"):
        sid_report.main(sid_report.Options(**options))
    sid_report.main(sid_report.Options(**options, overwrite=True))
    assert (tmp_path / "notes.json.1").read_text() == '["mine"]' and (tmp_path / "notes.png.1").exists()
    assert sid_report.is_comparison(output)
