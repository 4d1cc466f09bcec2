"""benchmarks/sid_variants.py makes a data set folder for each variant, and refuses others."""

import json

import numpy as np
import pytest
import torch
from rq_helpers import refusal

from benchmarks import sid_variants
from benchmarks.dataset import files_of
from minionerec.baselines.models import SASRec
from minionerec.catalog.sids import read_index


@pytest.fixture
def arguments(world, tmp_path) -> list[str]:
    n_items = len(read_index(world.index))
    np.save(tmp_path / "toy.emb-x-td.npy", np.random.default_rng(0).normal(size=(n_items, 6)).astype(np.float32))
    torch.manual_seed(0)
    SASRec(n_items=n_items, max_history=5, hidden_size=8, dropout=0.0, num_layers=1, num_heads=2).save(
        tmp_path / "sasrec"
    )
    paths = {"dataset_dir": world.folder, "embeddings": tmp_path / "toy.emb-x-td.npy"}
    paths |= {"baseline_path": tmp_path / "sasrec", "output_dir": tmp_path / "sids"}
    return [part for name, path in paths.items() for part in (f"--{name}", str(path))]


def test_every_variant_is_a_data_set(arguments, world, tmp_path):
    options = dict(zip([name[2:] for name in arguments[::2]], arguments[1::2], strict=True))
    sid_variants.main(sid_variants.Options(**options, k=8, variants="fused2,permuted2,random3"))
    indexes = {}
    for name in ("fused2", "permuted2", "random3"):
        files = files_of(str(tmp_path / "sids" / name))
        indexes[name] = read_index(files.index)
        assert all(sid.count("<") == int(name[-1]) for sid in indexes[name])
        assert json.loads(open(files.items).read()) == json.loads(open(world.items).read())
        assert all(sid in open(files.train).read() for sid in indexes[name][:1])
    assert indexes["fused2"] != indexes["permuted2"] and sorted(indexes["fused2"]) == sorted(indexes["permuted2"])
    assert len(set(indexes["random3"])) == len(indexes["random3"])


@pytest.mark.parametrize(
    "variants, found",
    [
        ("fused", "no variant 'fused', expected some of text2"),
        ("text2,../x3", "no variant '../x3', expected some of text2"),
    ],
)
def test_unknown_variants_are_refused(arguments, tmp_path, variants, found):
    assert found in refusal(sid_variants, *arguments, "--variants", variants)
    assert not (tmp_path / "sids").exists()
