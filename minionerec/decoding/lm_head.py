"""Log-probabilities of the tokens that a trie allows, from hidden states. Decoding and RL both use them.

space     log p(token t | node) =             rows of the LM head that are multiplied
vocab     logit_t − logsumexp over vocabulary   all, in blocks: (prompts, beams, vocabulary) logits never exist
catalog   logit_t − logsumexp over allowed      the level's tokens only
"""

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from minionerec.catalog.trie import Allowed, Trie
from minionerec.common.errors import UserError
from minionerec.decoding.spaces import SPACES

BLOCK = {"cpu": 1 << 21, "cuda": 1 << 27}  # logits computed per block: fits the CPU's cache, fills a GPU


def unwrap_adapter(model):
    """The causal LM inside a `peft.PeftModel`, its adapter layers still active; any other `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class LMHead(NamedTuple):
    """logits = softcap(scale * (hidden @ weight.T + bias)), softcap(x) = cap * tanh(x / cap) or nothing."""

    weight: torch.Tensor  # (vocabulary, dim)
    bias: torch.Tensor | None  # (vocabulary,)
    scale: float
    cap: float | None

    @classmethod
    def of(cls, model) -> "LMHead":
        """The head of a causal LM, by its config; raises `UserError` where it is not one linear layer.

        Scale and cap are those of Cohere (`logit_scale`), Granite (`logits_scaling`) and Gemma
        (`final_logit_softcapping`). `tree_attention.require_tree_attention` detects any other transformation.
        """
        model = unwrap_adapter(model)
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        head = getattr(head, "token_adapter", head)  # PEFT's layer, where some tokens' rows are trained apart
        if hasattr(head, "get_merged_weights"):
            weight, head = head.get_merged_weights(head.active_adapters), head.get_base_layer()
        else:
            weight = getattr(head, "weight", None)
        if not isinstance(head, torch.nn.Linear):
            raise UserError(
                f"{type(model).__name__} has a {type(head).__name__} for an LM head, expected one linear layer; "
                "merge the adapter into it or leave lm_head out of the adapter's targets"
            )
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Logits of the tokens `rows`, float32. (..., dim) -> (..., rows)."""
        bias = None if self.bias is None else self.bias[rows]
        logits = linear(hidden, self.weight[rows], bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits.float()

    def log_normalizer(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """log of the sum of exp(logits / temperature) over the vocabulary, in nats. (..., dim) -> (..., 1)."""
        block = max(BLOCK.get(hidden.device.type, 1 << 24) // (hidden.numel() // hidden.shape[-1]), 1)
        parts = []
        for start in range(0, len(self.weight), block):
            logits = self.logits(hidden, slice(start, start + block))
            parts.append(torch.logsumexp(logits if temperature == 1.0 else logits / temperature, dim=-1))
        return torch.stack(parts, dim=-1).logsumexp(dim=-1, keepdim=True)


def allowed_log_probs(
    head: LMHead,
    hidden: torch.Tensor,
    trie: Trie,
    node: torch.Tensor,
    *,
    space: str,
    level: int | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, Allowed]:
    """Log-probabilities of what may follow each node, in nats, and which tokens and nodes those are.

    hidden: (..., dim) states that predict the next token; node: (...) their trie nodes; level: the depth of the nodes if
    all have the same, so that only that level's tokens are multiplied. Returns (..., width) log-probabilities, -inf where
    nothing is allowed, and the `Allowed` of the same width. Differentiable in `hidden` and in the head.
    """
    allowed = trie.allowed(node, level)
    low, high = trie.columns[level] if level is not None else (0, len(trie.tokens))
    logits = head.logits(hidden, trie.tokens[low:high]) / temperature
    logits = logits.gather(-1, (allowed.column - low).clamp(min=0)).masked_fill(~allowed.mask, -torch.inf)
    if space == "catalog":
        total = logits.logsumexp(dim=-1, keepdim=True)
    elif space == "vocab":
        total = head.log_normalizer(hidden, temperature)
    else:
        raise ValueError(f"space {space!r}, expected one of {SPACES}")
    return (logits - total).masked_fill(~allowed.mask, -torch.inf), allowed  # -inf - -inf at a leaf is NaN
