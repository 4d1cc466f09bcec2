"""ReReTrainer: TRL's GRPO over catalog-constrained completions (ReRe, arXiv 2510.12211; GRPO, arXiv 2402.03300).

Rewards, advantages, losses, KL, reference model and logging are TRL's. What differs:

- generation: a prompt's group is its beam list, or samples under the trie, the most probable first (beam_search.py);
- log-probabilities: a prompt is encoded once for all its completions, `[prompt | c_1 | … | c_G]` in one row, and they
  may be normalised over what the trie allows (`logp_space="catalog"`), as generation then is;
- the shuffle between generation and update permutes whole groups, so that the line above finds them together;
- groups without a difference in reward can be left out of the loss (`mask_all_zero`);
- evaluation: HR and NDCG of constrained beam search on validation rows, in place of the reward of samples.

TRL cannot resume between two updates on one generation (`num_iterations` above 1): a run killed there generates anew.
"""

import functools
import math
import time
import types
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers.trainer_utils import speed_metrics
from trl import GRPOTrainer
from trl.trainer.utils import maybe_gather_lm_head_ctx, split_tensor_dict

from minionerec.catalog.catalog import Catalog
from minionerec.catalog.trie import Trie
from minionerec.decoding.beam_search import beam_search, left_pad, sample
from minionerec.decoding.lm_head import LMHead, allowed_log_probs, unwrap_adapter
from minionerec.decoding.tree_attention import branch_mask_and_positions, require_tree_attention
from minionerec.evaluation import metrics
from minionerec.evaluation.validation import Validation, model_for_search

DRAWN = 1.5  # completions that dynamic sampling draws for each that it keeps
MEAN_OVER_ROWS = ("grpo", "sapo", "dr_grpo", "luspo")  # losses of TRL that divide by rows, the masked ones included


def run_lengths_gcd(rows: torch.Tensor) -> int:
    """The greatest g such that `rows` (n, length) consists of blocks of g equal neighbours."""
    changes = (rows[1:] != rows[:-1]).any(dim=1).nonzero()[:, 0] + 1
    return math.gcd(len(rows), *changes.tolist())


def keep_target_first(leaf: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
    """`size` of the drawn completions of each prompt, in the order drawn: (prompts, drawn) -> (prompts, size).

    Every copy of the target is kept before any other completion, and one copy of each other before their repetitions
    (MiniOneRec's dynamic sampling, arXiv 2510.24431). targets: (prompts, 1).
    """
    repeated = (leaf.unsqueeze(2) == leaf.unsqueeze(1)).tril(-1).any(dim=2)  # an equal one stands before it
    priority = (leaf != targets) * (1 + repeated.long())  # 0 target, 1 first of its kind, 2 repetition
    kept = priority.argsort(dim=1, stable=True)[:, :size].sort(dim=1).values
    return leaf.gather(1, kept)


class CatalogOutput(NamedTuple):
    """What a forward with the catalog head returns; both (rows, branches, length), 0 at masked tokens."""

    log_probs: torch.Tensor  # nats
    entropy: torch.Tensor  # nats


@contextmanager
def last_states(causal_lm, count: int):
    """Let the body of a model return the states of the last `count` positions alone, so that its head sees no other.

    On a GPU TRL's fused head skips positions without a label by itself; elsewhere it projects all that it is given.
    """

    def cut(body, inputs, output):
        output.last_hidden_state = output.last_hidden_state[:, -count:]
        return output

    handle = causal_lm.base_model.register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def add_catalog_head(model, trie: Trie, temperature: float) -> None:
    """Let `model(…, completions=ids, completion_mask=mask)` return a `CatalogOutput` instead of logits.

    The last branches * length states of a row predict `completions` (rows, branches, length); their log-probabilities
    are normalised over the tokens that the trie allows, and only those tokens' rows of the LM head are multiplied.
    The head is a part of `forward`, as TRL's fused one is, so that DDP and DeepSpeed see one forward. `model` is the
    causal LM itself, without an adapter around it.
    """
    plain_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, completions=None, completion_mask=None, **kwargs):
        if completions is None:
            return plain_forward(*args, **kwargs)
        rows, branches, length = completions.shape
        states = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        states = states[:, -branches * length :].view(rows, branches, length, -1)
        kept = completion_mask.bool()
        nodes = trie.walk(completions)  # (rows, branches, length + 1)
        log_probs, entropy = [], []
        with maybe_gather_lm_head_ctx(*LMHead.of(self)[:2]):
            for level in range(length):
                values, allowed = allowed_log_probs(
                    LMHead.of(self),
                    states[:, :, level],
                    trie,
                    nodes[..., level],
                    space="catalog",
                    level=level,
                    temperature=temperature,
                )  # (rows, branches, width)
                chosen = (allowed.node == nodes[..., level + 1].unsqueeze(-1)) & allowed.mask
                finite = values.masked_fill(~allowed.mask, 0.0)
                log_probs.append((finite * chosen).sum(dim=-1))
                entropy.append(-(finite.exp() * finite * allowed.mask).sum(dim=-1))
        return CatalogOutput(*(torch.stack(x, dim=-1).masked_fill(~kept, 0.0) for x in (log_probs, entropy)))

    model.forward = types.MethodType(forward, model)


class ReReTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose completions are the beams of a catalog, or samples from it.

    Dataset rows carry their own target: columns `prompt`, `target_sid`, and whatever the rewards ask for.

    catalog: what may be generated;
    logp_space: `vocab` or `catalog`, for generation, evaluation, policy, old policy and reference alike;
    beams: the group is the beam list, else it is sampled with `args.temperature` and `args.top_p`;
    dynamic_sampling: 1.5 times as many are drawn, and `keep_target_first` chooses;
    add_gt: where a group lacks the target, the target replaces its last completion;
    mask_all_zero: a group whose advantages are all zero takes no part in the loss, nor in its mean, nor in the KL;
    test_beam: width of a second search whose HR and NDCG on the batch's prompts are logged, 0 for none;
    validation: (prompts, target items) for `evaluate`, searched with `eval_beams` beams.

    Logged beside TRL's: `group/…` (HR and NDCG of the groups as generated, `distinct` SIDs of a group, `dead`: the
    share of groups with all advantages zero), `test/…`, and `seconds/…` of an optimizer step: `generation`,
    `log_probs` (old and reference), `update` (forward and backward).
    """

    _tag_names = ["minionerec"]

    def __init__(
        self,
        *args,
        catalog: Catalog,
        logp_space: str = "vocab",
        beams: bool = True,
        dynamic_sampling: bool = False,
        add_gt: bool = False,
        mask_all_zero: bool = False,
        test_beam: int = 0,
        validation: tuple[Sequence[str], Sequence[int]] | None = None,
        eval_beams: int = 20,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.catalog = catalog
        self.trie = catalog.trie(self.processing_class).to(self.accelerator.device)
        token_id = self.processing_class.convert_tokens_to_ids
        self.completion_of_leaf = [token_id(self.processing_class.tokenize(sid)) for sid in catalog.sids]
        self.logp_space = logp_space
        self.beams = beams
        self.dynamic_sampling = dynamic_sampling
        self.add_gt = add_gt
        self.mask_all_zero = mask_all_zero
        self.test_beam = test_beam
        self.validation = validation and Validation(*validation, catalog, self.trie, eval_beams, logp_space)
        self.aux_loss_enabled = False  # transformers' load-balancing loss of experts cannot read a tree mask
        self._targets: list[int] = []
        self._seconds = dict.fromkeys(("generation", "log_probs", "update"), 0.0)
        # Now, before anything wraps `forward` in mixed precision, whose rounding would look like another model's.
        shared_out = (p for p in self.model.parameters() if hasattr(p, "ds_status"))  # under ZeRO-3, adapters are not
        with maybe_gather_lm_head_ctx(*shared_out):
            require_tree_attention(self.model)
        if logp_space == "catalog":
            for model in filter(None, (self.model, self.ref_model)):
                add_catalog_head(unwrap_adapter(self.accelerator.unwrap_model(model)), self.trie, self.temperature)

    # ---------------------------------------------------------------------------------------- generation

    def _generate_and_score_completions(self, inputs):
        self._targets = [self.catalog.row_of_sid[row["target_sid"]] for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        groups = output["advantages"].view(-1, self.num_generations)
        # Equal rewards have equal advantages to the last bit, though rounding may keep them from being 0.
        dead = groups.amax(dim=1) == groups.amin(dim=1)
        every_dead = self.accelerator.gather(dead)
        self._metrics["train"]["group/dead"].append(every_dead.float().mean().item())
        if self.mask_all_zero:
            mask = output["completion_mask"] * ~dead.repeat_interleave(self.num_generations)[:, None]
            output["completion_mask"] = mask
            output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
            output["rows_per_live_row"] = len(every_dead) / (~every_dead).sum().clamp(min=1)
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        started = self._now()
        groups = prompt_ids[::num_generations]
        targets = torch.tensor(self._targets[::num_generations], device=self.accelerator.device)[:, None]
        ids, mask = left_pad(groups, self.processing_class.pad_token_id, self.accelerator.device)
        with model_for_search(self) as model:
            was_training = model.training
            model.eval()
            leaf = self._draw(model, ids, mask, targets)
            if self.test_beam:
                tested = beam_search(model, self.trie, ids, mask, self.test_beam, space=self.logp_space).row
                self._log_group_metrics("test", tested, targets)
            model.train(was_training)
        self._log_group_metrics("group", leaf, targets)
        in_order = leaf.sort(dim=1).values
        distinct = (in_order[:, 1:] != in_order[:, :-1]).sum(dim=1) + 1.0
        self._metrics["train"]["group/distinct"].append(self.accelerator.gather(distinct).mean().item())
        if self.add_gt:
            missed = ~(leaf == targets).any(dim=1)
            leaf[missed, -1] = targets[missed, 0]
        completions = [self.completion_of_leaf[row] for row in leaf.flatten().tolist()]
        self._seconds["generation"] += self._now() - started
        return completions, None

    def _draw(self, model, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The groups of some prompts as rows of the catalog's SIDs, most probable first: (prompts, group)."""
        drawn = math.ceil(DRAWN * self.num_generations) if self.dynamic_sampling else self.num_generations
        if self.beams:
            leaf = beam_search(model, self.trie, ids, mask, drawn, self.temperature, space=self.logp_space).row
        else:
            # Seeded by the step, not by what was drawn before: a resumed run draws what an unbroken one draws.
            step = self.state.global_step * self.accelerator.num_processes + self.accelerator.process_index
            generator = torch.Generator(self.accelerator.device).manual_seed(self.args.seed + 1_000_003 * step)
            draw = {"temperature": self.temperature, "top_p": self.top_p, "space": self.logp_space}
            found = sample(model, self.trie, ids, mask, drawn, **draw, generator=generator)
            # By leaf within equal scores, so that copies of one SID stand together.
            order = found.row.argsort(dim=1, stable=True)
            order = order.gather(1, found.score.gather(1, order).argsort(dim=1, descending=True, stable=True))
            leaf = found.row.gather(1, order)
        return keep_target_first(leaf, targets, self.num_generations) if self.dynamic_sampling else leaf

    def _log_group_metrics(self, name: str, leaf: torch.Tensor, targets: torch.Tensor) -> None:
        hits = leaf == targets
        rank = torch.where(hits.any(dim=1), hits.int().argmax(dim=1), metrics.MISSED)
        rank = self.accelerator.gather(rank).cpu().numpy()
        for metric, value in metrics.table(rank, [leaf.shape[1]]).items():
            self._metrics["train"][f"{name}/{metric}"].append(value)

    # ---------------------------------------------------------------------------------------- log-probabilities

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
        """As TRL's, with each prompt encoded once for the neighbouring rows that share it.

        A branch repeats the prompt's last token and then its completion but for the last token: every position of a
        branch predicts one token of the completion, and the branches do not share the position that predicts c_1.
        Rows without any token left in their mask are not computed, where others have some: their values are 0.
        """
        started = self._now()
        live = attention_mask[:, -logits_to_keep:].any(dim=1)
        if not live.any():
            live[: self.num_generations] = True  # every process takes part in each forward
        rows, length = int(live.sum()), input_ids.shape[1]
        values = self._shared_prompt_log_probs(
            model,
            input_ids[live],
            attention_mask[live],
            length - logits_to_keep,
            batch_size or rows,
        )
        if rows < len(live):
            values = [value.new_zeros(len(live), logits_to_keep).index_put((live,), value) for value in values]
        log_probs, entropies = values
        if not torch.is_grad_enabled():
            self._seconds["log_probs"] += self._now() - started
        return log_probs, entropies if compute_entropy else None, None

    def _shared_prompt_log_probs(self, model, input_ids, attention_mask, prompt_length, batch_size):
        """Log-probabilities and entropies, both (rows, completion)."""
        rows, kept = len(input_ids), input_ids.shape[1] - prompt_length
        prompt, prompt_mask = input_ids[:, :prompt_length], attention_mask[:, :prompt_length]
        branches = run_lengths_gcd(torch.cat([prompt, prompt_mask], dim=1))
        per_chunk = max(batch_size // branches, 1)
        trunk, trunk_mask = prompt[::branches, :-1], prompt_mask[::branches, :-1]
        branch = input_ids[:, prompt_length - 1 : -1].reshape(rows // branches, -1)
        completions = input_ids[:, prompt_length:].reshape(-1, branches, kept)
        completion_mask = attention_mask[:, prompt_length:].reshape(-1, branches, kept)

        parts = []
        for start in range(0, rows // branches, per_chunk):
            chunk = slice(start, start + per_chunk)
            mask, position_ids = branch_mask_and_positions(
                trunk_mask[chunk], branches, kept, self.accelerator.unwrap_model(model).dtype
            )
            tokens = torch.cat([trunk[chunk], branch[chunk]], dim=1)
            inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": position_ids}
            if hasattr(self.model.config, "output_router_logits"):
                inputs["output_router_logits"] = False
            with self.accelerator.autocast():
                if self.logp_space == "catalog":
                    part = model(**inputs, completions=completions[chunk], completion_mask=completion_mask[chunk])
                    parts.append([value.reshape(-1, kept) for value in part])
                    continue
                labels = completions[chunk].masked_fill(completion_mask[chunk] == 0, -100).flatten(1)
                with last_states(unwrap_adapter(self.accelerator.unwrap_model(model)), labels.shape[1]):
                    part = model(**inputs, shift_labels=labels, fused_lm_head=True)
            entropy = part.log_probs if part.entropy is None else part.entropy  # the reference computes none
            parts.append([value.reshape(-1, kept) for value in (part.log_probs, entropy)])
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        # Token means leave masked rows out by themselves; a mean over rows counts them.
        return loss * inputs["rows_per_live_row"] if self.mask_all_zero and self.loss_type in MEAN_OVER_ROWS else loss

    # ---------------------------------------------------------------------------------------- batches

    def _now(self) -> float:
        """Seconds on a clock, with nothing left to do on the device."""
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

    def _prepare_inputs(self, generation_batch):
        """As TRL's for training; rows are shuffled by whole groups, and evaluation does not come here."""
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            groups = torch.randperm(len(batch["prompt_ids"]) // self.num_generations)
            order = (groups[:, None] * self.num_generations + torch.arange(self.num_generations)).flatten()
            batch = {k: v[order] if torch.is_tensor(v) and v.ndim else v for k, v in batch.items()}
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # ---------------------------------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """HR and NDCG by item of constrained beam search on the validation rows, the same on any number of processes."""
        started = time.time()
        result = {f"{metric_key_prefix}_{name}": value for name, value in self.validation.measure(self).items()}
        result |= speed_metrics(metric_key_prefix, started, num_samples=len(self.validation.prompts))
        self.log(result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result
