"""Catalog-constrained beam search: a prompt encoded once, its beams as tokens of one row, no Python loop over beams.

At depth d the K beams of a prompt are K tokens that see the prompt, their own ancestors and themselves
(tree_attention.py), over a key-value cache that is never expanded or reordered: abandoned beams stay in it, unseen.
Log-probabilities are normalised over the whole vocabulary and then restricted to the trie, so lists and scores are
those of `transformers`' beam search with `prefix_allowed_tokens_fn`. The model's `generation_config` has no say.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from catalog import Trie
from tree_attention import beam_mask, positions


class Beams(NamedTuple):
    """The best SIDs of each prompt, best first; width is min(num_beams, leaves of the trie)."""

    leaf: torch.Tensor  # (prompts, width) rows of the catalog's SIDs, all distinct within a prompt
    score: torch.Tensor  # (prompts, width) sum of token log-probabilities in nats, over length ** length_penalty


@torch.no_grad()
def beam_search(
    model,
    trie: Trie,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_beams: int,
    temperature: float = 1.0,
    length_penalty: float = 0.0,
) -> Beams:
    """The `num_beams` most probable SIDs after each prompt.

    input_ids, attention_mask: (prompts, length), padded on the left. Every prompt gets min(num_beams, leaves) distinct
    SIDs: beams that end early wait in a pool of their own and take no running beam's place. Raises
    `FloatingPointError` if the model's logits are not finite.
    """
    batch, prompt_length = input_ids.shape
    device, dtype = input_ids.device, next(model.parameters()).dtype
    width = min(num_beams, trie.n_leaves)
    trie = trie.to(device)

    node = torch.zeros(batch, 1, dtype=torch.long, device=device)
    score = torch.zeros(batch, 1, device=device)
    ancestors = torch.empty(batch, 1, 0, dtype=torch.long, device=device)  # cache columns of each beam's tokens
    done = Beams(node.new_full((batch, width), -1), score.new_full((batch, width), -torch.inf))

    prompt_tokens = attention_mask.sum(dim=1, keepdim=True)  # (prompts, 1)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    for depth in range(1, trie.depth + 1):
        log_probs = torch.log_softmax(output.logits.float() / temperature, dim=-1)  # (prompts, beams, vocabulary)
        allowed = trie.allowed(node)  # each (prompts, beams, children)
        reached = score.unsqueeze(-1) + log_probs.gather(2, allowed.token)
        reached = reached.masked_fill(~allowed.mask, -torch.inf).flatten(1)
        child, token = allowed.node.flatten(1), allowed.token.flatten(1)
        leaf = trie.leaf[child]

        ended = torch.cat([done.score, (reached / depth**length_penalty).masked_fill(leaf < 0, -torch.inf)], dim=1)
        best, place = ended.topk(width)
        done = Beams(torch.cat([done.leaf, leaf], dim=1).gather(1, place), best)
        if depth == trie.depth:
            break

        running = reached.masked_fill(leaf >= 0, -torch.inf)
        score, place = running.topk(min(num_beams, running.shape[1]))
        node, parent = child.gather(1, place), place // allowed.token.shape[2]
        beams, past = node.shape[1], output.past_key_values.get_seq_length()
        column = torch.arange(past, past + beams, device=device).expand(batch, beams)
        inherited = ancestors.gather(1, parent.unsqueeze(-1).expand(-1, -1, ancestors.shape[2]))
        ancestors = torch.cat([inherited, column.unsqueeze(-1)], dim=2)
        output = model(
            input_ids=token.gather(1, place),
            attention_mask=beam_mask(attention_mask, ancestors, past + beams, dtype),
            position_ids=(prompt_tokens + depth - 1).expand(batch, beams),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    if not done.score.isfinite().all():
        raise FloatingPointError("beam search: the model's logits are not finite (NaN or infinite weights?)")
    return done


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as (input_ids, attention_mask), both (rows, longest), padded on the left."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad_token_id] * (longest - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def recommend(
    model,
    tokenizer,
    trie: Trie,
    prompts: Sequence[str],
    num_beams: int,
    batch_size: int,
    length_penalty: float = 0.0,
    progress: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`beam_search` for any number of prompts, in batches of about equal length, in evaluation mode.

    Returns (leaf rows, scores), both (prompts, min(num_beams, leaves)), in the order of `prompts`; `progress` names
    a progress bar.
    """
    tokens = tokenizer(list(prompts))["input_ids"]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    width = min(num_beams, trie.n_leaves)
    leaves, scores = np.zeros((len(tokens), width), dtype=np.int64), np.zeros((len(tokens), width))
    was_training = model.training
    model.eval()
    trie = trie.to(model.device)
    for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None):
        rows = order[start : start + batch_size]
        ids, mask = left_pad([tokens[i] for i in rows], tokenizer.pad_token_id or 0, model.device)
        found = beam_search(model, trie, ids, mask, num_beams, length_penalty=length_penalty)
        leaves[rows], scores[rows] = found.leaf.cpu().numpy(), found.score.cpu().numpy()
    model.train(was_training)
    return leaves, scores
