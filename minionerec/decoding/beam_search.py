"""Catalog-constrained decoding: a prompt encoded once, its beams as tokens of one row, no Python loop over beams.

At depth d the K beams of a prompt are K tokens that see the prompt, their own ancestors and themselves
(tree_attention.py). In space `vocab` log-probabilities are normalised over the whole vocabulary and then restricted to
the trie, so lists and scores are those of `transformers`' beam search with `prefix_allowed_tokens_fn`; in space
`catalog` they are normalised over what the trie allows (lm_head.py). The model's `generation_config` has no say.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minionerec.catalog.trie import Trie
from minionerec.decoding.lm_head import LMHead, allowed_log_probs
from minionerec.decoding.tree_attention import PromptTree, require_tree_attention


class Beams(NamedTuple):
    """SIDs of each prompt. From `beam_search` best first and distinct; from `sample` as drawn."""

    row: torch.Tensor  # (prompts, width) rows of the catalog's SIDs, -1 where a restricted trie has no more of them
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
    space: str = "vocab",
) -> Beams:
    """The `num_beams` most probable SIDs after each prompt.

    input_ids, attention_mask: (prompts, length), padded on either side. Every prompt gets min(num_beams, leaves)
    distinct SIDs: beams that end early wait in a pool of their own and take no running beam's place. Raises
    `FloatingPointError` if the model's logits are not finite, `UserError` if the model cannot decode a tree.
    """
    require_tree_attention(model)
    trie, head = trie.to(input_ids.device), LMHead.of(model)
    width = min(num_beams, trie.n_leaves)
    tree = PromptTree(model, input_ids, attention_mask)
    node = input_ids.new_zeros(len(input_ids), 1)
    score = torch.zeros(node.shape, device=node.device)
    done = Beams(node.new_full((len(node), width), -1), score.new_full((len(node), width), -torch.inf))
    for depth in range(trie.depth):
        # (prompts, beams, children) each
        log_probs, allowed = allowed_log_probs(
            head, tree.hidden, trie, node, space=space, level=depth, temperature=temperature
        )
        reached = (score.unsqueeze(-1) + log_probs).flatten(1)
        child, token = allowed.node.flatten(1), allowed.token.flatten(1)
        leaf = torch.where(reached > -torch.inf, trie.leaf[child], -1)

        ended = (reached / (depth + 1) ** length_penalty).masked_fill(leaf < 0, -torch.inf)
        best, place = torch.cat([done.score, ended], dim=1).topk(width)
        done = Beams(torch.cat([done.row, leaf], dim=1).gather(1, place), best)
        if depth + 1 < trie.depth:
            running = reached.masked_fill(leaf >= 0, -torch.inf)
            score, place = running.topk(min(num_beams, running.shape[1]))
            node = child.gather(1, place)
            tree.grow(token.gather(1, place), place // allowed.token.shape[2])
    _refuse_broken(done.score.isfinite().sum(1), trie.reachable[..., 0].clamp(max=width))
    return done


def _refuse_broken(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not (found == expected).all():
        raise FloatingPointError("decoding: the model's logits are not finite (NaN or infinite weights?)")


@torch.no_grad()
def sample(
    model,
    trie: Trie,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_samples: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    space: str = "vocab",
    generator: torch.Generator | None = None,
) -> Beams:
    """`num_samples` independent draws of a SID after each prompt; a SID may be drawn more than once.

    Tokens are drawn from the policy renormalised over what the trie allows at each node, cut to the smallest set that
    holds `top_p` of that probability (nucleus sampling, arXiv 1904.09751). The score is the log-probability of the
    drawn SID in nats, in `space`, at `temperature`, before that cut. The prompt is encoded once, its samples are tokens
    of one row. `generator` lives on the model's device. Raises as `beam_search` does, and `ValueError` where a
    restriction leaves a prompt nothing to draw.
    """
    require_tree_attention(model)
    trie, head = trie.to(input_ids.device), LMHead.of(model)
    if not trie.reachable[..., 0].all():
        raise ValueError("the restriction leaves a prompt no SID to draw")
    tree = PromptTree(model, input_ids, attention_mask)
    node = input_ids.new_zeros(len(input_ids), num_samples)
    score = torch.zeros(node.shape, device=node.device)
    for depth in range(trie.depth):
        # The root has one state for all samples; below it each sample has its own.
        log_probs, allowed = allowed_log_probs(
            head, tree.hidden, trie, node[:, : tree.hidden.shape[1]], space=space, level=depth, temperature=temperature
        )
        running = trie.leaf[node] < 0  # (prompts, samples)
        drawn = _draw(log_probs.expand(*node.shape, -1), top_p, generator)

        def of_drawn(values: torch.Tensor, drawn: torch.Tensor = drawn) -> torch.Tensor:
            return values.expand(*drawn.shape[:2], -1).gather(2, drawn).squeeze(2)

        score = score + of_drawn(log_probs).masked_fill(~running, 0.0)
        node = torch.where(running, of_drawn(allowed.node), node)
        if depth + 1 < trie.depth:
            own = torch.arange(num_samples, device=node.device).expand_as(node)
            tree.grow(of_drawn(allowed.token), own if depth else torch.zeros_like(own))
    leaf = trie.leaf[node]
    _refuse_broken((score.isfinite() & (leaf >= 0)).sum(1), node.new_tensor(num_samples))
    return Beams(leaf, score)


def _draw(log_probs: torch.Tensor, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """One choice for each row of unnormalised (..., choices) log-probabilities, as (..., 1) places."""
    probs = log_probs.softmax(dim=-1).nan_to_num()  # a row that allows nothing draws place 0, which nobody reads
    if top_p < 1.0:
        ranked, place = probs.sort(dim=-1, descending=True)
        kept = ranked.cumsum(dim=-1) - ranked < top_p  # what stands before it does not hold top_p yet
        probs = torch.zeros_like(probs).scatter(-1, place, ranked * kept)
    # The first of independent exponential clocks to ring, by rates `probs`: one draw a row without a loop.
    clocks = torch.empty(probs.shape, device=probs.device).exponential_(generator=generator)
    return (probs / clocks).argmax(dim=-1, keepdim=True)


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as (input_ids, attention_mask), both (rows, longest), padded on the left."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad_token_id] * (longest - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def length_batches(lengths: Sequence[int], batch_size: int, batch_tokens: int) -> list[list[int]]:
    """Rows in batches of about equal length, shortest first.

    A batch has at most `batch_size` rows and, padded, at most `batch_tokens` tokens; a longer row stands alone.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        wanted = len(batches[-1]) + 1 if batches else 0
        if not batches or wanted > batch_size or wanted * lengths[row] > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def recommend_batch(
    model, tokens: Sequence[Sequence[int]], pad_token_id: int, trie: Trie, num_beams: int, excluded=None, **search
) -> tuple[np.ndarray, np.ndarray]:
    """`beam_search` for one batch of token lists in evaluation mode: (SID rows, scores), both (prompts, width).

    excluded: for each prompt, rows of SIDs that it must not get; `search` goes to `beam_search`.
    """
    ids, mask = left_pad(tokens, pad_token_id, model.device)
    if excluded is not None and any(excluded):
        allowed = torch.ones(len(tokens), trie.n_leaves, dtype=torch.bool)
        for prompt, sid_rows in enumerate(excluded):
            allowed[prompt, sid_rows] = False
        trie = trie.restrict(allowed.to(model.device))
    was_training = model.training
    model.eval()
    found = beam_search(model, trie, ids, mask, num_beams, **search)
    model.train(was_training)
    return found.row.cpu().numpy(), found.score.cpu().numpy()


def recommend(
    model,
    tokenizer,
    trie: Trie,
    prompts: Sequence[str],
    num_beams: int,
    batch_size: int,
    length_penalty: float = 0.0,
    progress: str | None = None,
    *,
    space: str = "vocab",
    batch_tokens: int = 1 << 14,
    excluded: Sequence[Sequence[int]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`beam_search` for any number of prompts, in batches of about equal length, in evaluation mode.

    Returns (SID rows, scores), both (prompts, min(num_beams, catalog)), in the order of `prompts`. `progress` names
    a progress bar; `excluded` holds, for each prompt, rows of SIDs that it must not get.
    """
    tokens = tokenizer(list(prompts))["input_ids"]
    width = min(num_beams, trie.n_leaves)
    sid_rows, scores = np.zeros((len(tokens), width), dtype=np.int64), np.zeros((len(tokens), width))
    trie, pad = trie.to(model.device), tokenizer.pad_token_id or 0
    batches = length_batches([len(t) for t in tokens], batch_size, batch_tokens)
    for batch in tqdm(batches, desc=progress, disable=progress is None):
        sid_rows[batch], scores[batch] = recommend_batch(
            model,
            [tokens[i] for i in batch],
            pad,
            trie,
            num_beams,
            excluded and [excluded[i] for i in batch],
            length_penalty=length_penalty,
            space=space,
        )
    return sid_rows, scores
