"""One shared prefix and its branches in one row: positions and masks.

A prompt is encoded once. Its beams, or the completions of its group, follow it in the same row, and a 4D mask lets
each see the prompt, its own ancestors and itself, nothing of its neighbours. Positions restart after the prompt in
every branch, so the result equals a forward of each `prompt + branch` alone.

Masks are additive (0 where visible, the dtype's minimum where not), shape (rows, 1, queries, keys): the form that
`transformers` hands unchanged to its eager and SDPA attention.
"""

import torch


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, queries, keys) booleans as an additive (rows, 1, queries, keys) mask."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids of padded rows: 0 at each row's first real token. (rows, length) -> (rows, length)."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def beam_mask(prompt_mask: torch.Tensor, ancestors: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of one decoding step over an unexpanded cache.

    prompt_mask: (rows, prompt), 1 at real tokens; ancestors: (rows, beams, depth) the cache columns of each beam's own
    tokens, itself included; keys: columns in the cache after this step. Returns (rows, 1, beams, keys).
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

    trunk_mask: (rows, trunk), 1 at real tokens. Returns (rows, 1, total, total) and (rows, total), where total is
    trunk + branches * length.
    """
    rows, trunk = trunk_mask.shape
    device = trunk_mask.device
    offset = torch.arange(length, device=device).repeat(branches)  # place of a token in its own branch
    branch = torch.arange(branches, device=device).repeat_interleave(length)
    # Which of the row's tokens see which: trunk by causality, branches by membership and causality.
    causal = torch.ones(trunk, trunk, dtype=torch.bool, device=device).tril()
    within = (branch[:, None] == branch[None, :]) & (offset[:, None] >= offset[None, :])
    structure = torch.zeros(trunk + len(offset), trunk + len(offset), dtype=torch.bool, device=device)
    structure[:trunk, :trunk] = causal
    structure[trunk:, :trunk] = True
    structure[trunk:, trunk:] = within
    real = torch.cat([trunk_mask.bool(), trunk_mask.new_ones(rows, len(offset)).bool()], dim=1)
    # A padded token sees itself alone: a row of the mask with nothing visible would turn into NaN.
    visible = (structure & real.unsqueeze(1)) | torch.eye(len(structure), dtype=torch.bool, device=device)
    trunk_length = trunk_mask.sum(dim=1, keepdim=True)
    return additive(visible, dtype), torch.cat([positions(trunk_mask), trunk_length + offset], dim=1)
