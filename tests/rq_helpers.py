"""Scaffolding of the tests of rq/: small embeddings, and its commands as functions with small settings."""

import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from minionerec.common.options import run
from rq import generate_indices, rqkmeans_constrained, rqkmeans_faiss, rqkmeans_plus, rqvae
from rq.codebooks import CodebookFile, read_codebooks
from rq.files import dataset_name

TINY = {"layers": [16], "e_dim": 4, "num_emb_list": [8, 8], "batch_size": 32, "warmup_epochs": 0, "device": "cpu"}
TINY_PLUS = {"layers": [16], "epochs": 20, "batch_size": 100, "warmup_epochs": 2, "lr": 5e-3, "eval_step": 10}
KMEANS = {"faiss": rqkmeans_faiss, "constrained": rqkmeans_constrained}
N, DIM = 300, 10


def clustered() -> np.ndarray:
    """96 points in 12 dimensions around 8 centres."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(8, 12))[rng.integers(8, size=96)] + 0.2 * rng.normal(size=(96, 12))
    return points.astype(np.float32)


def points(n=N, dim=DIM, seed=0) -> np.ndarray:
    """n points around 20 centres."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(20, dim))[rng.integers(20, size=n)] + 0.3 * rng.normal(size=(n, dim))).astype(np.float32)


def normal(*shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def train(data_path, ckpt_dir, **options) -> None:
    """rq.rqvae with a tiny model."""
    rqvae.main(rqvae.Options(data_path=str(data_path), ckpt_dir=str(ckpt_dir), **{**TINY, **options}))


def index(ckpt, data, output, **options) -> Path:
    """rq.generate_indices; returns the index file."""
    paths = {"ckpt_path": str(ckpt), "data_path": str(data), "output_file": str(output)}
    generate_indices.main(generate_indices.Options(**paths, device="cpu", **options))
    return output


def kmeans(method, data_path, output, **options) -> CodebookFile:
    """rq.rqkmeans_<method> with 2 levels of 32 codes; returns the codebooks."""
    script = KMEANS[method]
    given = {"k": 32, "l": 2, "max_iter": 8, "collision": "none"} | options
    script.main(script.Options(data_path=str(data_path), output_file=str(output), **given))
    return read_codebooks(output.with_name(f"{dataset_name(output)}.codebooks_{method}.npz"), "codebook_path")


def plus(data_path, folder, books, **options) -> None:
    """rq.rqkmeans_plus with a tiny model."""
    paths = {"data_path": str(data_path), "ckpt_dir": str(folder), "pretrained_codebook_path": str(books)}
    rqkmeans_plus.main(rqkmeans_plus.Options(**paths, device="cpu", **TINY_PLUS | options))


def refusal(script, *arguments) -> str:
    """The line on stderr of a command that ends with exit code 2; there must be only one line."""
    stderr = io.StringIO()
    command = [script.__name__, *map(str, arguments)]
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as end:
        run(script.main, script.Options)
    lines = stderr.getvalue().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), stderr.getvalue()
    return lines[0]
