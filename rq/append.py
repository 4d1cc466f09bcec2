"""SIDs for items added to a catalog: codebooks and old SIDs are kept, new items get free SIDs.

A new item uses only tokens that the tokenizer of the old catalog has (`catalog.sids.codebook_tokens`: at each level of
the old index, all codes up to the smallest power of two above the largest used code). So a checkpoint trained before
can recommend it without new tokens. Where the nearest SID of a new item is taken:

    none          the item shares that SID, unless old items extend it by an extra token
    nearest_free  the item takes the nearest free code of the last level
    extra_token   the item takes the next extra token where old items already have one; otherwise as nearest_free,
                  because an extra token after the complete SID of another item would make that SID a prefix

`sinkhorn` would move old items and is refused.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minionerec.catalog.sids import SID_TOKEN, codebook_tokens
from minionerec.common.errors import UserError
from rq.index_file import to_sids
from rq.models.rq import ResidualModel
from rq.models.vq import squared_distances

LEAST_AGREEMENT = 0.2  # share of old items whose first code must be the quantizer's choice


def known_codes(old: np.ndarray, sizes: Sequence[int], used_only: bool) -> list[np.ndarray]:
    """For each level of `old` (items, depth), which codes have a token: (K,) bool for codebooks of `sizes`.

    For an extra level, beyond `sizes`, K is the number of its tokens.
    """
    tokens = codebook_tokens(["".join(sid) for sid in to_sids(old)], used_only)
    codes = [SID_TOKEN.fullmatch(token).groups() for token in tokens]
    letters = dict.fromkeys(letter for letter, _ in codes)
    known = []
    for level, letter in enumerate(letters):
        own = [int(code) for name, code in codes if name == letter]
        mask = np.zeros(sizes[level] if level < len(sizes) else max(own) + 1, dtype=bool)
        mask[[code for code in own if code < len(mask)]] = True
        known.append(mask)
    return known


def append_codes(
    model: ResidualModel, embeddings: Tensor, old: np.ndarray, collision: str, *, used_only: bool = False
) -> np.ndarray:
    """Codes (items, depth of old) of all `embeddings` (items, in_dim), of which the first rows have the codes `old`.

    Raises `UserError` where `old` is not an index of this quantizer, or no code is free.
    """
    sizes, n_old = model.quantizer.sizes, len(old)
    levels = len(sizes)
    _check(model, embeddings, old, sizes, collision)
    known = known_codes(old, sizes, used_only)
    allowed = [torch.from_numpy(mask).to(embeddings.device) for mask in known[:levels]]
    encoded = model.encode(embeddings[n_old:], allowed=allowed)
    codes = np.full((len(embeddings), old.shape[1]), -1, dtype=np.int64)
    codes[:n_old], codes[n_old:, :levels] = old, encoded.codes.cpu().numpy()
    if collision == "none" and old.shape[1] == levels:
        return codes

    taken: dict[tuple, set] = {}  # prefix -> used codes of the last level
    extra: dict[tuple, int] = {}  # SID that items extend by an extra token -> the next free extra token
    for row in old.tolist():
        taken.setdefault(tuple(row[: levels - 1]), set()).add(row[levels - 1])
        if len(row) > levels and row[levels] >= 0:
            extra[tuple(row[:levels])] = max(extra.get(tuple(row[:levels]), 0), row[levels] + 1)
    distances = squared_distances(encoded.last_residual, model.quantizer.levels[-1].codebook.detach())
    distances = distances.masked_fill(~allowed[-1], torch.inf).cpu().numpy()
    for item in range(n_old, len(embeddings)):
        sid = tuple(codes[item, :levels].tolist())
        used = taken.setdefault(sid[:-1], set())
        if sid[-1] in used and not (collision == "none" and sid not in extra):
            if collision == "extra_token" and extra.get(sid, len(known[-1])) < len(known[-1]) and known[-1][extra[sid]]:
                codes[item, levels] = extra[sid]
                extra[sid] += 1
                continue
            free = distances[item - n_old].copy()
            free[list(used)] = np.inf
            if not np.isfinite(free).any():
                name = "".join(to_sids(codes[item : item + 1, : levels - 1])[0]) or "of length 0"
                raise UserError(
                    f"item {item}: every known code after its prefix {name} is taken; build the whole index again"
                )
            codes[item, levels - 1] = free.argmin()
        used.add(int(codes[item, levels - 1]))
    return codes


def _check(model: ResidualModel, embeddings: Tensor, old: np.ndarray, sizes: list[int], collision: str) -> None:
    levels, n_old = len(sizes), len(old)
    if collision == "sinkhorn":
        raise UserError("--append keeps old SIDs, --collision sinkhorn moves them; give nearest_free or extra_token")
    if n_old >= len(embeddings):
        raise UserError(
            f"--append: the index has {n_old} items and the embeddings {len(embeddings)} rows; expected the rows of the "
            f"old items first, then new rows"
        )
    fits = old.shape[1] in (levels, levels + 1) and (old[:, :levels] >= 0).all() and (old[:, :levels] < sizes).all()
    if fits:
        again = model.encode(embeddings[:n_old]).codes[:, 0].cpu().numpy()
        fits = (again == old[:, 0]).mean() >= LEAST_AGREEMENT
    if not fits:
        raise UserError(
            f"--append: the index was not made by this quantizer ({levels} levels of {sizes} codes) from these embeddings; "
            f"give the checkpoint or codebooks that it was made with"
        )
