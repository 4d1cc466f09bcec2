"""ReReTrainer: shared-prompt log-probabilities equal TRL's row-by-row ones, groups stay whole, targets stay put."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from data import Prompts, next_sid_prompts, read_sequences, rl_rows
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.sids import split_sid
from minionerec.decoding.beam_search import beam_search, left_pad
from minionerec.decoding.tree_attention import branch_mask_and_positions, positions
from minionerec.rewards.functions import rule
from minionerec.rewards.registry import reward_functions
from minionerec_trainer import ReReTrainer, keep_target_first, run_lengths_gcd

OURS = ("add_gt", "test_beam", "validation", "eval_beams", "logp_space", "beams", "dynamic_sampling", "mask_all_zero")


def make_trainer(policy, world, folder, rewards=None, rows=None, trainer=ReReTrainer, **kwargs):
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
    extra = {name: kwargs.pop(name) for name in (*OURS, "peft_config") if name in kwargs}
    return trainer(
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
    sids = [torch.tensor(policy.tokenizer(policy.catalog.sids[i])["input_ids"]) for i in picks]
    completion_mask = pad_sequence([torch.ones_like(sid) for sid in sids], batch_first=True)
    completion_mask[1::3, -1] = 0  # some completions are shorter
    sids = pad_sequence(sids, batch_first=True, padding_value=policy.tokenizer.pad_token_id)
    return torch.cat([ids, sids], 1), torch.cat([mask, completion_mask], 1), completion_mask.bool()


PROMPTS = ["Next ID after these toys:\n<a_0><b_1><c_2>\nAnswer:\n", "x\nAnswer:\n", "<a_1>"]


def with_gradients(trainer, weights, method):
    """Log-probabilities and entropies of `method`, and every parameter's gradient of their weighted sum."""
    trainer.model.zero_grad()
    log_probs, entropies = method()
    ((log_probs + 0.1 * entropies) * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return {
        "log-probabilities": log_probs.detach() * (weights != 0),
        "entropies": entropies.detach() * (weights != 0),
    } | gradients


def assert_equal(ours, plain, tolerance):
    """Relative to the length of each tensor, and of the whole gradient; in bf16 a small tensor alone may err thrice."""
    assert ours.keys() == plain.keys() and len(plain) > 3

    def error(names):
        difference = torch.cat([(ours[name] - plain[name]).float().flatten() for name in names])
        return difference.norm() / torch.cat([plain[n].float().flatten() for n in names]).norm().clamp(min=1e-3)

    values = ["log-probabilities", "entropies"]
    gradients = [name for name in plain if name not in values]
    for names, allowed in [([n], 1) for n in values] + [([n], 1 if tolerance < 1e-3 else 3) for n in gradients]:
        assert error(names) <= allowed * tolerance, (names, float(error(names)))
    assert error(gradients) <= tolerance


def train_adapters(trainer):
    """Give every adapter weight a value: the new ones multiply by zero."""
    generator = torch.Generator().manual_seed(2)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=generator)


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")


@pytest.mark.parametrize(
    "settings, dtype, tolerance",
    [
        ({}, torch.float32, 1e-5),
        ({"temperature": 0.6}, torch.float32, 1e-5),
        ({"gradient_checkpointing": True}, torch.float32, 1e-5),
        ({"peft_config": LORA}, torch.float32, 1e-5),
        ({}, torch.bfloat16, 1e-2),
    ],
    ids=["plain", "temperature", "checkpointing", "lora", "bf16"],
)
def test_log_probs_and_gradients_equal_row_by_row(policy, world, tmp_path, settings, dtype, tolerance):
    trainer = make_trainer(policy, world, tmp_path, bf16=False, **settings)
    if "peft_config" in settings:
        train_adapters(trainer)
    trainer.model.to(dtype).train()
    if dtype == torch.bfloat16:  # weights as a trained model has them: large ones turn rounding into other attention
        for parameter in trainer.model.parameters():
            parameter.data.mul_(0.1 if parameter.ndim > 1 else 1.0)
    ids, mask, kept = batch_of(policy, PROMPTS, group=4)
    weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)) * kept

    def run(trainer_class):
        method = trainer_class._get_per_token_logps_and_entropies
        return with_gradients(
            trainer, weights, lambda: method(trainer, trainer.model, ids, mask, 3, compute_entropy=True)[:2]
        )

    assert_equal(run(ReReTrainer), run(GRPOTrainer), tolerance)


def brute_force(model, policy, ids, mask, length, temperature):
    """Each row alone; at each token a softmax over what a dictionary of SIDs allows. (log-probs, entropies)."""
    token_id = policy.tokenizer.convert_tokens_to_ids
    sids = [[token_id(token) for token in split_sid(sid)] for sid in policy.catalog.sids]
    log_probs, entropies = (torch.zeros(len(ids), length, dtype=model.dtype) for _ in range(2))
    for row, (tokens, real) in enumerate(zip(ids, mask, strict=True)):
        completion = [t for t, m in zip(tokens[-length:].tolist(), real[-length:].tolist(), strict=True) if m]
        prompt = tokens[:-length][real[:-length].bool()]
        logits = model(torch.cat([prompt, torch.tensor(completion)])[None]).logits[0, len(prompt) - 1 : -1]
        for place, token in enumerate(completion):
            allowed = sorted({sid[place] for sid in sids if sid[:place] == completion[:place] and len(sid) > place})
            values = torch.log_softmax(logits[place, allowed] / temperature, dim=-1)
            log_probs[row, place] = values[allowed.index(token)]
            entropies[row, place] = -(values.exp() * values).sum()
    return log_probs, entropies


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"peft_config": LORA, "gradient_checkpointing": True}],
    ids=["plain", "temperature", "lora"],
)
@pytest.mark.parametrize("mixed_depth", [False, True])
def test_catalog_log_probs_and_gradients_equal_brute_force(policy, world, tmp_path, settings, mixed_depth):
    catalog = policy.catalog
    if mixed_depth:  # some SIDs end a level earlier, where others branch
        catalog = Catalog(
            [sid if row % 5 else sid[: sid.rindex("<")] for row, sid in enumerate(catalog.sids) if row % 4 == 0]
        )
        assert {len(split_sid(sid)) for sid in catalog.sids} == {2, 3}
    policy = SimpleNamespace(**vars(policy) | {"catalog": catalog})
    trainer = make_trainer(policy, world, tmp_path, logp_space="catalog", bf16=False, **settings)
    if "peft_config" in settings:
        train_adapters(trainer)
    trainer.model.double().train()
    ids, mask, kept = batch_of(policy, PROMPTS, group=4)
    weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)).double() * kept
    temperature = settings.get("temperature", 1.0)

    ours = with_gradients(
        trainer,
        weights,
        lambda: trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3, compute_entropy=True)[:2],
    )
    plain = with_gradients(trainer, weights, lambda: brute_force(trainer.model, policy, ids, mask, 3, temperature))
    assert_equal(ours, plain, 1e-5)
    assert (ours["log-probabilities"] <= 0).all() and ours["log-probabilities"].min() < -0.1


class RowByRow(ReReTrainer):
    _get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies


@pytest.mark.parametrize("settings", [{"num_iterations": 2}, {"gradient_accumulation_steps": 2, "loss_type": "dapo"}])
def test_training_equals_row_by_row(policy, world, tmp_path, settings):
    """Old, reference and current policy through whole steps: two runs, one trajectory."""
    settings |= {"max_steps": 4, "optim": "sgd", "learning_rate": 1e-2, "bf16": False, "beta": 0.1, "max_grad_norm": 0}
    ours, plain = (make_trainer(policy, world, tmp_path, trainer=t, **settings) for t in (ReReTrainer, RowByRow))
    start = copy.deepcopy(ours.model.state_dict())
    for trainer in (ours, plain):
        trainer.train()
    moved = 0.0
    for name, expected in plain.model.state_dict().items():
        change, wanted = ours.model.state_dict()[name] - start[name], expected - start[name]
        moved = max(moved, float(wanted.abs().max()))
        assert (change - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-7, name
    assert moved > 1e-4


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


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_a_mixture_of_experts_trains(policy, world, tmp_path, space):
    """Without the load-balancing loss, which TRL would add and transformers cannot compute under a tree mask."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen2MoeConfig(
        vocab_size=len(policy.tokenizer),
        shared_expert_intermediate_size=16,
        output_router_logits=True,
        **sizes,
        **heads,
    )
    torch.manual_seed(0)
    experts = SimpleNamespace(**(vars(policy) | {"model": Qwen2MoeForCausalLM(config)}))
    trainer = make_trainer(experts, world, tmp_path, logp_space=space, add_gt=True)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


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


def test_groups_are_drawn_in_the_space_of_their_log_probs(policy, world, tmp_path):
    """The score by which beams were ranked is the sum of the log-probabilities that the loss sees."""
    ids, mask = left_pad(policy.tokenizer(PROMPTS)["input_ids"], policy.tokenizer.pad_token_id, "cpu")
    found = {}
    for space in ("vocab", "catalog"):
        trainer = make_trainer(policy, world, tmp_path, logp_space=space, bf16=False, temperature=0.7)
        beams = beam_search(trainer.model, trainer.trie, ids, mask, 4, 0.7, space=space)
        targets = torch.zeros(len(ids), 1, dtype=torch.long)
        assert torch.equal(trainer._draw(trainer.model, ids, mask, targets), beams.row)
        completions = torch.tensor([trainer.completion_of_leaf[leaf] for leaf in beams.row.flatten().tolist()])
        rows = torch.cat([ids.repeat_interleave(4, 0), completions], 1)
        real = torch.cat([mask.repeat_interleave(4, 0), torch.ones_like(completions)], 1)
        with torch.no_grad():
            log_probs = trainer._get_per_token_logps_and_entropies(trainer.model, rows, real, 3)[0]
        torch.testing.assert_close(log_probs.sum(1), beams.score.flatten(), atol=1e-4, rtol=0)
        found[space] = beams.score
    assert (found["catalog"] > found["vocab"] + 0.1).all()


def test_which_of_the_drawn_are_kept():
    leaf = torch.tensor([[3, 5, 3, 7, 5, 9], [1, 1, 1, 1, 2, 1], [4, 6, 4, 4, 4, 4]])
    kept = keep_target_first(leaf, torch.tensor([[5], [1], [8]]), 4)
    assert kept.tolist() == [[3, 5, 7, 5], [1, 1, 1, 1], [4, 6, 4, 4]]


@pytest.mark.parametrize("dynamic_sampling", [False, True])
def test_sampled_groups(policy, world, tmp_path, dynamic_sampling):
    """Repeatable by step, legal, most probable first; dynamic sampling never loses a target that it drew."""
    settings = {"beams": False, "dynamic_sampling": dynamic_sampling, "num_generations": 8}
    trainer = make_trainer(policy, world, tmp_path, rewards=reward_functions("ranking", 8), **settings)
    ids, mask = left_pad(policy.tokenizer(PROMPTS)["input_ids"], policy.tokenizer.pad_token_id, "cpu")
    targets = beam_search(trainer.model, trainer.trie, ids, mask, 1).row  # likely to be drawn
    groups = trainer._draw(trainer.model, ids, mask, targets)
    assert torch.equal(groups, trainer._draw(trainer.model, ids, mask, targets))
    trainer.state.global_step = 1
    assert not torch.equal(groups, trainer._draw(trainer.model, ids, mask, targets))
    assert groups.shape == (3, 8) and (groups == targets).any()
    scores = beam_search(trainer.model, trainer.trie, ids, mask, 1000)
    for group, leaf, score in zip(groups, scores.row, scores.score, strict=True):
        place = [leaf.tolist().index(sid) for sid in group.tolist()]
        assert place == sorted(place) and score.isfinite().all()
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert 1 <= logged["group/distinct"] <= 8 and 0 <= logged["group/dead"] <= 1
    assert min(logged[f"seconds/{part}"] for part in ("generation", "log_probs", "update")) > 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "sapo", "luspo", "cispo", "vespo"])
def test_dead_groups_leave_the_loss(policy, world, tmp_path, loss_type):
    """With mask_all_zero, loss and gradients are those of the live groups by themselves, KL included."""

    def second_group_alone_differs(completions, **_):
        return [0.1] * 4 + [0.0, 1.0, 0.5, 0.0]

    settings = {"loss_type": loss_type, "beta": 0.1, "bf16": False, "gradient_accumulation_steps": 1}
    if loss_type == "luspo":
        settings["importance_sampling_level"] = "sequence"
    rewards = [second_group_alone_differs]
    trainer = make_trainer(policy, world, tmp_path, rewards=rewards, mask_all_zero=True, **settings)
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i // 4] for i in range(8)]
    for parameter in trainer.ref_model.parameters():
        parameter.data.mul_(1.05)  # so that there is a divergence to count
    masked = trainer._generate_and_score_completions(rows)
    assert trainer._metrics["train"]["group/dead"] == [0.5]
    alone = {k: v[4:] if torch.is_tensor(v) and v.ndim else v for k, v in masked.items()}
    alone["num_items_in_batch"] = torch.tensor(4 * 3)

    def loss_and_gradient(inputs, mask_all_zero):
        trainer.mask_all_zero = mask_all_zero
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        return loss.detach(), trainer.model.model.norm.weight.grad.clone()

    for ours, expected in zip(loss_and_gradient(masked, True), loss_and_gradient(alone, False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_of_dead_groups_moves_nothing(policy, world, tmp_path):
    def same(completions, **_):
        return [0.1] * len(completions)

    trainer = make_trainer(policy, world, tmp_path, rewards=[same], mask_all_zero=True)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.equal(before[n], p) for n, p in trainer.model.state_dict().items())


def learns_a_known_best_policy(policy, world, tmp_path, **settings):
    """One prompt, one target: the reward must raise it from outside the ten best to the first place."""
    target = policy.items.sids[30]
    columns = {
        "prompt": ["Answer:\n"] * 64,
        "target_sid": [target] * 64,
        "target_item": [30] * 64,
        "history_items": [[1]] * 64,
        "task": ["sid_seq"] * 64,
    }
    defaults = {"add_gt": True, "max_steps": 25, "beta": 0.0, "lr_scheduler_type": "constant", "learning_rate": 3e-3}
    validation = (["Answer:\n"], [30])
    trainer = make_trainer(
        policy, world, tmp_path, rows=columns, validation=validation, eval_beams=10, **defaults | settings
    )
    before = copy.deepcopy(trainer.model.state_dict())
    assert trainer.evaluate()["eval_HR@1"] == 0.0
    trainer.train()
    assert trainer.evaluate()["eval_HR@1"] == 1.0
    after = trainer.model.state_dict()
    assert all(not torch.equal(before[n], after[n]) for n in before if "layers" in n)


@pytest.mark.parametrize(
    "settings", [{}, {"loss_type": "dapo", "beams": False, "dynamic_sampling": True, "logp_space": "catalog"}], ids=str
)
def test_rl_learns_a_known_best_policy(policy, world, tmp_path, settings):
    learns_a_known_best_policy(policy, world, tmp_path, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["vocab", "catalog"])
@pytest.mark.parametrize("mode", [{}, {"beams": False}, {"dynamic_sampling": True, "beams": False}], ids=str)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo", "gspo"])
def test_every_loss_and_mode_learns(policy, world, tmp_path, loss_type, mode, space):
    settings = {"loss_type": loss_type, "logp_space": space, "epsilon_high": 5.0 if loss_type == "cispo" else None}
    if loss_type in ("gspo", "luspo"):
        settings |= {"importance_sampling_level": "sequence", "loss_type": loss_type.replace("gspo", "grpo")}
    learns_a_known_best_policy(policy, world, tmp_path, **settings | mode)
