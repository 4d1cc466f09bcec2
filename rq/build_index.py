"""TODO."""

from pathlib import Path

import torch
from torch import Tensor

from rq.collisions import resolve
from rq.index_file import write_index
from rq.models.rq import ResidualModel
from rq.picture import write_report
from rq.quality import fitted_error, quality, variance


def build_index(
    model: ResidualModel,
    embeddings: Tensor,
    output: str | Path,
    collision: str,
    *,
    codes: Tensor | None = None,
    batch_size: int = 20480,
) -> dict:
    """Write the index of `embeddings` (items, dim) to `output`, its report beside it; returns the report.

    `codes` (items, levels) stand for the nearest ones of `model`, which is on the device of `embeddings`.
    """
    if codes is None:
        encoded = model.encode(embeddings, batch_size)
        codes, last_residual = encoded.codes, encoded.last_residual
    else:
        codes = codes.to(embeddings.device)
        last_residual = model.last_residual(embeddings, codes)
    codebook = model.quantizer.levels[-1].codebook.detach().cpu().numpy()
    given = codes.cpu().numpy()
    resolved = resolve(given, collision, last_residual.cpu().numpy(), codebook)

    report = {"collision": collision}
    for when, some in (("before", given), ("after", resolved)):
        own = torch.from_numpy(some[:, : len(model.quantizer.levels)]).to(embeddings.device)  # without extra tokens
        left = model.squared_error(embeddings, own, batch_size).cpu().numpy() / variance(embeddings)
        errors = {"reconstruction_error": [round(float(x), 6) for x in left]}
        report[when] = quality(some) | errors | {"fitted_error": fitted_error(embeddings, some)}
    write_report(Path(output).with_suffix(".quality.json"), report, {Path(output).name.split(".")[0]: report})
    write_index(output, resolved)
    after = report["after"]
    print(
        f"wrote {output}: {after['n_items']} items, {after['distinct_sids']} SIDs; collision rate "
        f"{report['before']['collision_rate']:.4f} before, {after['collision_rate']:.4f} after {collision}; "
        f"codes used {after['codes_used']}, perplexity {after['perplexity']}"
    )
    return report
