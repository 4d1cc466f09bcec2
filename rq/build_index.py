"""Building an index: codes of all items, SID collisions resolved, the index file, its quality report and picture."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minionerec.common.console import say
from minionerec.common.errors import UserError
from rq.collisions import resolve
from rq.files import dataset_name, report_path
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
    codes: np.ndarray | None = None,
    batch_size: int = 20480,
) -> dict:
    """Write the index of embeddings (items, dim) to `output`, and its report next to it; returns the report.

    `codes` (items, levels) replace the nearest codes of `model`, which is on the device of `embeddings`.
    Raises `UserError` where the model gives NaN or Inf.
    """
    if codes is None:
        encoded = model.encode(embeddings, batch_size)
        codes, residual = encoded.codes.cpu().numpy(), encoded.last_residual  # (items, levels), (items, dim)
    else:
        residual = model.last_residual(embeddings, torch.from_numpy(codes).to(embeddings.device))
    bad = (~torch.isfinite(residual).all(dim=1)).nonzero().squeeze(1)
    if len(bad):
        raise UserError(f"the quantizer gives NaN or Inf for {len(bad)} items, first item {bad[0]}; train it again")
    codebook = model.quantizer.levels[-1].codebook.detach().cpu().numpy()
    resolved = resolve(codes, collision, residual.cpu().numpy(), codebook)
    write_index(output, resolved)

    report = {"collision": collision}
    for when, some in (("before", codes), ("after", resolved)):
        own = torch.from_numpy(some[:, : len(model.quantizer.levels)]).to(embeddings.device)  # without extra tokens
        left = model.squared_error(embeddings, own, batch_size).cpu().numpy() / variance(embeddings)
        errors = {"reconstruction_error": [round(float(x), 6) for x in left]}
        report[when] = quality(some) | errors | {"fitted_error": fitted_error(embeddings, some)}
    write_report(report_path(output), report, {dataset_name(output): report})
    after = report["after"]
    say(
        f"wrote {output}: {after['n_items']} items, {after['distinct_sids']} SIDs; collision rate "
        f"{report['before']['collision_rate']:.4f} before, {after['collision_rate']:.4f} after {collision}; "
        f"codes used {after['codes_used']}, perplexity {after['perplexity']}; "
        f"{after['reconstruction_error'][-1]:.4f} of the variance left"
    )
    return report
