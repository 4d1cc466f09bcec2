"""Sections of the report about single test rows: slices, gains and losses, the histogram of ranks, sample users."""

from collections.abc import Sequence

import numpy as np

from minionerec.evaluation.metrics import MISSED
from minionerec.evaluation.protocols import LABELS, TOP
from minionerec.report import figures
from minionerec.report.blocks import Section, Table, Text, User, Users, number
from minionerec.report.outputs import Output

KINDS = {"popularity": "popularity of the target", "history": "items in the history"}
SHORT = {"popularity": "target", "history": "history"}
BASELINES = ("popularity", "markov", "sasrec", "gru4rec", "caser")
EDGES = {"1": 1, "2–3": 3, "4–5": 5, "6–10": 10, "11–20": 20, "21–50": 50}  # places, up to this one
SHOWN = 5  # items of each model for a sample user


def slices_section(outputs: Sequence[Output]) -> Section:
    """HR@10 by slice for every model, and what each model gains and loses against each baseline."""
    blocks = []
    for output in outputs:
        for kind, words in KINDS.items():
            blocks += _slices(output, kind, words, len(outputs) > 1)
        blocks += _gains(output, len(outputs) > 1)
    if not blocks:
        blocks = [Text("No model has metrics by slice.")]
    lead = (
        "Head, middle and tail each have a third of train's targets; new items are not in train. "
        "Slices are small: read them with their numbers of rows."
    )
    return Section("slices", "By popularity and history", lead, blocks)


def _slices(output: Output, kind: str, words: str, several: bool) -> list:
    tables = {model: output.of_protocol(model).get("slices", {}).get(kind) for model in output.metrics}
    tables = {model: own for model, own in tables.items() if own}
    if not tables:
        return []
    labels = list(dict.fromkeys(label for own in tables.values() for label in own))
    sizes = {label: next(own[label]["rows"] for own in tables.values() if label in own) for label in labels}
    metric = next(name for name in next(iter(next(iter(tables.values())).values())) if name.startswith("HR@"))
    series = {m: [own.get(label, {}).get(metric, 0.0) for label in labels] for m, own in tables.items()}
    title = f"{metric} by {words}" + (f": {output.label}" if several else "")
    named = [f"{label}\n{sizes[label]:,} rows" for label in labels]
    return [figures.bars(title, words, metric, named, series)]


def _gains(output: Output, several: bool) -> list:
    """For each baseline a table: targets in the first ten of a model and not of the baseline, and the reverse, by slice."""
    ranks = output.ranked()
    tables = []
    for baseline in (name for name in BASELINES if name in ranks):
        models = [m for m in ranks if m not in BASELINES and _same_rows(output, m, baseline)]
        if models:
            rows = [
                [name, int(here.sum()), *(net(ranks[model][here], ranks[baseline][here]) for model in models)]
                for name, here in _groups(output.ranks[models[0]], len(ranks[baseline])).items()
            ]
            title = f"Hits in the first 10 against {baseline}: gained, lost, net" + (
                f", {output.label}" if several else ""
            )
            tables.append(Table(title, ["test rows with", "rows", *models], rows))
    return tables


def net(own: np.ndarray, other: np.ndarray) -> str:
    """How many rows are in the first ten of `own` ranks and not of `other`, and the reverse."""
    gained, lost = int(((own < TOP) & (other >= TOP)).sum()), int(((own >= TOP) & (other < TOP)).sum())
    return f"{gained} gained, {lost} lost: {gained - lost:+d}"


def _groups(arrays: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """{name: mask (rows,)} of all test rows and of each slice, in the order of `LABELS`."""
    groups = {"all": np.ones(rows, dtype=bool)}
    for kind in KINDS:
        labels = arrays.get(f"slice_{kind}", np.array([]))
        groups |= {f"{SHORT[kind]} {label}": labels == label for label in LABELS if (labels == label).any()}
    return groups


def _same_rows(output: Output, *models: str) -> bool:
    """Whether the models were scored on the same test rows in the same order."""
    targets = [output.ranks[model].get("target") for model in models]
    if any(each is None for each in targets):
        return len({len(output.ranked()[model]) for model in models}) == 1
    return all(np.array_equal(targets[0], each) for each in targets[1:])


# ------------------------------------------------------------------------------------------------ ranks


def ranks_section(outputs: Sequence[Output]) -> Section:
    """The histogram of the targets' ranks, and HR@K for every K."""
    blocks = []
    for output in outputs:
        shares = {model: histogram(ranks) for model, ranks in output.ranked().items()}
        if shares:
            suffix = f": {output.label}" if len(outputs) > 1 else ""
            listed = {model: each[:-1] for model, each in shares.items()}
            blocks.append(figures.bars(f"Rank of the target{suffix}", "rank", "share of rows", [*EDGES], listed))
            curves = {model: _hit_rates(ranks) for model, ranks in output.ranked().items()}
            blocks.append(figures.lines(f"HR@K for every K{suffix}", "K", "HR@K", curves))
            missed = [[model, f"{each[-1]:.1%}"] for model, each in shares.items()]
            blocks.append(Table(f"Target not in the first 50{suffix}", ["model", "test rows"], missed))
    blocks = blocks or [Text("No model has stored ranks (ranks.npz).")]
    lead = (
        "Where each model ranks the target under the headline protocol. A generative model lists only as many SIDs as it "
        "has beams."
    )
    return Section("ranks", "Ranks", lead, blocks)


def _hit_rates(ranks: np.ndarray) -> list[tuple[int, float]]:
    """(K, HR@K) up to 50."""
    return [(k, float((ranks < k).mean())) for k in range(1, 51)]


def histogram(ranks: np.ndarray) -> list[float]:
    """Shares of the rows with a rank in each of `EDGES`, and beyond them."""
    places = np.where(ranks == MISSED, 10**9, ranks) + 1
    bins = np.searchsorted(list(EDGES.values()), places)
    return (np.bincount(bins, minlength=len(EDGES) + 1) / len(ranks)).tolist()


# ------------------------------------------------------------------------------------------------ sample users


def users_section(outputs: Sequence[Output], count: int, seed: int) -> Section:
    """`count` test rows, drawn by seed, with what each model ranks first."""
    blocks = []
    for output in outputs:
        tops = output.ranked("top")
        users = _users(output, tops, count, seed) if tops and output.data is not None else []
        if users and len(outputs) > 1:
            blocks.append(Text(output.label))
        if users:
            blocks.append(Users(users))
    if not blocks:
        blocks = [Text("No model has stored its first items, or the catalog (the info file) is not there any more.")]
    lead = (
        "Test rows drawn at random, not chosen. Each model's first items under the headline protocol; a hit is the "
        "target. Two items with one title are told apart by their numbers."
    )
    return Section("users", "Sample users", lead, blocks)


def _users(output: Output, tops: dict[str, np.ndarray], count: int, seed: int) -> list[User]:
    test, titles = output.data.splits.get("test"), output.data.titles
    models = [name for name in tops if test is not None and _is_of(output, name, test)]
    if not models:
        return []
    ranks = output.ranked()
    chosen = np.random.default_rng(seed).permutation(len(test))[:count]
    users = []
    for row in sorted(chosen.tolist()):
        user, seen, target = test.row(row)[0], test["seen"][row].to_list(), test["target"][row]
        shown = []
        for model in models:
            rank = int(ranks[model][row])
            where = "target not listed" if rank == MISSED else f"target at {number(rank + 1)}"
            items = [item for item in tops[model][row, :SHOWN].tolist() if item >= 0]
            shown.append((model, where, [(_name(titles, item), item == target) for item in items]))
        users.append(User(f"user {user}", [_name(titles, item) for item in seen[-10:]], _name(titles, target), shown))
    return users


def _name(titles: Sequence[str], item: int) -> str:
    return f"{titles[item]} ({item})"


def _is_of(output: Output, model: str, test) -> bool:
    """Whether a model was scored on these test rows."""
    targets = output.ranks[model].get("target")
    return targets is not None and np.array_equal(targets, test["target"].to_numpy())
