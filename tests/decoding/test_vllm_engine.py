"""vLLM generates what the tree search generates: the same lists and scores, in both spaces, and legal, exact samples.

Guarded besides: new weights are taken over, random states of the process are left alone, and what vLLM cannot run is one
line. Both of vLLM's interfaces for logits processors give the same logits.
"""

from types import SimpleNamespace

import pytest
import torch
from decoding.small_models import MIXED, SMALL, VOCABULARY, random_model, random_sids
from transformers import Qwen2Config

from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.decoding.engine import TransformersEngine, vllm_engine

pytest.importorskip("vllm", reason="vLLM is not installed: requirements-vllm.txt or requirements-vllm-cpu.txt")
pytestmark = pytest.mark.vllm

SIDS = [*random_sids(120), (30,), (31,), (32, 50), *MIXED[:3]]
PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 1, 2], [3]]
EXCLUDED = [[0, 1, 2, 3, 120], [], list(range(1, len(SIDS)))]
END = VOCABULARY - 1


@pytest.fixture(scope="module")
def model():
    """Heads of 32, the smallest that vLLM's attention on a CPU supports."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64}
    config = Qwen2Config(vocab_size=VOCABULARY, **SMALL | heads)
    model = random_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1.0)  # flatter: places among the beams matter
    return model


@pytest.fixture(scope="module", params=["vocab", "catalog"])
def engines(request, model, tmp_path_factory):
    """(vLLM's engine, ours) over one model."""
    folder = tmp_path_factory.mktemp("vllm")
    model.save_pretrained(folder)
    trie = Trie.build(SIDS)
    engine = vllm_engine(str(folder), trie, END, request.param)
    yield engine, TransformersEngine(model, trie, 0, request.param)
    engine.close()


def assert_same(found, expected):
    assert torch.equal(found.row, expected.row)
    torch.testing.assert_close(found.score, expected.score, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_beams", [1, 7, 50, len(SIDS) + 1])
def test_lists_and_scores_are_those_of_the_tree_search(engines, num_beams, temperature):
    found, expected = (
        engine.beam_search(PROMPTS, num_beams, exclusions=[None, EXCLUDED], temperature=temperature, length_penalty=0.5)
        for engine in engines
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_samples_are_legal_and_their_scores_exact(engines):
    """10,000 of them in the two spaces, half with SIDs excluded."""
    engine, ours = engines
    [every] = ours.beam_search(PROMPTS, len(SIDS), temperature=0.7)
    exact = torch.zeros(len(PROMPTS), len(SIDS)).scatter(1, every.row, every.score)
    free = engine.sample(PROMPTS[:2], 1250, temperature=0.7, top_p=0.9, seed=3)
    assert {SIDS[row] for row in free.row.flatten().tolist()} <= set(SIDS) and free.row.min() >= 0
    torch.testing.assert_close(free.score, exact[:2].gather(1, free.row), atol=1e-4, rtol=0)
    kept = engine.sample(PROMPTS[:2], 1250, excluded=EXCLUDED[:2], seed=3)
    assert not set(EXCLUDED[0]) & set(kept.row[0].tolist()) and len(set(kept.row[0].tolist())) > 5
    with pytest.raises(ValueError, match="no SID to draw"):
        engine.sample(PROMPTS[:1], 2, excluded=[list(range(len(SIDS)))])


def test_samples_follow_the_exact_distribution(engines):
    """Chi-square over a catalog of eight SIDs of all depths, at the level of 1 in 1,000."""
    kept = [0, 1, 60, *range(len(SIDS) - 5, len(SIDS))]
    excluded = [[row for row in range(len(SIDS)) if row not in kept]] * 2
    (engine, ours), temperature = engines, 1.4
    exact = TransformersEngine(ours.model, ours.trie, 0, "catalog")  # what is drawn, whatever the scores
    [every] = exact.beam_search(PROMPTS[:2], 8, exclusions=[excluded], temperature=temperature)
    drawn = engine.sample(PROMPTS[:2], 2000, temperature=temperature, seed=1, excluded=excluded)
    for prompt in range(2):
        expected = torch.zeros(len(SIDS)).scatter(0, every.row[prompt], every.score[prompt].exp())[kept]
        if engine.space == "catalog":
            assert expected.sum().item() == pytest.approx(1, abs=1e-4)
        counts = torch.bincount(drawn.row[prompt], minlength=len(SIDS))[kept]
        seen = expected * 2000 > 5
        chi_square = ((counts - expected * 2000) ** 2 / (expected * 2000))[seen].sum().item()
        assert seen.sum() > 3 and chi_square < [10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1][seen.sum() - 1]


def test_samples_repeat_by_seed(engines):
    one, again, other = (engines[0].sample(PROMPTS, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.row, again.row) and not torch.equal(one.row, other.row)
    assert not torch.equal(one.row[0], one.row[0, :1].expand(20))


def test_the_random_states_of_the_process_are_left_alone(engines):
    before = torch.get_rng_state()
    engines[0].beam_search(PROMPTS, 5)
    engines[0].sample(PROMPTS, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_new_weights_are_taken_over(engines):
    engine, ours = engines
    [before] = engine.beam_search(PROMPTS, 20)
    saved = {name: parameter.clone() for name, parameter in ours.model.named_parameters()}
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    engine.sync(ours.model.named_parameters())
    [found], [expected] = (each.beam_search(PROMPTS, 20) for each in engines)
    assert_same(found, expected)
    assert not torch.allclose(before.score, found.score, atol=1e-2)
    with torch.no_grad():
        for name, parameter in ours.model.named_parameters():
            parameter.copy_(saved[name])
    engine.sync(ours.model.named_parameters())
    assert_same(engine.beam_search(PROMPTS, 20)[0], before)


def test_what_cannot_be_generated_is_one_line(engines):
    engine = engines[0]
    with pytest.raises(UserError, match=f"a prompt of {engine.limit} tokens and a SID of 4 are more than the"):
        engine.beam_search([[1] * engine.limit], 5)
    weights = [
        (name, torch.full_like(value, torch.nan) if name == "model.norm.weight" else value)
        for name, value in engines[1].model.named_parameters()
    ]
    engine.sync(weights)
    for generate in (engine.beam_search, engine.sample):
        with pytest.raises(UserError, match="not finite"):
            generate(PROMPTS, 5)
    engine.sync(engines[1].model.named_parameters())


def test_the_end_token_must_not_be_a_sid_token(tmp_path):
    with pytest.raises(UserError, match="the end-of-sequence token 10 is a SID token"):
        vllm_engine(str(tmp_path), Trie.build(MIXED), 10, "vocab")


def test_heads_that_a_cpu_does_not_support_are_one_line(tmp_path):
    random_model(Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=4, **SMALL)).save_pretrained(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="heads of size 8, vLLM on a CPU supports 32, 64"):
            vllm_engine(str(tmp_path), Trie.build(MIXED), END, "vocab")


# ------------------------------------------------------------------------------------------------ processors


def test_both_interfaces_give_the_same_logits(tmp_path):
    """The V2 runner needs CUDA: here its processor reads tensors like those that the runner would give it."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from minionerec.decoding.vllm_engine import TrieProcessorV1, TrieProcessorV2

    Trie.build(MIXED).save(tmp_path / "trie")
    settings = {"trie": str(tmp_path / "trie"), "space": "catalog", "end_token": END}
    config = SimpleNamespace(additional_config=settings, speculative_config=None)
    parameters = [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=0.0, extra_args={"sid_temperature": 2.0, "sid_excluded": [0, 5]}),
        SamplingParams(extra_args={"sid_node": 2}),
        SamplingParams(extra_args={"sid_excluded": [1, 2]}),
    ]
    prompts, outputs = [[1, 2, 3], [4], [5, 6], [7, 8]], [[10, 51], [], [], [11]]
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))

    one = TrieProcessorV1(config, torch.device("cpu"), False)
    one.update_state(BatchUpdate(4, [], list(zip(range(4), parameters, prompts, outputs, strict=True)), []))
    expected = one.apply(logits.clone())
    assert ((expected > -torch.inf).sum(1) >= 1).all() and not torch.equal(expected[0], expected[1])

    slots = [3, 0, 5, 1]
    history, prompt_len = torch.full((6, 10), 99), torch.zeros(6, dtype=torch.long)
    for slot, prompt, output in zip(slots, prompts, outputs, strict=True):
        history[slot, : len(prompt + output)] = torch.tensor(prompt + output)
        prompt_len[slot] = len(prompt)
    states = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=6)
    states.all_token_ids, states.prompt_len = SimpleNamespace(gpu=history), SimpleNamespace(gpu=prompt_len)
    two = TrieProcessorV2(config, states)
    assert all(two.add_request(slot, given) for slot, given in zip(slots, parameters, strict=True))
    last = torch.tensor([len(prompt + output) - 1 for prompt, output in zip(prompts, outputs, strict=True)])
    context = SimpleNamespace(expanded_idx_mapping=torch.tensor(slots), idx_mapping_np=slots, pos=last)
    assert torch.equal(two.apply(logits.clone(), context), expected)


@pytest.mark.parametrize("given", [{"sid_node": -1}, {"sid_temperature": 0}, {"sid_excluded": [-2]}, {"sid_node": "a"}])
def test_wrong_values_of_a_request_are_refused(given):
    from vllm import SamplingParams

    from minionerec.decoding.vllm_engine import TrieProcessorV1, TrieProcessorV2

    for processor in (TrieProcessorV1, TrieProcessorV2):
        with pytest.raises(ValueError):
            processor.validate_params(SamplingParams(extra_args=given))
