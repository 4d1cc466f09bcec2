"""SID tokens for a language model: added to the tokenizer, with rows in the embeddings, and checked.

- Tokens are added with `normalized=False`, so that no normalizer (such as one that prepends a space) changes them.
- Ids come from the tokenizer. Where its vocabulary has a hole, the tokenizer may give a new token an id that is taken;
  that is refused. The embeddings are sized by the largest id and never shrink.
- New rows start from the distribution of the old ones, or from the titles of the items that carry the token. The new
  entries of an LM head's bias start from the mean of the old ones.
"""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import AddedToken

from minionerec.catalog.items import Items
from minionerec.catalog.sids import SID_TOKEN, canonical_sid, level_codes, level_token
from minionerec.common.errors import UserError

CHECKED = 20_000  # SIDs that `require_sid_tokens` tokenises
BLOCK = 8192  # rows of an embedding that are centred at once


def embedding_matrices(model) -> list[torch.nn.Parameter]:
    """The input embedding and, where it is untied, the output embedding: each (vocabulary, hidden)."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(module.weight): module.weight for module in modules}.values())


def embedding_names(model) -> list[str]:
    """The full names of the modules that `embedding_matrices` are the weights of."""
    names = {id(module): name for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [inputs] if inputs.weight is outputs.weight else [inputs, outputs]
    return [names[id(module)] for module in modules]


@torch.no_grad()
def add_tokens(model, tokenizer, tokens: Sequence[str], items: Items | None = None) -> list[int]:
    """Add `tokens` to the tokenizer and rows for them to the embeddings; returns the ids of the new ones.

    New rows are drawn from the normal distribution with the mean and the covariance of the old rows, of the input
    and, where it is untied, the output embedding. With `items`, the row of a token that their SIDs use is instead the
    mean, over the items that carry it, of their titles' mean embedding.
    """
    titles = tokenizer([item or " " for item in items.titles], add_special_tokens=False)["input_ids"] if items else []
    old_ids, new_ids = _extend(tokenizer, tokens)
    size = max([*old_ids, *new_ids]) + 1
    if size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)
    for weight in embedding_matrices(model):
        weight[new_ids] = draw_like(weight, old_ids, len(new_ids)).to(weight.dtype)
        if items:
            sids = tokenizer(items.sids, add_special_tokens=False)["input_ids"]
            used, rows = _means_by_token(weight.float(), titles, sids)
            new = torch.isin(used, torch.tensor(new_ids, dtype=used.dtype))
            weight[used[new]] = rows[new].to(weight.dtype)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        bias[new_ids] = bias[old_ids].float().mean().to(bias.dtype)
    return new_ids


@torch.no_grad()
def start_from_codebooks(model, tokenizer, new_ids: Sequence[int], codebooks: Sequence) -> None:
    """Start the row of `<a_k>` from the centroid `codebooks[0][k]`, that of `<b_k>` from `codebooks[1][k]`, and so on.

    A level's centroids, (K, dim), are projected to the hidden size by one random matrix for all levels, drawn with
    torch, and scaled to the standard deviation of the rows that they replace; distances between codes are kept up to
    the projection's error. Only rows of `new_ids` change. Levels without a codebook (an extra token) keep their rows.
    Raises `UserError` for a code that its codebook does not have.
    """
    new, dim = set(new_ids), codebooks[0].shape[1]
    for weight in embedding_matrices(model):
        projection = torch.randn(dim, weight.shape[1], device=weight.device)
        for level, book in enumerate(codebooks):
            own = [(id, code) for id, code in _codes_of_level(tokenizer, level) if id in new]
            for id, code in own:
                if code >= len(book):
                    raise UserError(
                        f"--sid_codebooks: codebook_{level} has {len(book)} codes, and the index has "
                        f"{tokenizer.convert_ids_to_tokens(id)}; expected the codebooks that the index was made with"
                    )
            if not own:
                continue
            ids, codes = zip(*own, strict=True)
            centroids = torch.from_numpy(book[list(codes)]).to(weight.device)
            rows = (centroids - centroids.mean(dim=0)) @ projection
            old = weight[list(ids)].float()
            weight[list(ids)] = (old.mean(dim=0) + rows * (old.std() / rows.std().clamp(min=1e-12))).to(weight.dtype)


def _codes_of_level(tokenizer, level: int) -> list[tuple[int, int]]:
    """(token id, code) of every token of a level, in order of ids."""
    before = level_token(level, 0).removesuffix("0>")  # <a_
    own = [(id, token) for token, id in tokenizer.get_vocab().items() if token.startswith(before)]
    return [(id, int(token[len(before) : -1])) for id, token in sorted(own) if SID_TOKEN.fullmatch(token)]


def draw_like(weight: torch.Tensor, ids: Sequence[int], count: int) -> torch.Tensor:
    """`count` samples of the normal distribution with mean and covariance of the rows `ids`. (count, hidden), float32.

    Through a factor of the (hidden, hidden) covariance, so memory does not depend on `len(ids)` x `count`.
    """
    hidden = weight.shape[1]
    blocks = [torch.tensor(ids[start : start + BLOCK], device=weight.device) for start in range(0, len(ids), BLOCK)]
    mean = sum(weight[block].double().sum(dim=0) for block in blocks) / len(ids)
    covariance = torch.zeros(hidden, hidden, dtype=torch.float64, device=weight.device)
    for block in blocks:
        centred = weight[block].float() - mean.float()
        covariance += centred.T @ centred
    covariance /= len(ids)
    jitter = 1e-7 * covariance.diagonal().mean() + 1e-30  # for fewer rows than dimensions, and for rounding
    identity, info = torch.eye(hidden, dtype=torch.float64, device=weight.device), 1
    while info:
        factor, info = torch.linalg.cholesky_ex(covariance + jitter * identity)
        jitter *= 10
    return mean.float() + torch.randn(count, hidden, device=weight.device) @ factor.float().T


def _extend(tokenizer, tokens: Sequence[str]) -> tuple[list[int], list[int]]:
    """Add `tokens` to a tokenizer. Returns the ids of its old tokens, sorted, and those of the new ones, in order.

    Raises `UserError` where a new token got the id of an old one.
    """
    before = tokenizer.get_vocab()
    owner = {id: token for token, id in before.items()}
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    new = [token for token in tokens if token not in before]
    ids = tokenizer.convert_tokens_to_ids(new)
    for token, id in zip(new, ids, strict=True):
        if id in owner:
            raise UserError(
                f"the tokenizer gives {token} the id {id}, which {owner[id]!r} has: its vocabulary of {len(before)} tokens "
                f"has a hole below its largest id {max(owner)}; fill the hole in tokenizer.json or use another base model"
            )
        owner[id] = token
    return sorted(before.values()), ids


def _means_by_token(rows: torch.Tensor, titles: list[list[int]], sids: list[list[int]]):
    """(token ids in use, for each the mean of its items' title means): (used,) and (used, hidden)."""
    offsets = torch.tensor([0, *map(len, titles[:-1])]).cumsum(0)
    flat = torch.tensor([token for title in titles for token in title])
    title_mean = torch.nn.functional.embedding_bag(flat, rows, offsets, mode="mean")  # (items, hidden)
    carrier = torch.tensor([item for item, sid in enumerate(sids) for _ in sid])
    used, place = torch.tensor([token for sid in sids for token in sid]).unique(return_inverse=True)
    sums = torch.zeros(len(used), rows.shape[1]).index_add_(0, place, title_mean[carrier])
    return used, sums / place.bincount().unsqueeze(1)


def require_sid_tokens(tokenizer, sids: Sequence[str]) -> None:
    """Raise `UserError` unless each SID is its level tokens, as a whole text and inside a prompt, and decodes to itself.

    sids: distinct SIDs, as `Catalog.sids`. Of more than `CHECKED` SIDs, that many are tried, and one for each level token.
    """
    if len(sids) > CHECKED:
        _, codes = level_codes(sids)  # (sids, levels)
        _, first = np.unique(codes, return_index=True)
        rows = sorted({*(first // codes.shape[1]).tolist(), *range(0, len(sids), len(sids) // CHECKED)})
        sids = [sids[row] for row in rows]
    levels = [[match.group() for match in SID_TOKEN.finditer(sid)] for sid in sids]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in {token for sid in levels for token in sid}}
    backend, known = tokenizer.backend_tokenizer, set(ids.values())
    for form in ("{}", "Items:\n{} \nAnswer:\n"):
        encoded = backend.encode_batch_fast([form.format(sid) for sid in sids], add_special_tokens=False)
        for sid, tokens, found in zip(sids, levels, encoded, strict=True):
            if [id for id in found.ids if id in known] != [ids[token] for token in tokens]:
                raise UserError(
                    f"the tokenizer splits {sid} in {form.format(sid)!r} into {backend.encode(form.format(sid)).tokens}, "
                    f"expected the tokens {tokens}; add them with normalized=False or use another base model"
                )
    texts = backend.decode_batch([[ids[token] for token in tokens] for tokens in levels], skip_special_tokens=True)
    for sid, text in zip(sids, texts, strict=True):
        if canonical_sid(text) != sid:
            raise UserError(
                f"the tokenizer decodes the tokens of {sid} to {text!r}: they were added as special tokens or its decoder "
                "drops them; add them as ordinary tokens (special=False)"
            )
