"""Join text embeddings with the item embeddings of a trained baseline, for SIDs that know behaviour.

    python -m rq.fuse_embeddings --data_path <D>.emb-minilm-td.npy --baseline_path output/sasrec \
        --train_file train.csv --info_file info.txt --output_file <D>.emb-fused-td.npy

    fused_i = [w_b · n(b_i), w_t · n(t_i)]      n: minus the mean over items, then scaled to length 1

t_i is the row of `--data_path`, b_i the baseline's embedding of item i. A baseline knows nothing of an item that train
never shows: such an item gets b_i = W t_i, with W fitted on the other items by ridge regression. `--whiten True` scales
the principal components of each part to variance 1 first; `--pca_dim` keeps that many components of each part. Any
quantizer takes the result.

Where train shows most items only a few times, their embeddings are mostly noise, and SIDs from the text alone are better
(RESULTS.md). `--min_interactions` leaves the baseline's part out if the median item has fewer interactions.
"""

import dataclasses
from dataclasses import dataclass

from minionerec.common import runs
from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.options import INPUT, MOST_WEIGHT, OUTPUT, StageOptions, option, run


@dataclass
class Options(StageOptions):
    data_path: str = option("", "text embeddings, <D>.emb-<plm>-td.npy", role=INPUT)
    baseline_path: str = option("", "folder of sasrec.sh (MODEL sasrec, gru4rec or caser)", role=INPUT)
    train_file: str = option("", "train CSV: tells which items the baseline has seen", role=INPUT)
    info_file: str = option("", "the catalog: sid, title, item id per line", role=INPUT)
    output_file: str = option("", "where the fused embeddings go, a .npy", role=OUTPUT)
    text_weight: float = option(0.5, "weight of the text part")
    behaviour_weight: float = option(1.0, "weight of the baseline's part")
    min_interactions: float = option(
        0.0, "the text alone, if the median item has fewer interactions in train than this"
    )
    whiten: bool = option(False, "scale the principal components of each part to variance 1")
    pca_dim: int = option(0, "principal components that are kept of each part; 0: all")
    ridge: float = option(1.0, "ridge penalty, in units of the mean squared length of a text row")

    def __post_init__(self):
        super().__post_init__()
        self.at_least(0, "text_weight", "behaviour_weight", "min_interactions", "pca_dim")
        weights = {name: getattr(self, name) for name in ("text_weight", "behaviour_weight")}
        self.check(**{name: (weight <= MOST_WEIGHT, f"at most {MOST_WEIGHT}") for name, weight in weights.items()})
        self.check(ridge=(self.ridge > 0, "more than 0"))
        if self.text_weight + self.behaviour_weight == 0:
            raise UserError("--text_weight 0 --behaviour_weight 0: nothing is left; expected one above 0")


def unit_rows(x):
    """Rows minus their mean, scaled to length 1; a row equal to the mean stays zero. (items, dim) -> the same."""
    import numpy as np

    centred = x - x.mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(lengths > 0, lengths, 1.0)


def predict_unseen(behaviour, text, seen, ridge: float):
    """`behaviour` (items, b) with the rows of items that are not `seen` (items,) replaced by a ridge regression on text.

    text: (items, t), centred rows. With W = (T'T + ridge · n · I / t)^-1 T'B over the seen items.
    """
    import numpy as np

    if seen.all() or not seen.any():
        return behaviour
    inputs, mean = text[seen], behaviour[seen].mean(axis=0)
    penalty = ridge * len(inputs) / text.shape[1] * np.eye(text.shape[1])
    weights = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ (behaviour[seen] - mean))
    return np.where(seen[:, None], behaviour, text @ weights + mean)


def components(x, dim: int, whiten: bool):
    """Principal components of centred rows x (items, d): the first `dim` (0: all), with variance 1 if `whiten`."""
    import numpy as np

    if not dim and not whiten:
        return x
    _, scale, axes = np.linalg.svd(x, full_matrices=False)
    kept = slice(0, dim or None)
    projected = x @ axes[kept].T
    return projected / np.maximum(scale[kept] / np.sqrt(len(x)), 1e-8) if whiten else projected


def fuse(text, behaviour, seen, options: Options):
    """float32 (items, dims): the parts as in the module docstring."""
    import numpy as np

    text_part = unit_rows(text.astype(np.float64))
    behaviour_part = predict_unseen(behaviour.astype(np.float64), text_part, seen, options.ridge)
    parts = []
    for part, weight in ((behaviour_part, options.behaviour_weight), (text, options.text_weight)):
        if weight:
            centred = part - part.mean(axis=0)
            parts.append(weight * unit_rows(components(centred, options.pca_dim, options.whiten)))
    return np.concatenate(parts, axis=1).astype(np.float32)


def main(options: Options) -> None:
    options.require("data_path", "baseline_path", "train_file", "info_file", "output_file")
    record = runs.begin(options, "fuse_embeddings", files=[options.output_file])
    if record.complete:
        return
    import numpy as np

    from data import load
    from minionerec.baselines.models import load_checkpoint
    from minionerec.catalog.windows import chain
    from minionerec.common.embeddings import load_embeddings
    from minionerec.common.files import atomic_file

    text = load_embeddings(options.data_path)
    model = load_checkpoint(options.baseline_path, "baseline_path", len(text))
    if not hasattr(model, "table"):
        raise UserError(
            f"{options.baseline_path}: {model.name} has no item embeddings; give the folder of a sasrec, gru4rec or caser "
            "model (--baseline_path)"
        )
    data = load(info_file=options.info_file, train=options.train_file)
    if len(data.items.sids) != len(text):
        raise UserError(
            f"{options.data_path}: {len(text)} rows, expected the {len(data.items.sids)} items of {options.info_file}"
        )
    counts = np.bincount(chain(data.train.with_columns(history="seen")).items, minlength=len(text))
    seen, chosen = counts > 0, options
    if np.median(counts) < options.min_interactions:
        chosen = dataclasses.replace(options, behaviour_weight=0.0)
        say(
            f"the median item has {np.median(counts):g} interactions in train, fewer than --min_interactions "
            f"{options.min_interactions:g}: the text alone"
        )
    try:
        fused = fuse(text, model.table()[: len(text)].detach().numpy(), seen, chosen)
    except np.linalg.LinAlgError:  # a ridge penalty that vanishes beside the rows
        fused = np.array([np.inf])
    if not np.isfinite(fused).all():
        raise UserError(f"--ridge {options.ridge}: the fused embeddings are not finite; choose a value like 1")
    with atomic_file(options.output_file, "wb") as f:
        np.save(f, fused, allow_pickle=False)
    say(
        f"wrote {options.output_file}: {fused.shape[0]} items x {fused.shape[1]}, {(~seen).sum()} of them unseen in train"
    )
    record.finish()


if __name__ == "__main__":
    run(main, Options)
