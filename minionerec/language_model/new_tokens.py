"""TODO."""

import torch

from minionerec.catalog.items import Items


def _embedding_matrices(model) -> list[torch.nn.Parameter]:
    """The input embedding and, where it is untied, the output embedding: each (vocabulary, hidden)."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(module.weight): module.weight for module in modules}.values())


@torch.no_grad()
def add_tokens(model, tokenizer, tokens: list[str], items: Items | None = None) -> list[int]:
    """Add `tokens` to the tokenizer and rows for them to the embeddings; returns the ids of the new ones.

    New rows are drawn from the normal distribution with the mean and the covariance of the old rows, of the input
    and, where it is untied, the output embedding. With `items`, the row of a token that their SIDs use is instead the
    mean, over the items that carry it, of their titles' mean embedding. A matrix padded beyond the tokenizer's length
    never shrinks.
    """
    n_old = len(tokenizer)
    titles = tokenizer([item or " " for item in items.titles], add_special_tokens=False)["input_ids"] if items else []
    tokenizer.add_tokens(tokens)
    new_ids = list(range(n_old, len(tokenizer)))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for weight in _embedding_matrices(model):
        old = weight[:n_old].float()
        mean = old.mean(dim=0)
        # (new, old) standard normals times the centred rows: samples with the rows' covariance, never formed
        drawn = torch.randn(len(new_ids), n_old, device=old.device) @ (old - mean) / n_old**0.5
        weight[new_ids] = (mean + drawn).to(weight.dtype)
        if items:
            used, rows = _means_by_token(old, titles, tokenizer(items.sids, add_special_tokens=False)["input_ids"])
            new = used >= n_old
            weight[used[new]] = rows[new].to(weight.dtype)
    return new_ids


def _means_by_token(old: torch.Tensor, titles: list[list[int]], sids: list[list[int]]):
    """(token ids in use, for each the mean of its items' title means): (used,) and (used, hidden)."""
    offsets = torch.tensor([0, *map(len, titles[:-1])]).cumsum(0)
    flat = torch.tensor([token for title in titles for token in title])
    title_mean = torch.nn.functional.embedding_bag(flat, old, offsets, mode="mean")  # (items, hidden)
    carrier = torch.tensor([item for item, sid in enumerate(sids) for _ in sid])
    used, place = torch.tensor([token for sid in sids for token in sid]).unique(return_inverse=True)
    sums = torch.zeros(len(used), old.shape[1]).index_add_(0, place, title_mean[carrier])
    return used, sums / place.bincount().unsqueeze(1)


def _embedding_names(model) -> list[str]:
    """The names, as PEFT takes them, of the modules that `_embedding_matrices` are the weights of."""
    names = {id(module): name for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [inputs] if inputs.weight is outputs.weight else [inputs, outputs]
    return [names[id(module)].rsplit(".", 1)[-1] for module in modules]
