"""Tree attention: a shared prefix and its branches in one row, by position ids and a 4-D mask.

A prompt is encoded once. Its beams, or the completions of its group, follow in the same row; each sees the prompt, its
own ancestors and itself. Positions restart after the prompt in every branch, so the result equals a forward of each
`prompt + branch` in its own row.

Masks are additive (0 where visible, the dtype's minimum elsewhere) with shape (rows, 1, queries, keys), which
`transformers` passes unchanged to eager and SDPA attention. `require_tree_attention` tests whether a model supports
them by comparing a small tree with plain rows.
"""

from contextlib import nullcontext
from weakref import WeakSet

import torch

from minionerec.common.errors import UserError
from minionerec.decoding.lm_head import LMHead, unwrap_adapter


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, queries, keys) booleans as an additive (rows, 1, queries, keys) mask."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids of padded rows: 0 at each row's first real token. (rows, length) -> (rows, length)."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def beam_mask(prompt_mask: torch.Tensor, ancestors: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of one decoding step over a cache that is shared by all beams.

    prompt_mask: (rows, prompt), 1 at real tokens; ancestors: (rows, beams, depth) cache columns of each beam's tokens,
    the newest included; keys: columns in the cache after this step. Returns (rows, 1, beams, keys).
    """
    rows, beams, _ = ancestors.shape
    visible = torch.zeros(rows, beams, keys, dtype=torch.bool, device=prompt_mask.device)
    visible[:, :, : prompt_mask.shape[1]] = prompt_mask.bool().unsqueeze(1)
    visible.scatter_(2, ancestors, True)
    return additive(visible, dtype)


def branch_mask_and_positions(
    trunk_mask: torch.Tensor, branches: int, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and position ids of rows `[trunk | branch 1 | … | branch G]`, every branch `length` tokens long.

    trunk_mask: (rows, trunk), 1 at real tokens. Returns (rows, 1, total, total) and (rows, total), with
    total = trunk + branches * length.
    """
    rows, trunk = trunk_mask.shape
    device = trunk_mask.device
    offset = torch.arange(length, device=device).repeat(branches)  # place of a token in its branch
    branch = torch.arange(branches, device=device).repeat_interleave(length)
    # The trunk is causal; a branch sees the trunk and, causally, itself.
    causal = torch.ones(trunk, trunk, dtype=torch.bool, device=device).tril()
    within = (branch[:, None] == branch[None, :]) & (offset[:, None] >= offset[None, :])
    structure = torch.zeros(trunk + len(offset), trunk + len(offset), dtype=torch.bool, device=device)
    structure[:trunk, :trunk] = causal
    structure[trunk:, :trunk] = True
    structure[trunk:, trunk:] = within
    real = torch.cat([trunk_mask.bool(), trunk_mask.new_ones(rows, len(offset)).bool()], dim=1)
    # A padded token sees itself: softmax over a row of the mask with nothing visible would be NaN.
    visible = (structure & real.unsqueeze(1)) | torch.eye(len(structure), dtype=torch.bool, device=device)
    trunk_length = trunk_mask.sum(dim=1, keepdim=True)
    return additive(visible, dtype), torch.cat([positions(trunk_mask), trunk_length + offset], dim=1)


def attention_window(config) -> int | None:
    """Tokens of the narrowest sliding window among a model's layers; None where all attention is full."""
    config = config.get_text_config()
    layers = getattr(config, "layer_types", None)
    slides = any(layer != "full_attention" for layer in layers) if layers else True
    return (getattr(config, "sliding_window", None) or None) if slides else None


class PromptTree:
    """Prompts in a key-value cache that is never expanded or reordered, and the tokens grown from them level by level.

    hidden: (prompts, 1, dim), then (prompts, tokens, dim): the states that predict what follows the newest tokens.
    Tokens without descendants stay in the cache, masked.
    """

    def __init__(self, model, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        """Encode each prompt once. input_ids, attention_mask: (prompts, length), padded on either side."""
        self.body, self.dtype = unwrap_adapter(model).base_model, next(model.parameters()).dtype
        self.window = attention_window(unwrap_adapter(model).config)
        self.prompt_mask = attention_mask
        batch, length = input_ids.shape
        output = self.body(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask), use_cache=True
        )
        self.cache, self.columns = output.past_key_values, length
        last = (attention_mask * torch.arange(length, device=input_ids.device)).argmax(dim=1)
        self.prompt_hidden = output.last_hidden_state[torch.arange(batch, device=input_ids.device), last].unsqueeze(1)
        self.rewind()

    def rewind(self) -> None:
        """Drop all tokens grown from the prompts, so that another tree can grow from the same encoding."""
        batch, length = self.prompt_mask.shape
        if self.columns > length:
            self.cache.crop(length - self.columns)  # negative: the number of columns to remove
        self.columns, self.hidden = length, self.prompt_hidden
        self.next_position = self.prompt_mask.sum(dim=1, keepdim=True)  # (prompts, 1)
        self.ancestors = self.prompt_mask.new_empty(
            batch, 1, 0, dtype=torch.long
        )  # cache columns of each newest token's ancestors

    def grow(self, token: torch.Tensor, parent: torch.Tensor) -> None:
        """Append tokens; each follows the token at place `parent` of the level before. Both (prompts, tokens)."""
        batch, tokens = token.shape
        column = torch.arange(self.columns, self.columns + tokens, device=token.device).expand(batch, tokens)
        inherited = self.ancestors.gather(1, parent.unsqueeze(-1).expand(-1, -1, self.ancestors.shape[2]))
        self.ancestors = torch.cat([inherited, column.unsqueeze(-1)], dim=2)
        self.columns += tokens
        if self.window and self.columns > self.window:
            raise UserError(
                f"a row of {self.columns} tokens (prompt and beams) is longer than the model's attention window of "
                f"{self.window}; use fewer beams, shorter prompts or a decoder with full attention"
            )
        output = self.body(
            input_ids=token,
            attention_mask=beam_mask(self.prompt_mask, self.ancestors, self.columns, self.dtype),
            position_ids=self.next_position.expand(batch, tokens),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.next_position = self.next_position + 1
        self.hidden = output.last_hidden_state


def gathered(model):
    """Under ZeRO-3, a context in which every process holds all weights of `model`; elsewhere a null context."""
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_status")]
    if not sharded:
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*sharded)


_able: WeakSet = WeakSet()  # models that passed the test


@torch.no_grad()
def require_tree_attention(model) -> None:
    """Raise `UserError` unless `model` decodes a tree of tokens as it decodes plain rows; tested once per model.

    The test is two padded prompts with two branches of two tokens each: logits from hidden states and `LMHead` must equal
    the model's logits of each row in its own forward. Flash attention and recurrence fail it; `PromptTree` checks windows.
    """
    if model in _able:
        return
    causal_lm = unwrap_adapter(model)
    name, config = type(causal_lm).__name__, causal_lm.config.get_text_config()
    if "flash" in (config._attn_implementation or ""):
        raise UserError(
            f"{name} runs {config._attn_implementation}, which takes no 4D mask; load it with sdpa or eager"
        )
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, 9), generator=generator).to(device)  # a prompt of 5, two branches of 2

    def plain(
        row: torch.Tensor,
    ) -> torch.Tensor:  # the class's forward: accelerate may have put autocast over the model's
        return type(causal_lm).forward(causal_lm, input_ids=row[None]).logits[:, -1]

    try:
        mask = torch.ones(2, 5, dtype=torch.long, device=device)
        mask[0, :2] = 0
        parent = torch.tensor([[1, 0]] * 2, device=device)  # swapped, so that wrong ancestry changes the logits
        with gathered(model), torch.autocast(device.type, enabled=False):
            tree = PromptTree(model, ids[:, :5], mask)
            tree.grow(ids[:, 5:7], torch.zeros_like(parent))
            tree.grow(ids[:, 7:9], parent)
            found = LMHead.of(model).logits(tree.hidden)
            rows = [[torch.cat([ids[r, :5][mask[r] > 0], ids[r, [6 - b, 7 + b]]]) for b in range(2)] for r in range(2)]
            expected = torch.stack([torch.cat([plain(row) for row in pair]) for pair in rows]).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} cannot decode a tree of tokens: {reason}; use a decoder with full attention"
        ) from error
    finally:
        model.train(was_training)
    if not expected.isfinite().all():
        return  # beam search reports weights that are not finite
    tolerance = 1e-3 if tree.dtype == torch.float32 else 0.1
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    if error > tolerance:
        raise UserError(
            f"{name} gives other logits for a tree of tokens than for plain rows (relative error {error:.2g}, expected at "
            f"most {tolerance:g}): it is recurrent or transforms its logits; use another architecture"
        )
    _able.add(model)
