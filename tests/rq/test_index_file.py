"""Index files: a round trip of codes, and that malformed indexes are one line that names the file."""

import json

import numpy as np
import pytest

from minionerec.common.errors import UserError
from rq import generate_indices, sid_report
from rq.codebooks import CodebookFile, write_codebooks
from rq.index_file import read_codes, write_index


def test_round_trip(tmp_path):
    codes = np.array([[0, 300, -1], [1, 0, 0], [1, 0, 1]])
    write_index(tmp_path / "D.index.json", codes)
    assert json.loads((tmp_path / "D.index.json").read_text())["1"] == ["<a_1>", "<b_0>", "<c_0>"]
    np.testing.assert_array_equal(read_codes(tmp_path / "D.index.json", "index"), codes)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"0": ["<a_1>"], "1": ["<a_1>", "<b_0>"]}, "item 0 has SID <a_1>, a prefix of item 1's <a_1><b_0>"),
        ({"0": ["<b_1>"]}, "item 0 has <b_1> at level 0, expected <a_1> there"),
        ({"0": ["<a_1>"], "2": ["<a_2>"]}, "item 1 is missing"),
        ({"0": "a_1"}, "expected a list like"),
    ],
)
@pytest.mark.parametrize("user", ["report", "append"])
def test_bad_index(user, index, message, tmp_path):
    path = tmp_path / "bad.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as error:
        if user == "report":
            sid_report.main(sid_report.Options(index=[str(path)]))
        else:
            np.save(tmp_path / "D.npy", np.random.default_rng(0).normal(size=(9, 2)))
            write_codebooks(tmp_path / "b.npz", CodebookFile([np.eye(4, 2), np.eye(4, 2)], np.zeros((0, 2))))
            generate_indices.main(
                generate_indices.Options(
                    ckpt_path=str(tmp_path / "b.npz"),
                    data_path=str(tmp_path / "D.npy"),
                    append=str(path),
                    output_file=str(tmp_path / "x.index.json"),
                )
            )
    assert str(path) in str(error.value) and not (tmp_path / "x.index.json").exists()
