"""Catalog-constrained decoding: beam search and sampling of SIDs over trie nodes.

A prompt is encoded once. At depth d its K beams are K tokens of one row that see the prompt, their own ancestors and
themselves (tree_attention.py); no prompt and no cache is repeated per beam, and no Python loop runs over beams.

    space     scores are normalised over           lists and scores agree with
    vocab     the whole vocabulary                 `transformers`' beam search with `prefix_allowed_tokens_fn`
    catalog   the tokens that the trie allows      the policy that RL trains in this space

The model's generation config is not read.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from minionerec.catalog.trie import Allowed, Trie
from minionerec.common.errors import UserError
from minionerec.decoding.lm_head import LMHead, allowed_log_probs
from minionerec.decoding.tree_attention import PromptTree, require_tree_attention


class Beams(NamedTuple):
    """SIDs of each prompt. From `beam_search` distinct, best first; from `sample` in the order drawn."""

    row: torch.Tensor  # (prompts, width) rows of the catalog's SIDs, -1 where a restricted trie has no more of them
    score: torch.Tensor  # (prompts, width) sum of token log-probabilities in nats, over length ** length_penalty


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
    """The `num_beams` most probable SIDs after each prompt: `beam_searches` under one trie."""
    arguments = (input_ids, attention_mask, num_beams, temperature, length_penalty, space)
    return beam_searches(model, [trie], *arguments)[0]


@torch.no_grad()
def beam_searches(
    model,
    tries: Sequence[Trie],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_beams: int,
    temperature: float = 1.0,
    length_penalty: float = 0.0,
    space: str = "vocab",
) -> list[Beams]:
    """A beam search under each of `tries`, which may be restrictions of one trie; the prompts are encoded once.

    input_ids, attention_mask: (prompts, length), padded on either side. Every prompt gets min(num_beams, catalog) distinct
    SIDs, fewer (-1) only where a restriction leaves fewer. Finished beams are stored separately and use no beam slot.
    Raises `UserError` if the model cannot decode a tree of tokens or its logits are not finite.
    """
    require_tree_attention(model)
    head = LMHead.of(model)
    tree = PromptTree(model, input_ids, attention_mask)
    found = []
    for trie in tries:
        tree.rewind()
        frontier = TreeFrontier(tree, head, temperature, space)
        found.append(search(frontier, trie.to(input_ids.device), len(input_ids), num_beams, length_penalty))
    return found


class Frontier(Protocol):
    """The newest tokens of the beams of some prompts, and how an engine continues them."""

    def expand(self, trie: Trie, node: torch.Tensor, alive: torch.Tensor, level: int) -> tuple[torch.Tensor, Allowed]:
        """Log-probabilities of what may follow each beam, -inf elsewhere, and the `Allowed` of the same width.

        node, alive: (prompts, beams) trie nodes of depth `level`, and which beams are in use.
        """

    def grow(self, token: torch.Tensor, parent: torch.Tensor) -> None:
        """Continue the beam at place `parent` with `token`. Both (prompts, beams)."""


class TreeFrontier(NamedTuple):
    """The frontier of a `PromptTree`."""

    tree: PromptTree
    head: LMHead
    temperature: float
    space: str

    def expand(self, trie: Trie, node: torch.Tensor, alive: torch.Tensor, level: int) -> tuple[torch.Tensor, Allowed]:
        options = {"space": self.space, "level": level, "temperature": self.temperature}
        return allowed_log_probs(self.head, self.tree.hidden, trie, node, **options)

    def grow(self, token: torch.Tensor, parent: torch.Tensor) -> None:
        self.tree.grow(token, parent)


def search(frontier: Frontier, trie: Trie, prompts: int, num_beams: int, length_penalty: float) -> Beams:
    """The best `num_beams` SIDs of each prompt, level by level. Every engine searches with this function."""
    width = min(num_beams, trie.n_leaves)
    node = torch.zeros(prompts, 1, dtype=torch.long, device=trie.leaf.device)
    score = torch.zeros(node.shape, device=node.device)
    done = Beams(node.new_full((prompts, width), -1), score.new_full((prompts, width), -torch.inf))
    for depth in range(trie.depth):
        # (prompts, beams, children) each
        log_probs, allowed = frontier.expand(trie, node, score > -torch.inf, depth)
        reached = (score.unsqueeze(-1) + log_probs).flatten(1)
        child, token = allowed.node.flatten(1), allowed.token.flatten(1)
        row = torch.where(reached > -torch.inf, trie.leaf[child], -1)

        ended = (reached / (depth + 1) ** length_penalty).masked_fill(row < 0, -torch.inf)
        best, place = torch.cat([done.score, ended], dim=1).topk(width)
        done = Beams(torch.cat([done.row, row], dim=1).gather(1, place), best)
        if depth + 1 < trie.depth:
            running = reached.masked_fill(row >= 0, -torch.inf)
            score, place = running.topk(min(num_beams, running.shape[1]))
            node = child.gather(1, place)
            frontier.grow(token.gather(1, place), place // allowed.token.shape[2])
    refuse_broken(done.score.isfinite().sum(1), trie.reachable[..., 0].clamp(max=width))
    return done


def refuse_broken(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise `UserError` unless each prompt has as many finite scores as expected."""
    if not (found == expected).all():
        raise UserError(
            "decoding: the model's logits are not finite; its weights hold NaN or Inf, or training diverged (lower --learning_rate)"
        )


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

    Tokens are drawn from the policy renormalised over what the trie allows at each node, restricted to the smallest set
    with probability `top_p` (nucleus sampling, arXiv 1904.09751). The score is the log-probability of the drawn SID in
    nats, in `space`, at `temperature`, without the nucleus cut. `generator` must be on the model's device. Raises as
    `beam_searches` does, and `ValueError` where a restriction leaves a prompt nothing to draw.
    """
    require_tree_attention(model)
    trie, head = trie.to(input_ids.device), LMHead.of(model)
    if not trie.reachable[..., 0].all():
        raise ValueError("the restriction leaves a prompt no SID to draw")
    tree = PromptTree(model, input_ids, attention_mask)
    node = input_ids.new_zeros(len(input_ids), num_samples)
    score = torch.zeros(node.shape, device=node.device)
    for depth in range(trie.depth):
        # All samples share the state of the root; below it each has its own.
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
    row = trie.leaf[node]
    refuse_broken((score.isfinite() & (row >= 0)).sum(1), node.new_tensor(num_samples))
    return Beams(row, score)


def _draw(log_probs: torch.Tensor, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """One choice for each row of unnormalised (..., choices) log-probabilities, as (..., 1) places."""
    probs = log_probs.softmax(dim=-1).nan_to_num()  # a finished sample allows nothing: place 0, which is ignored
    if top_p < 1.0:
        ranked, place = probs.sort(dim=-1, descending=True)
        kept = ranked.cumsum(dim=-1) - ranked < top_p  # the probability before it is below top_p
        probs = torch.zeros_like(probs).scatter(-1, place, ranked * kept)
    # argmax of p_i / e_i with e_i ~ Exp(1) is a draw from p: all rows in one call.
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

    A batch has at most `batch_size` rows and, padded, at most `batch_tokens` tokens; a longer row is its own batch.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        wanted = len(batches[-1]) + 1 if batches else 0
        if not batches or wanted > batch_size or wanted * lengths[row] > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches
