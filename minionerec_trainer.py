"""ReReTrainer: TRL's GRPO over catalog-constrained beams (ReRe, arXiv 2510.12211; GRPO, arXiv 2402.03300).

Rewards, advantages, losses, KL, reference model and logging are TRL's. What differs:

- generation: the group of a prompt is its beam list, in order, from one constrained beam search (beam_search.py);
- log-probabilities: a prompt is encoded once for all its completions, `[prompt | c_1 | … | c_G]` in one row;
- the shuffle between generation and update permutes whole groups, so that the line above finds them together;
- evaluation: HR and NDCG of constrained beam search on validation rows, in place of the reward of samples.
"""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import speed_metrics
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict

import metrics
from beam_search import beam_search, left_pad, recommend
from catalog import Catalog
from tree_attention import branch_mask_and_positions


def run_lengths_gcd(rows: torch.Tensor) -> int:
    """The greatest g such that `rows` (n, length) consists of blocks of g equal neighbours."""
    changes = (rows[1:] != rows[:-1]).any(dim=1).nonzero()[:, 0] + 1
    return math.gcd(len(rows), *changes.tolist())


class ReReTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose completions are the beams of a catalog.

    Dataset rows carry their own target: columns `prompt`, `target_sid`, and whatever the rewards ask for.

    catalog: what may be generated; add_gt: where a group lacks the target, the target replaces its last beam;
    test_beam: width of a second search whose HR and NDCG on the batch's prompts are logged, 0 for none;
    validation: (prompts, target items) for `evaluate`, searched with `eval_beams` beams.
    """

    _tag_names = ["minionerec"]

    def __init__(
        self,
        *args,
        catalog: Catalog,
        add_gt: bool = False,
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
        self.add_gt = add_gt
        self.test_beam = test_beam
        self.validation = validation
        self.eval_beams = eval_beams
        self._targets: list[int] = []

    # ---------------------------------------------------------------------------------------- generation

    def _generate_and_score_completions(self, inputs):
        self._targets = [self.catalog.row_of_sid[row["target_sid"]] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        groups = prompt_ids[::num_generations]
        targets = torch.tensor(self._targets[::num_generations], device=self.accelerator.device)[:, None]
        ids, mask = left_pad(groups, self.processing_class.pad_token_id, self.accelerator.device)
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
        ) as model:
            was_training = model.training
            model.eval()
            leaf = beam_search(model, self.trie, ids, mask, num_generations, self.temperature).leaf
            if self.test_beam:
                tested = beam_search(model, self.trie, ids, mask, self.test_beam).leaf
                self._log_group_metrics("test", tested, targets)
            model.train(was_training)
        self._log_group_metrics("group", leaf, targets)
        if self.add_gt:
            missed = ~(leaf == targets).any(dim=1)
            leaf[missed, -1] = targets[missed, 0]
        return [self.completion_of_leaf[row] for row in leaf.flatten().tolist()], None

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
        compute_aux_loss=False,
        **_,
    ):
        """As TRL's, with each prompt encoded once for the neighbouring rows that share it.

        A branch repeats the prompt's last token and then its completion but for the last token: every position of a
        branch predicts one token of the completion, and the branches do not share the position that predicts c_1.
        """
        rows, length = input_ids.shape
        prompt_length = length - logits_to_keep
        branches = run_lengths_gcd(torch.cat([input_ids[:, :prompt_length], attention_mask[:, :prompt_length]], dim=1))
        per_chunk = max((batch_size or rows) // branches, 1)
        trunk, trunk_mask = input_ids[::branches, : prompt_length - 1], attention_mask[::branches, : prompt_length - 1]
        branch = input_ids[:, prompt_length - 1 : -1].reshape(rows // branches, -1)
        labels = input_ids[:, prompt_length:].masked_fill(attention_mask[:, prompt_length:] == 0, -100)
        labels = labels.reshape(rows // branches, -1)

        parts = []
        for start in range(0, rows // branches, per_chunk):
            chunk = slice(start, start + per_chunk)
            mask, position_ids = branch_mask_and_positions(
                trunk_mask[chunk], branches, logits_to_keep, self.accelerator.unwrap_model(model).dtype
            )
            nothing = torch.full_like(trunk[chunk], -100)
            with self.accelerator.autocast():
                output = model(
                    input_ids=torch.cat([trunk[chunk], branch[chunk]], dim=1),
                    attention_mask=mask,
                    position_ids=position_ids,
                    shift_labels=torch.cat([nothing, labels[chunk]], dim=1),
                    fused_lm_head=True,
                    **({"output_router_logits": True} if compute_aux_loss else {}),
                )
            parts.append(output)

        def completions(name: str) -> torch.Tensor:  # (rows, logits_to_keep)
            return torch.cat([getattr(p, name)[:, prompt_length - 1 :] for p in parts]).reshape(rows, logits_to_keep)

        entropies = completions("entropy") if compute_entropy else None
        aux_loss = torch.stack([part.aux_loss for part in parts]).mean() if compute_aux_loss else None
        return completions("log_probs"), entropies, aux_loss

    # ---------------------------------------------------------------------------------------- batches

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
        prompts, targets = self.validation
        process, world = self.accelerator.process_index, self.accelerator.num_processes
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
        ) as model:
            leaves, _ = recommend(
                model,
                self.processing_class,
                self.trie,
                prompts[process::world],
                self.eval_beams,
                self.args.per_device_eval_batch_size,
            )
        _, ranks = metrics.sid_and_item_ranks(leaves, targets[process::world], self.catalog)
        ranks = np.concatenate(gather_object([ranks]))
        cutoffs = sorted({k for k in metrics.CUTOFFS if k <= self.eval_beams} | {min(10, self.eval_beams)})
        result = {f"{metric_key_prefix}_{name}": value for name, value in metrics.table(ranks, cutoffs).items()}
        result |= speed_metrics(metric_key_prefix, started, num_samples=len(prompts))
        self.log(result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result
