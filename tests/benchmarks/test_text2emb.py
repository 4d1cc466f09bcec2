"""benchmarks/text2emb.py runs at a tiny size."""

import json

import small_encoders
from helpers import run_stage


def test_the_command(world, tmp_path):
    folder = small_encoders.write("sentence_t5", tmp_path / "encoder")
    done = run_stage("benchmarks.text2emb", "--items", world.items, "--encoder", folder, "--rows", "20", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ratio"] > 0 and set(result["seconds"]) == {"plain", "ours"} and result["difference"] < 1e-5
    assert done.stdout.splitlines()[-4].startswith("20 items; seconds")
