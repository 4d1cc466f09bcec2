"""Sections of the report about single test rows: slices, gains and losses, the histogram of ranks, sample users."""

from collections.abc import Sequence

import numpy as np

from minionerec.evaluation.metrics import MISSED
from minionerec.report import figures
from minionerec.report.blocks import Section, Table, Text, User, Users, number
from minionerec.report.outputs import Output

KINDS = {"popularity": "popularity of the target", "history": "items in the history"}
BASELINES = ("popularity", "markov", "sasrec", "gru4rec", "caser")
EDGES = {"1": 1, "2–3": 3, "4–5": 5, "6–10": 10, "11–20": 20, "21–50": 50}  # places, up to this one
BEYOND = "later or not listed"
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
    """Tables: targets that a model has in the first ten and a baseline has not, and the reverse, by slice."""
    ranks = output.ranked()
    tables = []
    for baseline in (name for name in BASELINES if name in ranks):
        rows = []
        for model, own in ranks.items():
            other = ranks[baseline]
            if model == baseline or model in BASELINES or not _same_rows(output, model, baseline):
                continue
            gained, lost = (own < 10) & (other >= 10), (own >= 10) & (other < 10)
            rows.append([model, "all", *_counts(gained, lost)])
            for kind in KINDS:
                labels = output.ranks[model].get(f"slice_{kind}")
                for label in dict.fromkeys(labels.tolist()) if labels is not None else ():
                    here = labels == label
                    rows.append([model, f"{KINDS[kind]}: {label}", *_counts(gained[here], lost[here])])
        if rows:
            title = f"Hits in the first 10 against {baseline}" + (f": {output.label}" if several else "")
            tables.append(Table(title, ["model", "rows with", "rows", "gained", "lost", "net"], rows))
    return tables


def _counts(gained: np.ndarray, lost: np.ndarray) -> list:
    return [len(gained), int(gained.sum()), int(lost.sum()), f"{int(gained.sum()) - int(lost.sum()):+d}"]


def _same_rows(output: Output, *models: str) -> bool:
    """Whether the models were scored on the same test rows in the same order."""
    targets = [output.ranks[model].get("target") for model in models]
    if any(each is None for each in targets):
        return len({len(output.ranked()[model]) for model in models}) == 1
    return all(np.array_equal(targets[0], each) for each in targets[1:])


# ------------------------------------------------------------------------------------------------ ranks


def ranks_section(outputs: Sequence[Output]) -> Section:
    """The histogram of the targets' ranks."""
    blocks = []
    for output in outputs:
        series = {model: histogram(ranks) for model, ranks in output.ranked().items()}
        if series:
            title = "Rank of the target, share of test rows" + (f": {output.label}" if len(outputs) > 1 else "")
            blocks.append(figures.bars(title, "rank", "share", [*EDGES, "later"], series))
    blocks = blocks or [Text("No model has stored ranks (ranks.npz).")]
    lead = (
        "Where each model ranks the target under the headline protocol. A generative model lists as many SIDs as it has "
        f"beams; a target beyond them is under “later”, as in: {BEYOND}."
    )
    return Section("ranks", "Ranks", lead, blocks)


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
    test, titles = output.data.test, output.data.items.titles
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
