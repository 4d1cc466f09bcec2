"""Log-probabilities of a prompt's completions, with the prompt encoded once: `[prompt | c_1 | … | c_G]` in one row.

Equal to a forward of each `prompt + completion` in its own row, to float tolerance, gradients included. A branch
repeats the prompt's last token and then its completion without the last token, so that each position of a branch
predicts one token of the completion, and branches share no position.

    space     normalised over               LM head
    vocab     the whole vocabulary          TRL's fused head (`trl.trainer.utils.add_fused_lm_head`)
    catalog   the tokens the trie allows    `add_catalog_head`: only those tokens' rows are multiplied

Both heads are part of the model's `forward`, so that DDP and DeepSpeed see one forward.
"""

import functools
import math
import types
from contextlib import contextmanager
from typing import NamedTuple

import torch
from trl.trainer.utils import maybe_gather_lm_head_ctx

from minionerec.catalog.trie import Trie
from minionerec.decoding.lm_head import LMHead, allowed_log_probs
from minionerec.decoding.tree_attention import branch_mask_and_positions


class LogProbs(NamedTuple):
    """Both have the shape of the completions, and 0 at masked tokens."""

    log_probs: torch.Tensor  # nats
    entropy: torch.Tensor  # nats


def group_log_probs(
    model, causal_lm, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int, *, space: str, chunk_rows: int
) -> LogProbs:
    """Log-probabilities and entropies of the last `length` tokens of each row, both (rows, length).

    model: what is called: the causal LM with its head, or a wrapper (DDP, DeepSpeed, PEFT). causal_lm: the LM inside.
    input_ids, attention_mask: (rows, prompt + length), prompts padded on the left, completions on the right.
    Neighbouring rows with one prompt share its encoding; at most `chunk_rows` completions go through one forward.
    """
    rows, prompt_length = len(input_ids), input_ids.shape[1] - length
    prompt, prompt_mask = input_ids[:, :prompt_length], attention_mask[:, :prompt_length]
    branches = run_lengths_gcd(torch.cat([prompt, prompt_mask], dim=1))
    trunk, trunk_mask = prompt[::branches, :-1], prompt_mask[::branches, :-1]  # (prompts, prompt - 1)
    branch = input_ids[:, prompt_length - 1 : -1].reshape(rows // branches, -1)  # (prompts, branches * length)
    completions = input_ids[:, prompt_length:].reshape(-1, branches, length)
    completion_mask = attention_mask[:, prompt_length:].reshape(-1, branches, length)

    parts, prompts_per_chunk = [], max(chunk_rows // branches, 1)
    for start in range(0, rows // branches, prompts_per_chunk):
        chunk = slice(start, start + prompts_per_chunk)
        mask, position_ids = branch_mask_and_positions(trunk_mask[chunk], branches, length, causal_lm.dtype)
        tokens = torch.cat([trunk[chunk], branch[chunk]], dim=1)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": position_ids}
        if hasattr(causal_lm.config, "output_router_logits"):
            inputs["output_router_logits"] = False  # the load-balancing loss of experts cannot read a tree mask
        if space == "catalog":
            part = model(**inputs, completions=completions[chunk], completion_mask=completion_mask[chunk])
        else:
            labels = completions[chunk].masked_fill(completion_mask[chunk] == 0, -100).flatten(1)
            with last_states(causal_lm, labels.shape[1]):
                part = model(**inputs, shift_labels=labels, fused_lm_head=True)
        entropy = part.log_probs if part.entropy is None else part.entropy  # the reference's head computes none
        parts.append([value.reshape(-1, length) for value in (part.log_probs, entropy)])
    return LogProbs(*(torch.cat(values) for values in zip(*parts, strict=True)))


def run_lengths_gcd(rows: torch.Tensor) -> int:
    """The greatest g such that `rows` (n, length) consists of blocks of g equal neighbours.

    >>> run_lengths_gcd(torch.tensor([[7], [7], [7], [7], [8], [8]]))
    2
    """
    changes = (rows[1:] != rows[:-1]).any(dim=1).nonzero()[:, 0] + 1
    return math.gcd(len(rows), *changes.tolist())


@contextmanager
def last_states(causal_lm, count: int):
    """The model's body returns only the states of the last `count` positions, so that the head projects no others.

    On a GPU TRL's fused head skips positions without a label itself; elsewhere it projects every position.
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
    """Make `model(…, completions=ids, completion_mask=mask)` return `LogProbs` over what the trie allows.

    The last branches * length states of a row predict `completions`, (rows, branches, length). Without `completions`
    the forward is unchanged. `model` is the causal LM itself, without an adapter around it.
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
        return LogProbs(*(torch.stack(x, dim=-1).masked_fill(~kept, 0.0) for x in (log_probs, entropy)))

    model.forward = types.MethodType(forward, model)
