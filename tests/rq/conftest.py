"""Embedding files that the tests of rq/ share."""

import numpy as np
import pytest
from rq_helpers import clustered, points


@pytest.fixture
def embedding_file(tmp_path):
    """96 points around 8 centres, for RQ-VAE."""
    path = tmp_path / "D.emb-tiny-td.npy"
    np.save(path, clustered())
    return path


@pytest.fixture
def kmeans_file(tmp_path):
    """300 points around 20 centres, for k-means."""
    path = tmp_path / "D.emb-tiny-td.npy"
    np.save(path, points())
    return path
