"""ReReTrainer: shared-prompt log-probabilities equal TRL's row-by-row ones, groups stay whole, targets stay put."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from beam_search import left_pad
from data import Prompts, next_sid_prompts, read_sequences, rl_rows
from minionerec_trainer import ReReTrainer, run_lengths_gcd
from rewards import reward_functions, rule
from tree_attention import branch_mask_and_positions, positions


def make_trainer(policy, world, folder, rewards=None, rows=None, **kwargs):
    items = policy.items
    sequences = read_sequences(world.train, items.sids, "train_file")
    columns = rows or rl_rows(sequences, items, Prompts(category="toys"))
    policy.model.save_pretrained(folder / "policy")
    policy.tokenizer.save_pretrained(folder / "policy")
    model = type(policy.model).from_pretrained(folder / "policy")
    settings = dict(  # noqa: C408
        output_dir=str(folder / "out"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=3,
        learning_rate=1e-3,
        max_steps=3,
        beta=0.04,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    extra = {name: kwargs.pop(name) for name in ("add_gt", "test_beam", "validation", "eval_beams") if name in kwargs}
    return ReReTrainer(
        model=model,
        processing_class=policy.tokenizer,
        reward_funcs=rewards or reward_functions("ranking", 4),
        args=GRPOConfig(**(settings | kwargs)),
        train_dataset=Dataset.from_dict(columns),
        catalog=policy.catalog,
        **extra,
    )


def batch_of(policy, prompts, group, seed=0):
    """Left-padded prompts repeated `group` times, followed by SIDs of the catalog, as TRL hands them over."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = left_pad(policy.tokenizer(prompts)["input_ids"], policy.tokenizer.pad_token_id, "cpu")
    ids, mask = ids.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)
    picks = torch.randint(len(policy.catalog.sids), (len(ids),), generator=generator).tolist()
    sids = torch.tensor([policy.tokenizer(policy.catalog.sids[i])["input_ids"] for i in picks])
    completion_mask = torch.ones_like(sids)
    completion_mask[1::3, -1] = 0  # some completions are shorter
    return torch.cat([ids, sids], 1), torch.cat([mask, completion_mask], 1), completion_mask.bool()


PROMPTS = ["Next ID after these toys:\n<a_0><b_1><c_2>\nAnswer:\n", "x\nAnswer:\n", "<a_1>"]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_gradients_equal_row_by_row(policy, world, tmp_path, temperature):
    trainer = make_trainer(policy, world, tmp_path, temperature=temperature)
    trainer.model.double()  # so that only a difference in what is computed can show
    ids, mask, kept = batch_of(policy, PROMPTS, group=4)
    weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)) * kept

    def run(method):
        trainer.model.zero_grad()
        log_probs, entropies, _ = method(trainer, trainer.model, ids, mask, 3, compute_entropy=True)
        (log_probs * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        return log_probs.detach(), entropies.detach(), gradients

    ours = run(ReReTrainer._get_per_token_logps_and_entropies)
    plain = run(GRPOTrainer._get_per_token_logps_and_entropies)
    for mine, theirs in zip(ours[:2], plain[:2], strict=True):
        torch.testing.assert_close(mine[kept], theirs[kept], atol=1e-4, rtol=1e-5)
    assert ours[2].keys() == plain[2].keys()
    for name in plain[2]:
        scale = plain[2][name].abs().max()
        torch.testing.assert_close(ours[2][name], plain[2][name], atol=1e-5 * float(scale) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [None, 4, 8, 1])
def test_chunks_and_torn_groups_give_the_same(policy, world, tmp_path, batch_size):
    trainer = make_trainer(policy, world, tmp_path)
    trainer.model.double()
    ids, mask, kept = batch_of(policy, PROMPTS, group=4)
    with torch.no_grad():
        whole = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)[0]
        part = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3, batch_size=batch_size)[0]
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        torn = trainer._get_per_token_logps_and_entropies(trainer.model, ids[order], mask[order], 3)[0]
    torch.testing.assert_close(part[kept], whole[kept], atol=1e-4, rtol=0)
    torch.testing.assert_close(torn[kept[order]], whole[order][kept[order]], atol=1e-4, rtol=0)


def test_run_lengths():
    rows = torch.tensor([[1], [1], [1], [1], [2], [2]])
    assert run_lengths_gcd(rows) == 2 and run_lengths_gcd(rows[:4]) == 4 and run_lengths_gcd(rows[3:]) == 1


def test_branches_see_their_prompt_and_themselves_alone():
    trunk = torch.tensor([[0, 1, 1], [1, 1, 1]])
    mask, position_ids = branch_mask_and_positions(trunk, branches=2, length=2, dtype=torch.float32)
    visible = mask[:, 0] == 0
    assert position_ids.tolist() == [[0, 0, 1, 2, 3, 2, 3], [0, 1, 2, 3, 4, 3, 4]]
    assert visible[0, 3].tolist() == [False, True, True, True, False, False, False]
    assert visible[0, 6].tolist() == [False, True, True, False, False, True, True]
    assert visible[0, 0].tolist() == [True] + [False] * 6  # padding sees itself, so its softmax is defined
    assert positions(trunk).tolist() == [[0, 0, 1], [0, 1, 2]]


def test_training_moves_parameters_and_logs(policy, world, tmp_path):
    trainer = make_trainer(policy, world, tmp_path, test_beam=6)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.state_dict().items())
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"rewards/rule/mean", "rewards/ndcg/mean", "group/HR@4", "test/HR@6", "kl"} <= logged


def test_groups_are_beams_and_rows_keep_their_own_target(policy, world, tmp_path):
    """Every reward call sees whole groups: one prompt, distinct legal SIDs, that row's own target."""
    items = policy.items
    rows = rl_rows(read_sequences(world.train, items.sids, "train_file"), items, Prompts())
    # one prompt for all rows: a dictionary keyed by its text could hold only one of the targets
    rows["prompt"] = ["the same prompt"] * len(rows["prompt"])
    seen, calls = [], []

    def spy(prompts, completions, target_sid, target_item, **_):
        calls.append({target_item[start] for start in range(0, len(completions), 4)})
        for start in range(0, len(completions), 4):
            group = slice(start, start + 4)
            assert len(set(prompts[group])) == 1 and len(set(target_item[group])) == 1
            assert len(set(completions[group])) == 4
            assert all(c in policy.catalog.row_of_sid for c in completions[group])
            assert all(items.sids[i] == s for i, s in zip(target_item[group], target_sid[group], strict=True))
            seen.append(target_item[start])
        return rule(completions=completions, target_sid=target_sid)

    make_trainer(policy, world, tmp_path, rewards=[spy], rows=rows, max_steps=5).train()
    assert len(seen) == 10 and len(set(seen)) > 3
    assert any(len(targets) == 2 for targets in calls)  # equal prompts of one batch, each with its own target


def test_add_gt_puts_the_target_last_where_it_is_missing(policy, world, tmp_path):
    hits = []

    def spy(completions, target_sid, **_):
        values = rule(completions=completions, target_sid=target_sid)
        hits.extend(sum(values[i : i + 4]) for i in range(0, len(values), 4))
        assert all(len(set(completions[i : i + 4])) == 4 for i in range(0, len(values), 4))
        return values

    make_trainer(policy, world, tmp_path, rewards=[spy], add_gt=True).train()
    assert hits and set(hits) == {1.0}


def test_shuffle_keeps_groups_together(policy, world, tmp_path):
    trainer = make_trainer(
        policy, world, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1
    )
    widths = []
    original = ReReTrainer._get_per_token_logps_and_entropies

    def spy(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
        widths.append(run_lengths_gcd(input_ids[:, :-logits_to_keep]))
        return original(self, model, input_ids, attention_mask, logits_to_keep, **kwargs)

    trainer._get_per_token_logps_and_entropies = spy.__get__(trainer)
    trainer.train()
    assert len(widths) == 5 and all(width % 4 == 0 for width in widths)


def test_evaluation_is_beam_search_on_validation_rows(policy, world, tmp_path):
    items = policy.items
    valid = read_sequences(world.valid, items.sids, "eval_file")
    prompts = next_sid_prompts(valid, items, Prompts())
    trainer = make_trainer(policy, world, tmp_path, validation=(prompts, valid["target"].to_list()), eval_beams=1000)
    result = trainer.evaluate()
    assert result["eval_HR@50"] == 1.0  # all 47 SIDs, so every target is somewhere
    assert 0 < result["eval_NDCG@10"] < 1


def test_rl_learns_a_known_best_policy(policy, world, tmp_path):
    """One prompt, one target: rule + ndcg over beams must raise the target to the first place."""
    target = policy.items.sids[30]
    columns = {
        "prompt": ["Answer:\n"] * 64,
        "target_sid": [target] * 64,
        "target_item": [30] * 64,
        "history_items": [[1]] * 64,
        "task": ["sid_seq"] * 64,
    }
    trainer = make_trainer(
        policy,
        world,
        tmp_path,
        rows=columns,
        add_gt=True,
        max_steps=25,
        beta=0.0,
        lr_scheduler_type="constant",
        validation=(["Answer:\n"], [30]),
        eval_beams=10,
        learning_rate=3e-3,
    )
    assert trainer.evaluate()["eval_HR@1"] == 0.0
    trainer.train()
    assert trainer.evaluate()["eval_HR@1"] == 1.0
