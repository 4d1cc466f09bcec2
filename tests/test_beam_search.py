import itertools
import math
import random

import pytest
import torch
from conftest import QWEN_TOKENIZER
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from beam_search import beam_search, left_pad, recommend, sample
from catalog import Trie

VOCABULARY = 160
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **SMALL),
    "qwen3": lambda: Qwen3Config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, **SMALL),
    "llama": lambda: LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, **SMALL),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
}


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.generation_config.pad_token_id = 0
    return model


def random_sids(n, seed=0):
    rng = random.Random(seed)
    return sorted({(10 + rng.randrange(20), 50 + rng.randrange(20), 90 + rng.randrange(20)) for _ in range(n)})


def prompts_of(lengths):
    return left_pad([[1 + (7 * i + length) % 9 for i in range(length)] for length in lengths], 0, "cpu")


def transformers_beams(model, sids, ids, mask, beams, **kwargs):
    """The same search by `generate` under a Python dictionary: (sequences, scores)."""
    children = {}
    for sid in sids:
        for depth in range(len(sid)):
            children.setdefault(sid[:depth], set()).add(sid[depth])
    start = ids.shape[1]
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=len(sids[0]),
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=lambda _, tokens: sorted(children[tuple(tokens.tolist()[start:])]),
        return_dict_in_generate=True,
        output_scores=True,
        **kwargs,
    )
    sequences = [tuple(s) for s in output.sequences[:, start:].tolist()]
    return sequences, output.sequences_scores


@pytest.mark.parametrize("architecture", CONFIGS)
def test_equals_transformers_beam_search(architecture):
    model, sids = random_model(CONFIGS[architecture]()), random_sids(150)
    ids, mask = prompts_of([4, 9, 6])
    expected, scores = transformers_beams(model, sids, ids, mask, beams=12)
    beams = beam_search(model, Trie.build(sids), ids, mask, num_beams=12)
    assert [sids[leaf] for leaf in beams.leaf.flatten().tolist()] == expected
    torch.testing.assert_close(beams.score.flatten(), scores, atol=1e-4, rtol=0)


@pytest.mark.skipif(not QWEN_TOKENIZER.exists(), reason="the Qwen2.5 tokenizer is not beside the project")
def test_equals_transformers_with_a_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(QWEN_TOKENIZER)
    tokenizer.add_tokens([f"<{letter}_{code}>" for letter in "abc" for code in range(16)])
    model = random_model(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **SMALL))
    rng = random.Random(1)
    texts = sorted({f"<a_{rng.randrange(16)}><b_{rng.randrange(16)}><c_{rng.randrange(16)}>" for _ in range(200)})
    sids = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    assert {len(sid) for sid in sids} == {3}
    ids, mask = left_pad(tokenizer(["Next: <a_1><b_2><c_3>\n", "A title, and more\nAnswer:\n"])["input_ids"], 0, "cpu")
    expected, scores = transformers_beams(model, sids, ids, mask, beams=10)
    beams = beam_search(model, Trie.build(sids), ids, mask, num_beams=10)
    assert [sids[leaf] for leaf in beams.leaf.flatten().tolist()] == expected
    torch.testing.assert_close(beams.score.flatten(), scores, atol=1e-3, rtol=0)


def log_prob(model, prompt, sid, temperature=1.0):
    """Sum of a SID's token log-probabilities after a prompt, by one plain forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + list(sid)])).logits[0].float() / temperature
    picked = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return picked[range(len(sid)), list(sid)].sum().item()


def test_wide_search_scores_every_sid_of_a_mixed_depth_catalog():
    model = random_model(CONFIGS["qwen2"]())
    sids = [(10, 50), (10, 51, 90), (10, 51, 91, 120), (11,), (12, 50, 90), (12, 50, 91)]
    prompt = [3, 4, 5]
    beams = beam_search(model, Trie.build(sids), torch.tensor([prompt]), torch.ones(1, 3, dtype=torch.long), 100)
    assert sorted(beams.leaf[0].tolist()) == list(range(len(sids)))  # min(K, catalog), each once
    for leaf, score in zip(beams.leaf[0].tolist(), beams.score[0].tolist(), strict=True):
        assert score == pytest.approx(log_prob(model, prompt, sids[leaf]), abs=1e-4)
    assert beams.score[0].tolist() == sorted(beams.score[0].tolist(), reverse=True)


@pytest.mark.parametrize("num_beams", [1, 2, 5, 7, 149, 150, 400])
def test_returns_min_of_beams_and_catalog_distinct(num_beams):
    model = random_model(CONFIGS["qwen2"]())
    rng = random.Random(2)
    sids = [(30 + i,) for i in range(4)] + random_sids(300)[:146]  # four end at once, beside deeper ones
    rng.shuffle(sids)
    ids, mask = prompts_of([3, 5])
    beams = beam_search(model, Trie.build(sids), ids, mask, num_beams)
    for row in beams.leaf.tolist():
        assert len(set(row)) == len(row) == min(num_beams, len(sids))
    assert beams.score.isfinite().all()


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("num_beams", [3, 12])
def test_equals_a_plain_loop_on_mixed_depth(num_beams, seed):
    """Beams in Python, a forward each; what ended waits apart and takes no running beam's place."""
    model = random_model(CONFIGS["qwen2"]())
    sids = sorted([(30 + i,) for i in range(9)] + [(40 + i, 50 + i) for i in range(9)] + random_sids(12, seed=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0)  # flat enough that places among the beams matter
    prompt, running, done = [3, 4, seed], [(0.0, ())], []
    while running:
        reached = []
        for score, prefix in running:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + list(prefix)])).logits[0, -1].float()
            log_probs = torch.log_softmax(logits, -1)
            following = {sid[: len(prefix) + 1] for sid in sids if sid[: len(prefix)] == prefix}
            reached += [(score + log_probs[longer[-1]].item(), longer) for longer in following]
        done = sorted(done + [beam for beam in reached if beam[1] in sids], reverse=True)[:num_beams]
        running = sorted((beam for beam in reached if beam[1] not in sids), reverse=True)[:num_beams]
    beams = beam_search(model, Trie.build(sids), torch.tensor([prompt]), torch.ones(1, 3, dtype=torch.long), num_beams)
    assert [sids[leaf] for leaf in beams.leaf[0].tolist()] == [sid for _, sid in done]
    assert beams.score[0].tolist() == pytest.approx([score for score, _ in done], abs=1e-4)


def test_generation_config_has_no_say():
    model, sids = random_model(CONFIGS["qwen2"]()), random_sids(60)
    ids, mask = prompts_of([4, 7])
    before = beam_search(model, Trie.build(sids), ids, mask, 8)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=1, repetition_penalty=9.0, max_new_tokens=1)
    after = beam_search(model, Trie.build(sids), ids, mask, 8)
    assert torch.equal(before.leaf, after.leaf) and torch.equal(before.score, after.score)


def test_the_root_does_not_depend_on_the_prompts_last_tokens():
    """The first generated token is a child of the root after any prompt, even one that ends inside a SID."""
    model, sids = random_model(CONFIGS["qwen2"]()), random_sids(40)
    trie = Trie.build(sids)
    for prompt in ([1, 2, 3], [10, 50], [*sids[0]], [*sids[5][:2]], [2, sids[0][0]], [sids[9][0]], [0]):
        beams = beam_search(model, trie, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long), 5)
        for leaf, score in zip(beams.leaf[0].tolist(), beams.score[0].tolist(), strict=True):
            assert score == pytest.approx(log_prob(model, prompt, sids[leaf]), abs=1e-4)


def test_padding_batching_and_temperature():
    model, sids = random_model(CONFIGS["gpt2"]()), random_sids(60)
    trie, lengths = Trie.build(sids), [3, 8, 5, 12]
    ids, mask = prompts_of(lengths)
    together = beam_search(model, trie, ids, mask, 6, temperature=0.7)
    for row, length in enumerate(lengths):
        alone = beam_search(
            model, trie, ids[row : row + 1, -length:], mask[row : row + 1, -length:], 6, temperature=0.7
        )
        assert alone.leaf[0].tolist() == together.leaf[row].tolist()
        torch.testing.assert_close(alone.score[0], together.score[row], atol=1e-4, rtol=0)
    best = sids[together.leaf[0, 0]]
    assert together.score[0, 0].item() == pytest.approx(log_prob(model, ids[0, -3:].tolist(), best, 0.7), abs=1e-4)


def test_length_penalty_divides_by_the_length():
    model = random_model(CONFIGS["qwen2"]())
    sids = [(10, 50), (11, 50, 90, 120), (12,)]
    arguments = (model, Trie.build(sids), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.long), 3)
    plain = dict(zip(*[t[0].tolist() for t in beam_search(*arguments)], strict=True))
    divided = dict(zip(*[t[0].tolist() for t in beam_search(*arguments, length_penalty=1.0)], strict=True))
    for leaf, sid in enumerate(sids):
        assert divided[leaf] == pytest.approx(plain[leaf] / len(sid), abs=1e-5)


def test_broken_weights_are_an_error():
    model, sids = random_model(CONFIGS["qwen2"]()), random_sids(20)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        beam_search(model, Trie.build(sids), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.long), 3)


def test_recommend_keeps_the_order_of_prompts_and_the_mode(policy):
    trie = policy.catalog.trie(policy.tokenizer)
    prompts = ["Answer:\n", "A much longer prompt, of many more tokens\nAnswer:\n", "<a_1><b_2>", "x"]
    policy.model.train()
    many = recommend(policy.model, policy.tokenizer, trie, prompts, 5, batch_size=3)
    assert policy.model.training
    policy.model.eval()
    for prompt, leaves, scores in zip(prompts, *many, strict=True):
        alone = recommend(policy.model, policy.tokenizer, trie, [prompt], 5, batch_size=1)
        assert alone[0][0].tolist() == leaves.tolist()
        assert alone[1][0] == pytest.approx(scores, abs=1e-4)


def test_every_prediction_is_in_the_catalog(policy):
    trie = policy.catalog.trie(policy.tokenizer)
    leaves, _ = recommend(policy.model, policy.tokenizer, trie, ["a", "b c"], 1000, batch_size=2)
    for row in leaves:
        assert sorted(row) == list(range(len(policy.catalog.sids)))
    legal = set(itertools.chain.from_iterable([policy.catalog.sids]))
    assert {policy.catalog.sids[i] for i in leaves.flatten()} == legal


# ------------------------------------------------------------------------------------------------ catalog space


def catalog_log_prob(model, prompt, sid, sids, temperature=1.0):
    """A SID's log-probability renormalised, token by token, over what the SIDs allow: plain forwards, a Python set."""
    total = 0.0
    for depth in range(len(sid)):
        allowed = sorted({other[depth] for other in sids if other[:depth] == sid[:depth] and len(other) > depth})
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + list(sid[:depth])])).logits[0, -1].float() / temperature
        total += torch.log_softmax(logits[allowed], -1)[allowed.index(sid[depth])].item()
    return total


MIXED = [(10, 50), (10, 51, 90), (10, 51, 91, 120), (11,), (12, 50, 90), (12, 50, 91), (13, 10, 50)]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_catalog_space_normalises_over_what_the_trie_allows(architecture):
    model = random_model(CONFIGS[architecture]())
    prompt = [3, 4, 5]
    beams = beam_search(
        model, Trie.build(MIXED), torch.tensor([prompt]), torch.ones(1, 3, dtype=torch.long), 9, 0.8, space="catalog"
    )
    assert sorted(beams.leaf[0].tolist()) == list(range(len(MIXED)))
    assert beams.score[0].exp().sum().item() == pytest.approx(1.0, abs=1e-5)  # a distribution over the catalog
    for leaf, score in zip(beams.leaf[0].tolist(), beams.score[0].tolist(), strict=True):
        assert score == pytest.approx(catalog_log_prob(model, prompt, MIXED[leaf], MIXED, 0.8), abs=1e-4)


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_samples_follow_the_policy_over_the_catalog(space):
    model = random_model(CONFIGS["qwen2"]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1.0)
    ids, mask = prompts_of([3, 5])
    trie, n = Trie.build(MIXED), 4000
    drawn = sample(model, trie, ids, mask, n, temperature=1.3, space=space, generator=torch.Generator().manual_seed(0))
    for row, prompt in enumerate((ids[0, 2:].tolist(), ids[1].tolist())):
        share = torch.bincount(drawn.leaf[row], minlength=len(MIXED)) / n
        for leaf, sid in enumerate(MIXED):
            policy = catalog_log_prob(model, prompt, sid, MIXED, 1.3)
            score = policy if space == "catalog" else log_prob(model, prompt, sid, 1.3)
            assert share[leaf].item() == pytest.approx(math.exp(policy), abs=0.04)
            for found in drawn.score[row][drawn.leaf[row] == leaf][:3].tolist():
                assert found == pytest.approx(score, abs=1e-4)


def test_samples_repeat_by_seed_and_keep_to_the_nucleus():
    model = random_model(CONFIGS["llama"]())
    ids, mask = prompts_of([3, 5])
    trie = Trie.build(MIXED)
    one, again, other = (
        sample(model, trie, ids, mask, 50, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one.leaf, again.leaf) and not torch.equal(one.leaf, other.leaf)
    greedy = sample(model, trie, ids, mask, 20, top_p=1e-6)
    for row, prompt in enumerate((ids[0, 2:].tolist(), ids[1].tolist())):
        prefix = ()
        while prefix not in MIXED:  # the likeliest token at each step
            following = sorted({sid[: len(prefix) + 1] for sid in MIXED if sid[: len(prefix)] == prefix})
            logits = model(input_ids=torch.tensor([prompt + list(prefix)])).logits[0, -1]
            prefix = max(following, key=lambda longer, logits=logits: logits[longer[-1]].item())
        assert {MIXED[leaf] for leaf in greedy.leaf[row].tolist()} == {prefix}
