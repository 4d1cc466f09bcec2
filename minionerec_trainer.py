"""ReReTrainer: TRL's GRPO over catalog-constrained completions (ReRe, arXiv 2510.12211; GRPO, arXiv 2402.03300).

Rewards, advantages, losses, KL, reference model and logging are TRL's. What differs:

1. Generation: a prompt's group is its beam list, or samples under the trie, most probable first.
2. Rewards also get the catalog rows of the completion and of the target, columns `row` and `target_row`.
3. Log-probabilities: a prompt is encoded once for all its completions, and `space="catalog"` normalises over the tokens
   that the trie allows, as generation then does (minionerec/decoding/group_log_probs.py).
4. The shuffle between generation and update permutes whole groups, so that point 3 finds them together.
5. Groups without a difference in reward can be left out of the loss (`mask_all_zero`).
6. Evaluation is HR and NDCG of constrained beam search on validation rows; TRL's is the reward of samples.
7. Dropout is off: policy, old policy and reference are one function of the weights, and the first KL is 0.
8. A resumed run equals an unbroken one: the order of rows in each epoch, a generation that is used for several updates
   (`num_iterations`), and the moved reference of `sync_ref_model` are restored.
"""

import copy
import math
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, speed_metrics
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler, maybe_gather_lm_head_ctx, split_tensor_dict

from minionerec.catalog.catalog import Catalog
from minionerec.common.files import require_file
from minionerec.decoding.engine import Engine, TransformersEngine
from minionerec.decoding.group_log_probs import add_catalog_head, group_log_probs
from minionerec.decoding.lm_head import unwrap_adapter
from minionerec.decoding.tree_attention import require_tree_attention
from minionerec.evaluation import metrics
from minionerec.evaluation.validation import Validation, model_for_search
from minionerec.language_model.adapters import merged_weights
from minionerec.language_model.numbered_checkpoints import begin_checkpoint, resuming

DRAWN = 1.5  # completions that dynamic sampling draws for each one that it keeps
MEAN_OVER_ROWS = ("grpo", "sapo", "dr_grpo", "luspo")  # losses of TRL that divide by rows, masked ones included
START = "start_ranks.npy"  # in a checkpoint: the ranks of the validation rows at the first evaluation
REFERENCE = "reference.safetensors"  # in a checkpoint: the reference model, if --sync_ref_model moves it
GENERATION = "generation-{process}.pt"  # in a checkpoint: a generation that further updates will use


def keep_target_first(rows: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
    """`size` of the drawn completions of each prompt, in the order drawn: (prompts, drawn) -> (prompts, size).

    Every copy of the target is kept first, then one copy of each other completion, then their repetitions (MiniOneRec's
    dynamic sampling, arXiv 2510.24431). targets: (prompts, 1).

    >>> keep_target_first(torch.tensor([[3, 5, 3, 7, 5, 9]]), torch.tensor([[5]]), 4)
    tensor([[3, 5, 7, 5]])
    """
    repeated = (rows.unsqueeze(2) == rows.unsqueeze(1)).tril(-1).any(dim=2)  # an equal one was drawn earlier
    priority = (rows != targets) * (1 + repeated.long())  # 0 target, 1 first copy, 2 repetition
    kept = priority.argsort(dim=1, stable=True)[:, :size].sort(dim=1).values
    return rows.gather(1, kept)


def turn_off_dropout(model) -> None:
    """Make `model.train()` keep every module inside the model in evaluation mode; only the model itself is in training mode.

    Layers that recompute their activations (gradient checkpointing) need training mode, so their own rates are set to 0,
    also in the config that they read; the model's config is unchanged.
    """

    def train(self, mode: bool = True):
        type(self).train(self, False)
        for module in self.modules():
            if module is self or getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def without_rates(owner):
        for name, value in vars(owner).items():
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
        return owner

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            without_rates(layer)
            if "config" in vars(layer):
                layer.config = without_rates(copy.copy(layer.config))
    model.train = types.MethodType(train, model)
    model.train(model.training)


class EpochSampler(RepeatSampler):
    """TRL's sampler, whose order depends only on seed and epoch: a resumed run continues in the unbroken run's order."""

    def __init__(self, *args, epoch: Callable[[], int], **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.num_samples, generator=self.generator)  # what RepeatSampler draws in each epoch
        return super().__iter__()


class ReReTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose completions are SIDs of a catalog: a prompt's beams, or samples.

    Dataset rows carry their own target: columns `prompt`, `target_sid`, and those that the rewards read.

    catalog: what may be generated;
    space: `vocab` or `catalog`, for generation, evaluation, policy, old policy and reference;
    beams: the group is the beam list; if False, it is sampled with `args.temperature` and `args.top_p`;
    dynamic_sampling: draw 1.5 times as many, and `keep_target_first` chooses;
    add_gt: if a group does not contain the target, the target replaces its last completion;
    mask_all_zero: groups whose advantages are all zero are excluded from loss, normaliser and KL;
    test_beams: width of a second search whose HR and NDCG on the batch's prompts are logged; 0 for none;
    validation: (prompts, target items) for `evaluate`, searched with `eval_beams` beams, and optionally the items of each
        row that are not ranked;
    keep_recall: a checkpoint cannot become the best one if its HR at any K that is measured is below that of the first
        evaluation by more than the paired 95 % interval.

    `rollout`, None at first, can be set to another engine that generates the groups: it gets the weights whenever they
    have changed.

    docs/rl.md lists what is logged in addition to TRL's metrics.
    """

    _tag_names = ["minionerec"]

    def __init__(
        self,
        *args,
        catalog: Catalog,
        space: str = "vocab",
        beams: bool = True,
        dynamic_sampling: bool = False,
        add_gt: bool = False,
        mask_all_zero: bool = False,
        test_beams: int = 0,
        validation: tuple | None = None,
        eval_beams: int = 20,
        keep_recall: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # it prints every figure
        self.catalog = catalog
        self.trie = catalog.trie(self.processing_class).to(self.accelerator.device)
        self.codes = torch.from_numpy(catalog.codes).to(self.accelerator.device)  # (sids, depth)
        token_id = self.processing_class.convert_tokens_to_ids
        self.completion_of_row = [token_id(self.processing_class.tokenize(sid)) for sid in catalog.sids]
        self.space = space
        self.beams = beams
        self.dynamic_sampling = dynamic_sampling
        self.add_gt = add_gt
        self.mask_all_zero = mask_all_zero
        self.test_beams = test_beams
        if validation:
            prompts, targets, *seen = validation
            validation = Validation(prompts, targets, catalog, self.trie, eval_beams, space, *seen)
        self.validation = validation
        self.keep_recall = keep_recall
        self._start_ranks: np.ndarray | None = None  # (rows,) of the first evaluation
        self._loses_recall = False
        self.rollout: Engine | None = None
        self._synced_step: int | None = None  # the step whose weights `rollout` has
        self.aux_loss_enabled = False  # the load-balancing loss of experts cannot read a tree mask
        self._rows: list[int] = []  # of the batch's completions
        self._targets: list[int] = []  # of the batch's targets
        self._policy_log_probs: torch.Tensor | None = None  # of the latest forward with gradients
        self._seconds = dict.fromkeys(("generation", "log_probs", "update"), 0.0)
        turn_off_dropout(self.model)
        # Before anything wraps `forward` in mixed precision, whose rounding would look like another model's.
        sharded = (p for p in self.model.parameters() if hasattr(p, "ds_status"))  # under ZeRO-3, adapters are not
        with maybe_gather_lm_head_ctx(*sharded):
            require_tree_attention(self.model)
        if space == "catalog":
            for model in filter(None, (self.model, self.ref_model)):
                add_catalog_head(unwrap_adapter(self.accelerator.unwrap_model(model)), self.trie, self.temperature)

    # ---------------------------------------------------------------------------------------- generation

    def _generate_and_score_completions(self, inputs):
        self._targets = [self.catalog.row_of_sid[row["target_sid"]] for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        groups = output["advantages"].view(-1, self.num_generations)
        # Equal rewards give exactly equal advantages, though rounding may keep them from being 0.
        dead = groups.amax(dim=1) == groups.amin(dim=1)
        every_dead = self.accelerator.gather(dead)
        self._metrics["train"]["group/dead"].append(every_dead.float().mean().item())
        if self.mask_all_zero:
            dead_rows = dead.repeat_interleave(self.num_generations)[:, None]
            output["completion_mask"] = output["completion_mask"] * ~dead_rows
            output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
            output["rows_per_live_row"] = len(every_dead) / (~every_dead).sum().clamp(min=1)
            if "old_per_token_logps" in output:  # the policy's are 0 there: a ratio of exp(-old) could overflow
                output["old_per_token_logps"] = output["old_per_token_logps"].masked_fill(dead_rows, 0.0)
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        started = self._now()
        prompts = prompt_ids[::num_generations]
        targets = torch.tensor(self._targets[::num_generations], device=self.accelerator.device)[:, None]
        with self._rollout_engine() as engine:
            rows = self._draw(engine, prompts, targets)  # (prompts, group)
        if self.test_beams:
            with self._own_engine() as engine:
                [tested] = engine.beam_search(prompts, self.test_beams)
            self._log_ranks("test", tested.row, targets)
        self._log_group(rows, targets)
        if self.add_gt:
            missed = ~(rows == targets).any(dim=1)
            rows[missed, -1] = targets[missed, 0]
        self._rows = rows.flatten().tolist()
        self._seconds["generation"] += self._now() - started
        return [self.completion_of_row[row] for row in self._rows], None

    @contextmanager
    def _own_engine(self) -> Iterator[Engine]:
        """Tree search over the model that is trained."""
        with model_for_search(self) as model:
            yield TransformersEngine(model, self.trie, self.processing_class.pad_token_id, self.space)

    @contextmanager
    def _rollout_engine(self) -> Iterator[Engine]:
        """The engine that generates the groups, with the current weights."""
        if self.rollout is None:
            with self._own_engine() as engine:
                yield engine
            return
        if self._synced_step != self.state.global_step:
            with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:  # gathers ZeRO-3
                self.rollout.sync(merged_weights(model))
            self._synced_step = self.state.global_step
        yield self.rollout

    def _draw(self, engine: Engine, prompts: list[list[int]], targets: torch.Tensor) -> torch.Tensor:
        """The groups of some prompts as rows of the catalog's SIDs, most probable first: (prompts, group)."""
        drawn = math.ceil(DRAWN * self.num_generations) if self.dynamic_sampling else self.num_generations
        if self.beams:
            rows = engine.beam_search(prompts, drawn, temperature=self.temperature)[0].row
        else:
            # Seeded by the step, not by earlier draws: a resumed run draws what an unbroken one draws.
            step = self.state.global_step * self.accelerator.num_processes + self.accelerator.process_index
            draw = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.args.seed + 1_000_003 * step}
            found = engine.sample(prompts, drawn, **draw)
            # By row within equal scores, so that copies of one SID are neighbours.
            order = found.row.argsort(dim=1, stable=True)
            order = order.gather(1, found.score.gather(1, order).argsort(dim=1, descending=True, stable=True))
            rows = found.row.gather(1, order)
        return keep_target_first(rows, targets, self.num_generations) if self.dynamic_sampling else rows

    def _log_group(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        """HR and NDCG of the groups, distinct SIDs of a group, and the share that contains the target's prefixes."""
        self._log_ranks("group", rows, targets)
        in_order = rows.sort(dim=1).values
        distinct = (in_order[:, 1:] != in_order[:, :-1]).sum(dim=1) + 1.0
        self._log_mean("group/distinct", distinct)
        matching = (self.codes[rows] == self.codes[targets]).long().cumprod(dim=2)  # (prompts, group, depth)
        for level, survived in enumerate(matching.any(dim=1).float().unbind(dim=1)[:3], start=1):
            self._log_mean(f"group/prefix_{level}", survived)

    def _log_mean(self, name: str, values: torch.Tensor) -> None:
        self._metrics["train"][name].append(self.accelerator.gather(values).mean().item())

    def _log_ranks(self, name: str, rows: torch.Tensor, targets: torch.Tensor) -> None:
        hits = rows == targets
        rank = torch.where(hits.any(dim=1), hits.int().argmax(dim=1), metrics.MISSED)
        rank = self.accelerator.gather(rank).cpu().numpy()
        for metric, value in metrics.table(rank, [rows.shape[1]]).items():
            self._metrics["train"][f"{name}/{metric}"].append(value)

    # ---------------------------------------------------------------------------------------- rewards and loss

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's, with two more columns: the catalog rows of completion and target."""
        inputs = [
            columns | {"row": row, "target_row": target}
            for columns, row, target in zip(inputs, self._rows, self._targets, strict=True)
        ]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        **_,
    ):
        """TRL's, with each prompt encoded once for the neighbouring rows that share it.

        Rows whose completion is masked completely are not computed if there are others: their values are 0.
        """
        started = self._now()
        live = attention_mask[:, -logits_to_keep:].any(dim=1)
        if not live.any():
            live[: self.num_generations] = True  # every process takes part in each forward
        causal_lm = unwrap_adapter(self.accelerator.unwrap_model(model))
        rows = int(live.sum())
        with self.accelerator.autocast():
            values = group_log_probs(
                model,
                causal_lm,
                input_ids[live],
                attention_mask[live],
                logits_to_keep,
                space=self.space,
                chunk_rows=batch_size or rows,
            )
        if rows < len(live):
            values = [value.new_zeros(len(live), logits_to_keep).index_put((live,), value) for value in values]
        log_probs, entropies = values
        if torch.is_grad_enabled():
            self._policy_log_probs = log_probs.detach()
        else:
            self._seconds["log_probs"] += self._now() - started
        return log_probs, entropies if compute_entropy else None, None

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.beta and self._policy_log_probs is not None:
            self._log_kl_median(inputs)
        # Means over tokens leave masked rows out; a mean over rows counts them.
        return loss * inputs["rows_per_live_row"] if self.mask_all_zero and self.loss_type in MEAN_OVER_ROWS else loss

    def _log_kl_median(self, inputs) -> None:
        """Median over tokens of the estimate whose mean TRL logs as `kl`: exp(d) - d - 1, d = log(reference/policy)."""
        apart = inputs["ref_per_token_logps"] - self._policy_log_probs
        kl = (apart.exp() - apart - 1).masked_fill(inputs["completion_mask"] == 0, math.nan)
        kl = self.accelerator.pad_across_processes(kl, dim=1, pad_index=math.nan)
        self._metrics["train"]["kl_median"].append(self.accelerator.gather(kl).nanmedian().item())

    # ---------------------------------------------------------------------------------------- batches

    def _now(self) -> float:
        """Seconds on a clock, after all queued work of the device."""
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def training_step(self, model, inputs, num_items_in_batch):
        started, before = self._now(), sum(self._seconds.values())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._seconds["update"] += self._now() - started - (sum(self._seconds.values()) - before)
        if self._step % self.current_gradient_accumulation_steps == 0:
            for part in self._seconds:
                self._metrics["train"][f"seconds/{part}"].append(self._seconds[part])
                self._seconds[part] = 0.0
        return loss

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(
            sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    @property
    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _prepare_inputs(self, generation_batch):
        """TRL's for training, with rows shuffled by whole groups. Evaluation does not call it."""
        if self._step % self._generate_every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            groups = torch.randperm(len(batch["prompt_ids"]) // self.num_generations)
            order = (groups[:, None] * self.num_generations + torch.arange(self.num_generations)).flatten()
            batch = {k: v[order] if torch.is_tensor(v) and v.ndim else v for k, v in batch.items()}
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # ---------------------------------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """HR and NDCG by item of constrained beam search on the validation rows, the same on any number of processes.

        Also the difference of each HR from the first evaluation's, with its paired 95 % interval.
        """
        started = time.time()
        ranks = self.validation.ranks(self)
        self._start_ranks = ranks if self._start_ranks is None else self._start_ranks
        self._loses_recall = False
        result = metrics.table(ranks, self.validation.cutoffs)
        for k in self.validation.cutoffs:
            gains = (ranks < k).astype(np.int64) - (self._start_ranks < k)
            low, high = metrics.interval_of_mean(gains, self.args.seed)
            self._loses_recall |= high < 0
            name = f"HR@{k}_gain"
            result |= {name: float(gains.mean()), f"{name}_low": low, f"{name}_high": high}
        result = {f"{metric_key_prefix}_{name}": value for name, value in result.items()}
        result |= speed_metrics(metric_key_prefix, started, num_samples=len(self.validation.prompts))
        self.log(result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result

    def _determine_best_metric(self, metrics, trial):
        """The Trainer's, without checkpoints that lose recall (`keep_recall`)."""
        return not (self.keep_recall and self._loses_recall) and super()._determine_best_metric(metrics, trial)

    # ---------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model, trial):
        """TRL's. What is ours is written first, so that `on_save` finds all files."""
        begin_checkpoint(self)
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self._start_ranks is not None and self.args.should_save:
            np.save(folder / START, self._start_ranks)
        if self.args.sync_ref_model:
            self._save_reference(folder / REFERENCE)
        if self._step % self._generate_every:
            torch.save(self._buffered_inputs, folder / GENERATION.format(process=self.args.process_index))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with resuming(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self._load_ours(checkpoint)

    def _load_ours(self, checkpoint) -> None:
        """What `_save_checkpoint` adds to TRL's files."""
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if (Path(checkpoint) / START).exists():
            self._start_ranks = np.load(Path(checkpoint) / START)
        generation = Path(checkpoint) / GENERATION.format(process=self.args.process_index)
        if generation.exists():
            self._buffered_inputs = torch.load(generation, self.accelerator.device, weights_only=True)
        if self.args.sync_ref_model:
            self._load_reference(require_file(Path(checkpoint) / REFERENCE, "resume_from_checkpoint"))

    def create_model_card(self, *_, **__):
        """Not TRL's: the stage writes the card (minionerec/common/model_card.py)."""

    def _save_reference(self, path: Path) -> None:
        tensors = {}
        for name, parameter in self.accelerator.unwrap_model(self.ref_model).named_parameters():
            with maybe_gather_lm_head_ctx(parameter):
                if self.args.should_save:
                    tensors[name] = parameter.detach().cpu().clone()
        if self.args.should_save:
            save_file(tensors, path)

    def _load_reference(self, path: Path) -> None:
        with safe_open(path, "pt") as tensors:
            for name, parameter in self.accelerator.unwrap_model(self.ref_model).named_parameters():
                if hasattr(parameter, "ds_status"):  # sharded by ZeRO-3
                    import deepspeed

                    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                        parameter.data.copy_(tensors.get_tensor(name))
                else:
                    parameter.data.copy_(tensors.get_tensor(name))
