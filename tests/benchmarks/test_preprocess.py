"""benchmarks/preprocess.py runs at a tiny size."""

import json

from helpers import run_stage


def test_the_command(tmp_path):
    done = run_stage("benchmarks.preprocess", "--interactions", "20000", "--folder", tmp_path, "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["seconds"] > 0 and 0 < result["gib"] < 6 and 10_000 < result["interactions"] <= 20_000
    assert "20,000 interactions, after the 5-core" in done.stdout and not list(tmp_path.iterdir())
