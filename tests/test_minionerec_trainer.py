"""ReReTrainer against TRL's row-by-row GRPO and against brute force.

Guarded: log-probabilities, entropies and gradients with a shared prompt equal those of plain rows, in both spaces; groups
are the beams or samples of their own prompt and stay together; each row's reward sees its own target and catalog rows;
groups without a signal leave loss and KL; dropout is off; a resumed run repeats the unbroken one; every loss learns.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from data import Prompts, next_sid_prompts, read_sequences, rl_rows
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.sids import split_sid
from minionerec.common.errors import UserError
from minionerec.decoding.beam_search import beam_search, left_pad
from minionerec.decoding.group_log_probs import run_lengths_gcd
from minionerec.rewards.functions import rule
from minionerec.rewards.registry import reward_functions
from minionerec_trainer import EpochSampler, ReReTrainer, keep_target_first, turn_off_dropout

OURS = ("add_gt", "test_beams", "validation", "eval_beams", "space", "beams", "dynamic_sampling", "mask_all_zero")
OURS += ("keep_recall",)


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
        reward_funcs=rewards or reward_functions("ranking", 4, policy.catalog),
        args=GRPOConfig(**(settings | kwargs)),
        train_dataset=Dataset.from_dict(columns),
        eval_dataset=Dataset.from_dict(columns).select(range(1)),
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


# ------------------------------------------------------------------------------------------------ log-probabilities


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
    """Relative to the length of each tensor, and of the whole gradient; in bf16 a single small tensor may err three times as much."""
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
    """Each row in its own forward; at each token a softmax over what a dictionary of SIDs allows. (log-probs, entropies)."""
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
    trainer = make_trainer(policy, world, tmp_path, space="catalog", bf16=False, **settings)
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
    settings["rewards"] = [varied]
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
    trainer = make_trainer(experts, world, tmp_path, space=space, add_gt=True)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


# ------------------------------------------------------------------------------------------------ groups


def test_groups_are_beams_and_rows_keep_their_own_target(policy, world, tmp_path):
    """Every reward call sees whole groups: one prompt, distinct legal SIDs, that row's own target."""
    items = policy.items
    rows = rl_rows(read_sequences(world.train, items.sids, "train_file"), items, Prompts())
    # one prompt for all rows: a dictionary keyed by its text could hold only one of the targets
    rows["prompt"] = ["the same prompt"] * len(rows["prompt"])
    seen, calls = [], []

    def spy(prompts, completions, row, target_row, target_sid, target_item, **_):
        calls.append({target_item[start] for start in range(0, len(completions), 4)})
        for start in range(0, len(completions), 4):
            group = slice(start, start + 4)
            assert len(set(prompts[group])) == 1 and len(set(target_item[group])) == 1
            assert len(set(completions[group])) == 4
            assert [policy.catalog.sids[r] for r in row[group]] == completions[group]
            assert [policy.catalog.sids[r] for r in target_row[group]] == target_sid[group]
            assert all(items.sids[i] == s for i, s in zip(target_item[group], target_sid[group], strict=True))
            seen.append(target_item[start])
        return rule(row, target_row)

    make_trainer(policy, world, tmp_path, rewards=[spy], rows=rows, max_steps=5).train()
    assert len(seen) == 10 and len(set(seen)) > 3
    assert any(len(targets) == 2 for targets in calls)  # equal prompts of one batch, each with its own target


def test_add_gt_puts_the_target_last_where_it_is_missing(policy, world, tmp_path):
    hits = []

    def spy(completions, row, target_row, **_):
        values = rule(row, target_row)
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


def test_groups_are_drawn_in_the_space_of_their_log_probs(policy, world, tmp_path):
    """The score by which beams were ranked is the sum of the log-probabilities that the loss sees."""
    prompts = policy.tokenizer(PROMPTS)["input_ids"]
    ids, mask = left_pad(prompts, policy.tokenizer.pad_token_id, "cpu")
    found = {}
    for space in ("vocab", "catalog"):
        trainer = make_trainer(policy, world, tmp_path, space=space, bf16=False, temperature=0.7)
        beams = beam_search(trainer.model, trainer.trie, ids, mask, 4, 0.7, space=space)
        targets = torch.zeros(len(ids), 1, dtype=torch.long)
        with trainer._rollout_engine() as engine:
            assert torch.equal(trainer._draw(engine, prompts, targets), beams.row)
        completions = torch.tensor([trainer.completion_of_row[row] for row in beams.row.flatten().tolist()])
        rows = torch.cat([ids.repeat_interleave(4, 0), completions], 1)
        real = torch.cat([mask.repeat_interleave(4, 0), torch.ones_like(completions)], 1)
        with torch.no_grad():
            log_probs = trainer._get_per_token_logps_and_entropies(trainer.model, rows, real, 3)[0]
        torch.testing.assert_close(log_probs.sum(1), beams.score.flatten(), atol=1e-4, rtol=0)
        found[space] = beams.score
    assert (found["catalog"] > found["vocab"] + 0.1).all()


def test_which_of_the_drawn_are_kept():
    drawn = torch.tensor([[3, 5, 3, 7, 5, 9], [1, 1, 1, 1, 2, 1], [4, 6, 4, 4, 4, 4]])
    kept = keep_target_first(drawn, torch.tensor([[5], [1], [8]]), 4)
    assert kept.tolist() == [[3, 5, 7, 5], [1, 1, 1, 1], [4, 6, 4, 4]]


@pytest.mark.parametrize("dynamic_sampling", [False, True])
def test_sampled_groups(policy, world, tmp_path, dynamic_sampling):
    """Repeatable by step, legal, most probable first; dynamic sampling never loses a target that it drew."""
    settings = {"beams": False, "dynamic_sampling": dynamic_sampling, "num_generations": 8}
    trainer = make_trainer(policy, world, tmp_path, rewards=reward_functions("ranking", 8), **settings)
    prompts = policy.tokenizer(PROMPTS)["input_ids"]
    ids, mask = left_pad(prompts, policy.tokenizer.pad_token_id, "cpu")
    targets = beam_search(trainer.model, trainer.trie, ids, mask, 1).row  # likely to be drawn
    with trainer._rollout_engine() as engine:
        groups = trainer._draw(engine, prompts, targets)
        assert torch.equal(groups, trainer._draw(engine, prompts, targets))
        trainer.state.global_step = 1
        assert not torch.equal(groups, trainer._draw(engine, prompts, targets))
    assert groups.shape == (3, 8) and (groups == targets).any()
    scores = beam_search(trainer.model, trainer.trie, ids, mask, 1000)
    for group, ranked, score in zip(groups, scores.row, scores.score, strict=True):
        place = [ranked.tolist().index(row) for row in group.tolist()]
        assert place == sorted(place) and score.isfinite().all()
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert 1 <= logged["group/distinct"] <= 8 and 0 <= logged["group/dead"] <= 1
    assert min(logged[f"seconds/{part}"] for part in ("generation", "log_probs", "update")) > 0


# ------------------------------------------------------------------------------------------------ loss


def test_training_moves_parameters_and_logs(policy, world, tmp_path):
    rewards = [*reward_functions("ranking", 4, policy.catalog), varied]
    trainer = make_trainer(policy, world, tmp_path, rewards=rewards, test_beams=6)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.state_dict().items())
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"rewards/rule/mean", "rewards/ndcg/mean", "group/HR@4", "test/HR@6", "kl"} <= logged


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "sapo", "luspo", "cispo", "vespo"])
def test_dead_groups_leave_the_loss(policy, world, tmp_path, loss_type):
    """With mask_all_zero, loss and gradients are those of a batch of only the live groups, KL included."""

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


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_dead_groups_with_low_log_probs_leave_the_loss_finite(policy, world, tmp_path, space):
    """exp(0 - old) of a group that is left out would be infinite where an old log-probability is below about -88."""

    def first_group_differs(completions, **_):
        return [0.0, 1.0, 0.5, 0.0] + [0.1] * 4

    settings = {"mask_all_zero": True, "num_iterations": 2, "beta": 0.0, "max_steps": 4, "space": space}
    trainer = make_trainer(policy, world, tmp_path, rewards=[first_group_differs], **settings)
    trainer.model.get_output_embeddings().weight.data.mul_(100)  # the second beam is far below the first
    losses = []
    original = ReReTrainer._compute_loss

    def spy(self, model, inputs):
        assert inputs["old_per_token_logps"].min() < -88
        losses.append(original(self, model, inputs))
        return losses[-1]

    trainer._compute_loss = spy.__get__(trainer)
    trainer.train()
    assert len(losses) == 4 and all(loss.isfinite() for loss in losses)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_batch_of_dead_groups_moves_nothing(policy, world, tmp_path):
    def same(completions, **_):
        return [0.1] * len(completions)

    trainer = make_trainer(policy, world, tmp_path, rewards=[same], mask_all_zero=True)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.equal(before[n], p) for n, p in trainer.model.state_dict().items())


# ------------------------------------------------------------------------------------------------ what is logged


def test_logged_shares_equal_counts_by_hand(policy, world, tmp_path):
    """Survival of the target's prefixes in the groups, and groups without a signal."""
    groups = []

    def spy(row, target_row, **_):
        groups.append((row, target_row))
        return rule(row, target_row)

    trainer = make_trainer(policy, world, tmp_path, rewards=[spy], max_steps=1)
    trainer.train()
    [(row, target_row)] = groups
    found = [split_sid(policy.catalog.sids[r]) for r in row]
    targets = [split_sid(policy.catalog.sids[r]) for r in target_row]
    [logged] = [entry for entry in trainer.state.log_history if "group/prefix_1" in entry]
    for level in (1, 2, 3):
        matches = [a[:level] == b[:level] for a, b in zip(found, targets, strict=True)]
        expected = sum(any(matches[start : start + 4]) for start in range(0, len(row), 4)) / (len(row) // 4)
        assert logged[f"group/prefix_{level}"] == pytest.approx(expected)
    signals = [len({r == t for r, t in zip(row[i : i + 4], target_row[i : i + 4], strict=True)}) > 1 for i in (0, 4)]
    assert logged["group/dead"] == 1 - sum(signals) / 2


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_median_of_the_kl(policy, world, tmp_path, space):
    trainer = make_trainer(policy, world, tmp_path, space=space, bf16=False, max_steps=1)
    for parameter in trainer.ref_model.parameters():
        parameter.data.mul_(1.05)
    terms = []
    original = ReReTrainer._compute_loss

    def spy(self, model, inputs):
        loss = original(self, model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            own = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])[0]
        apart = inputs["ref_per_token_logps"] - own
        terms.append((apart.exp() - apart - 1)[inputs["completion_mask"].bool()])
        return loss

    trainer._compute_loss = spy.__get__(trainer)
    trainer.train()
    [logged] = [entry for entry in trainer.state.log_history if "kl_median" in entry]
    assert logged["kl_median"] == pytest.approx(terms[0].median().item(), rel=1e-4)
    assert logged["kl"] == pytest.approx(terms[0].mean().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ dropout

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
WITH_DROPOUT = {  # rates in modules, in plain attributes of layers, and in the config that layers read
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "qwen2": Qwen2Config(**LAYERS, num_key_value_heads=2, intermediate_size=32, attention_dropout=0.5),
    "opt": OPTConfig(**LAYERS, ffn_dim=32, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5),
    "falcon": FalconConfig(**LAYERS, hidden_dropout=0.5, attention_dropout=0.5, alibi=False),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", WITH_DROPOUT)
def test_dropout_is_off_in_training_mode(architecture, checkpointing):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WITH_DROPOUT[architecture])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(24).view(2, 12)

    def logits():
        return model(input_ids=ids, use_cache=False).logits

    assert not torch.equal(model.train() and logits(), logits())  # this model has dropout
    turn_off_dropout(model)
    first = model.train() and logits()
    assert model.training and torch.equal(first, logits()) and torch.equal(first, model.eval() and logits())
    recomputed = [layer.training for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    model.train()
    assert not model.training or not any(recomputed)
    first.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    saved = model.config.to_dict()
    assert any(value == 0.5 for name, value in saved.items() if "drop" in name)  # for a later SFT


@pytest.mark.parametrize("lora", [False, True])
def test_the_first_kl_is_zero_with_dropout(policy, world, tmp_path, lora):
    config = copy.deepcopy(policy.model.config)
    config.attention_dropout = 0.5
    model = type(policy.model)(config)
    model.load_state_dict(policy.model.state_dict())
    dropping = SimpleNamespace(**vars(policy) | {"model": model})
    settings = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5)} if lora else {}
    trainer = make_trainer(dropping, world, tmp_path, rewards=[varied], bf16=False, max_steps=2, **settings)
    trainer.train()
    first, second = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert abs(first) < 1e-6 < second


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 5},  # in the middle of the second epoch
        {"save_steps": 3},  # between two epochs
        {"save_steps": 5, "num_iterations": 2},  # between two updates on one generation
        {"save_steps": 5, "num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"save_steps": 5, "sync_ref_model": True, "ref_model_sync_steps": 2, "beta": 1.0},
        {"save_steps": 5, "beams": False, "mask_all_zero": True},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(policy, world, tmp_path, settings):
    rows = rl_rows(read_sequences(world.train, policy.items.sids, "train_file"), policy.items, Prompts())
    rows = {name: column[:6] for name, column in rows.items()}  # 3 steps per epoch
    settings = settings | {"max_steps": 9, "save_strategy": "steps", "bf16": False, "rewards": [varied]}
    asked = []

    def make(folder):
        trainer = make_trainer(policy, world, folder, rows=rows, **settings)
        draw = trainer._generate_single_turn

        def spy(self, prompt_ids, *arguments, **keywords):
            asked.append((self.state.global_step, self._targets[:: self.num_generations]))
            return draw(prompt_ids, *arguments, **keywords)

        trainer._generate_single_turn = spy.__get__(trainer)
        return trainer

    whole = make(tmp_path)
    whole.train()
    unbroken, asked[:] = list(asked), []
    assert len({str(targets) for _, targets in unbroken}) > 3  # another order in each epoch
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{settings['save_steps']}"))
    assert asked == [entry for entry in unbroken if entry[0] >= settings["save_steps"]]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    if settings.get("sync_ref_model"):
        for name, weight in whole.ref_model.state_dict().items():
            assert torch.equal(weight, resumed.ref_model.state_dict()[name]), name


def varied(row, **_):
    """A reward that differs within most groups, so that each step moves the weights."""
    return [float(r % 3) for r in row]


def test_a_checkpoint_without_the_moved_reference_is_refused(policy, world, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    make_trainer(policy, world, tmp_path, **settings).train()
    moving = make_trainer(policy, world, tmp_path, **settings, sync_ref_model=True)
    with pytest.raises(UserError, match="reference.safetensors: no such file"):
        moving.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_the_order_of_an_epoch_is_trls():
    """Unbroken runs keep the order of TRL's sampler, whose generator continues from epoch to epoch."""
    arguments = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "seed": 7}
    theirs, epoch = RepeatSampler(range(10), **arguments), [0]
    ours = EpochSampler(range(10), **arguments, epoch=lambda: epoch[0])
    for epoch[0] in range(3):
        assert list(ours) == list(theirs)
    epoch[0] = 1
    theirs = RepeatSampler(range(10), **arguments)
    assert [list(theirs), list(theirs)][1] == list(ours)


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_is_beam_search_on_validation_rows(policy, world, tmp_path):
    items = policy.items
    valid = read_sequences(world.valid, items.sids, "eval_file")
    prompts = next_sid_prompts(valid, items, Prompts())
    trainer = make_trainer(policy, world, tmp_path, validation=(prompts, valid["target"].to_list()), eval_beams=1000)
    result = trainer.evaluate()
    assert result["eval_HR@50"] == 1.0  # all 47 SIDs, so every target is somewhere
    assert 0 < result["eval_NDCG@10"] < 1


def test_evaluation_leaves_out_the_items_that_it_is_given(policy, world, tmp_path):
    """With the targets left out, no row is a hit, though every SID is searched."""
    valid = read_sequences(world.valid, policy.items.sids, "eval_file")
    prompts, targets = next_sid_prompts(valid, policy.items, Prompts()), valid["target"].to_list()
    validation = (prompts, targets, [[target] for target in targets])
    trainer = make_trainer(policy, world, tmp_path, validation=validation, eval_beams=1000)
    assert trainer.evaluate()["eval_HR@50"] == 0.0


class FixedRanks(SimpleNamespace):
    """A validation whose n-th evaluation has the n-th of `tables` of ranks; K is 1 and 10."""

    cutoffs, prompts = [1, 10], [""]

    def ranks(self, trainer):
        return np.array(self.tables.pop(0))


START = [5] * 100 + [100] * 100  # HR@10 is 0.5
NOISE = [0] * 10 + [5] * 88 + [100] * 102  # HR@1 rises; 2 of 200 hits are lost: within the interval
LOSS = [0] * 50 + [100] * 150  # HR@1 rises more, at the cost of 50 hits
GAIN = [0] * 100 + [100] * 100  # HR@1 rises to 0.5, and no hit is lost
TOP_LOSS = [5] * 150 + [100] * 50  # HR@10 rises from 0.5 to 0.75 at the cost of 20 hits at the first place
TOP_START = [0] * 20 + [5] * 80 + [100] * 100


@pytest.mark.parametrize(
    "metric, tables, keep_recall, best",
    [
        ("HR@1", (START, NOISE, LOSS), True, 0.05),
        ("HR@1", (START, NOISE, LOSS), False, 0.25),
        ("HR@1", (START, LOSS, GAIN), True, 0.5),
        ("HR@10", (TOP_START, TOP_START, TOP_LOSS), True, 0.5),
        ("HR@10", (TOP_START, TOP_START, TOP_LOSS), False, 0.75),
    ],
)
def test_a_checkpoint_that_loses_recall_is_no_candidate(policy, world, tmp_path, metric, tables, keep_recall, best):
    first, second, loss = tables
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings = steps | {"metric_for_best_model": f"eval_{metric}", "greater_is_better": True, "eval_on_start": True}
    settings |= {"num_generations_eval": 1, "max_steps": 3, "keep_recall": keep_recall}

    def make(*tables):
        trainer = make_trainer(policy, world, tmp_path, **settings, validation=([""], [0]))
        trainer.validation = FixedRanks(tables=list(tables))
        return trainer

    trainer = make(first, second, loss, loss)
    trainer.train()
    assert trainer.state.best_metric == best
    entries = [entry for entry in trainer.state.log_history if "eval_HR@10_gain" in entry]
    for k in (1, 10):
        hits = [np.mean(np.array(table) < k) for table in (first, second, loss, loss)]
        gains = [entry[f"eval_HR@{k}_gain"] for entry in entries]
        assert gains == pytest.approx(np.array(hits) - hits[0])
        for entry, gain in zip(entries, gains, strict=True):
            assert entry[f"eval_HR@{k}_gain_low"] <= gain <= entry[f"eval_HR@{k}_gain_high"]
    # a resumed run compares with the start of the run, not with its own first evaluation
    resumed = make(loss, loss, loss)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert resumed.state.best_metric == best


# ------------------------------------------------------------------------------------------------ learning


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
    "settings", [{}, {"loss_type": "dapo", "beams": False, "dynamic_sampling": True, "space": "catalog"}], ids=str
)
def test_rl_learns_a_known_best_policy(policy, world, tmp_path, settings):
    learns_a_known_best_policy(policy, world, tmp_path, **settings)


LOSSES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo", "gspo")
MODES = ({}, {"beams": False}, {"dynamic_sampling": True, "beams": False})
SPACES = ("vocab", "catalog")  # each loss and each mode meets both


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss_type, mode, space",
    [(loss, mode, SPACES[(i + j) % 2]) for i, loss in enumerate(LOSSES) for j, mode in enumerate(MODES)],
    ids=str,
)
def test_every_loss_and_mode_learns(policy, world, tmp_path, loss_type, mode, space):
    settings = {"loss_type": loss_type, "space": space, "epsilon_high": 5.0 if loss_type == "cispo" else None}
    if loss_type in ("gspo", "luspo"):
        settings |= {"importance_sampling_level": "sequence", "loss_type": loss_type.replace("gspo", "grpo")}
    learns_a_known_best_policy(policy, world, tmp_path, **settings | mode)
