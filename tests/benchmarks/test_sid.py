"""benchmarks/sid.py runs at a tiny size, every part."""

import json

import pytest
from helpers import run_stage

from benchmarks import sid
from minionerec.common.errors import UserError


def test_the_command():
    tiny = ["--rows", "40", "--dim", "8", "--layers", "4", "--batch_size", "20", "--workers", "1", "--repeats", "1"]
    tiny += ["--sizes", "300", "400", "--codes", "64", "--million", "2000"]
    done = run_stage("benchmarks.sid", *tiny, "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"rqvae_ratio", "flow_seconds", "transport_cost_400", "million_gib", "collision_seconds"} <= set(result)
    assert result["transport_cost_300"] >= 0.999  # the flow is exact


def test_an_unknown_part():
    with pytest.raises(UserError, match="--part other: expected some of rqvae"):
        sid.Options(part=["other"])
