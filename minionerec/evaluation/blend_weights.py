"""The weights of a blend, chosen on validation rows: one for each baseline, or one for each baseline and group of users.

    auto   `choose_weights`: the weights with the best metric
    user   `choose_user_weights`: users are grouped by how sure a baseline is of them, and each group has its weights

The confidence of a baseline about a user is the largest probability of its softmax over the whole catalog, as in
MemGen-GR (arXiv 2603.19809). Departure: that paper's weight is a sigmoid of the confidence; here it is a step function
over `BINS` quantile bins, which does not have to rise or fall.

Bins of few rows follow all rows: the weights of a bin are those with the largest

    (sum of the metric over the bin's rows + s * mean of the metric over all rows) / (rows of the bin + s)

and of equal ones the weights of all users. The shrinkage s (rows) and the baseline whose confidence counts are chosen by
cross-validation. If the best of them does not exceed the weights of all users by more than one standard error of the
paired difference, every user gets those.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.options import MOST_WEIGHT
from minionerec.evaluation.blend import Candidates, ranks
from minionerec.evaluation.metrics import values_of

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)  # tried for each baseline
BINS = 5  # bins of users with about equal numbers of rows
SHRINKAGES = (100, 300, 1000, 3000)  # rows
FOLDS = 5
METRIC = "NDCG@10"

Weights = tuple[float, ...]  # one for each baseline


class UserWeights(NamedTuple):
    """Weights by the confidence of one baseline: bin i holds the users with cuts[i - 1] < confidence <= cuts[i]."""

    weights: tuple[Weights, ...]  # of each bin, one more than there are cuts; one if all users have the same
    cuts: tuple[float, ...] = ()  # probabilities, increasing
    baseline: int = 0  # whose confidence counts: its place among the baselines

    def of(self, candidates: Candidates) -> np.ndarray:
        """(users, baselines) weights."""
        return np.array(self.weights)[np.searchsorted(self.cuts, candidates.confidence[:, self.baseline])]


class Choice(NamedTuple):
    """Weights by user, the weights that all users would have, and how the former were chosen."""

    user_weights: UserWeights
    weights: Weights
    selection: dict  # {"shrinkage": rows or None, "gain": [mean, standard error], "rows": valid rows of each bin}


def _values(candidates: Candidates, targets: np.ndarray, metric: str) -> tuple[list[Weights], np.ndarray]:
    """(every combination of `WEIGHTS`, the metric of each valid row under it: (combinations, rows))."""
    options = list(itertools.product(WEIGHTS, repeat=candidates.scores.shape[-1] - 1))
    cutoff = int(metric.partition("@")[2])
    return options, np.stack([values_of(ranks(candidates, each, targets), [cutoff])[metric] for each in options])


def choose_weights(candidates: Candidates, targets: np.ndarray, metric: str = METRIC) -> Weights:
    """The weights with the best `metric` on validation rows; of equal ones the smallest."""
    options, values = _values(candidates, targets, metric)
    return options[int(values.mean(axis=1).argmax())]


def choose_user_weights(candidates: Candidates, targets: np.ndarray, seed: int, metric: str = METRIC) -> Choice:
    """Weights by user, with the best `metric` on validation rows (see the module's docstring). seed: of the folds."""
    options, values = _values(candidates, targets, metric)
    rows = values.shape[1]  # of valid
    fold = np.random.default_rng(seed).permutation(rows) % FOLDS
    best = options[int(values.mean(axis=1).argmax())]
    tried = {}
    for baseline, shrinkage in itertools.product(range(candidates.confidence.shape[1]), SHRINKAGES):
        gains = _held_out_gains(values, candidates.confidence[:, baseline], shrinkage, fold)
        tried[baseline, shrinkage] = gains.mean(), gains.std() / math.sqrt(rows)
    (baseline, shrinkage), gain = max(tried.items(), key=lambda item: item[1][0])
    confidence, cuts, chosen = candidates.confidence[:, baseline], np.empty(0), [best]
    if gain[0] > gain[1]:
        cuts = _cuts(confidence)
        places = _best_of_bins(values, np.searchsorted(cuts, confidence), len(cuts) + 1, shrinkage)
        chosen = [options[place] for place in places]
    if set(chosen) == {best}:
        cuts, chosen = np.empty(0), [best]
    selection = {
        "shrinkage": shrinkage if len(cuts) else None,
        "gain": [float(x) for x in gain],
        "rows": np.bincount(np.searchsorted(cuts, confidence), minlength=len(chosen)).tolist(),
    }
    return Choice(UserWeights(tuple(chosen), tuple(cuts.tolist()), baseline), best, selection)


def _cuts(confidence: np.ndarray) -> np.ndarray:
    """Cut points of `BINS` quantile bins, each once; none that would leave a bin without rows."""
    cuts = np.unique(np.quantile(confidence, np.arange(1, BINS) / BINS, method="lower"))  # values that occur
    return cuts[cuts < confidence.max()]


def _best_of_bins(values: np.ndarray, bins: np.ndarray, n_bins: int, shrinkage: float) -> list[int]:
    """The place of the best combination for each bin. values: (combinations, rows); bins: (rows,)."""
    overall = values.mean(axis=1)  # (combinations,)
    best, chosen = int(overall.argmax()), []
    for number in range(n_bins):
        own = values[:, bins == number]
        shrunk = (own.sum(axis=1) + shrinkage * overall) / (own.shape[1] + shrinkage)
        better = shrunk.max() > shrunk[best] + 1e-12  # sums of equal values may differ by rounding
        chosen.append(int(shrunk.argmax()) if better else best)
    return chosen


def _held_out_gains(values: np.ndarray, confidence: np.ndarray, shrinkage: float, fold: np.ndarray) -> np.ndarray:
    """(rows,) the metric with the bins' weights minus that with the weights of all, both chosen on the other folds."""
    gains = np.zeros(values.shape[1])
    for number in np.unique(fold) if len(fold) > 1 else ():
        out = fold == number
        known = values[:, ~out]
        cuts = _cuts(confidence[~out])
        chosen = _best_of_bins(known, np.searchsorted(cuts, confidence[~out]), len(cuts) + 1, shrinkage)
        rows = np.flatnonzero(out)
        own = np.array(chosen)[np.searchsorted(cuts, confidence[out])]
        gains[rows] = values[own, rows] - values[int(known.mean(axis=1).argmax()), rows]
    return gains


# ------------------------------------------------------------------------------------------------ on disk


def record(choice: Choice, paths: Sequence[str]) -> dict:
    """What metrics.json holds of a `Choice`. paths: the baselines' folders."""
    user = choice.user_weights
    by_user = {
        "confidence_of": paths[user.baseline],
        "cuts": list(user.cuts),
        "weights": [list(w) for w in user.weights],
    }
    return {"weights": list(choice.weights), "user_weights": by_user | choice.selection}


def read_weights(path: str, flag: str, baselines: Sequence[str]) -> UserWeights:
    """The weights in a .blend.metrics.json of evaluate.py for these folders; raises `UserError` for other content."""
    content = read_json(path, flag)
    names = [str(folder).rstrip("/").rpartition("/")[2] for folder in baselines]
    known = content.get("blend_path")
    known = known if isinstance(known, list) else []
    if [str(folder).rstrip("/").rpartition("/")[2] for folder in known] != names:
        raise UserError(
            f"{path}: has weights for {', '.join(map(str, known)) or 'no baseline'}, found --blend_path "
            f"{' '.join(map(str, baselines))}; give the same folders in the same order, or numbers as --{flag}"
        )
    if "user_weights" not in content:
        return UserWeights((_numbers(content.get("weights"), len(names), path, "weights"),))
    user = content["user_weights"] if isinstance(content["user_weights"], Mapping) else {}
    cuts = _numbers(user.get("cuts"), None, path, "user_weights.cuts")
    rows = user.get("weights")
    weights = tuple(
        _numbers(row, len(names), path, "user_weights.weights") for row in (rows if isinstance(rows, list) else [])
    )
    if len(weights) != len(cuts) + 1 or list(cuts) != sorted(set(cuts)) or user.get("confidence_of") not in known:
        raise UserError(
            f"{path}: user_weights has {len(cuts)} cuts, {len(weights)} lists of weights and confidence_of "
            f"{user.get('confidence_of')!r}; expected increasing cuts, one more list, and a folder of blend_path; "
            "evaluate again"
        )
    return UserWeights(weights, cuts, known.index(user["confidence_of"]))


def _numbers(values, count: int | None, path: str, key: str) -> tuple[float, ...]:
    """`values` as floats; raises `UserError` unless they are a list of numbers up to `MOST_WEIGHT`, `count` of them if given."""
    kinds = (int, float)
    good = isinstance(values, list) and all(type(x) in kinds and 0 <= x <= MOST_WEIGHT for x in values)
    if not good or count not in (None, len(values)):
        expected = f"{'' if count is None else f'{count} '}finite numbers from 0 to {MOST_WEIGHT}"
        raise UserError(f"{path}: {key} is {str(values)[:60]}, expected a list of {expected}; evaluate again")
    return tuple(map(float, values))
