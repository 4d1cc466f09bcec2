"""Section of the report about semantic IDs: quality of each index, the largest buckets, a map of the items."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minionerec.common.errors import UserError
from minionerec.common.runs import read_record
from minionerec.report import figures
from minionerec.report.blocks import Map, Point, Section, Table, Text, number
from minionerec.report.outputs import Output

LARGEST = 10  # buckets in the table
EXAMPLES = 3  # titles for a code


def sids_section(outputs: Sequence[Output], map_items: int, seed: int) -> Section:
    """Quality of all index files side by side; for the one that SFT used the largest buckets and the map."""
    from rq.index_file import read_codes

    several = len(outputs) > 1
    found = {
        f"{output.label}: {name}" if several else name: read_codes(path, "output_dir")
        for output in outputs
        for name, path in output.indexes.items()
    }
    blocks = []
    if found:
        blocks.append(_quality(found))
        blocks += _charts(found)
    else:
        blocks.append(Text("No index file (*.index.json) is in the folder, and none of the stages names one."))
    for output in outputs:
        for name, path in list(output.indexes.items())[:1]:
            codes = read_codes(path, "output_dir")
            title = f"{output.label}: {name}" if several else name
            titles = output.data.titles if output.data is not None else [""] * len(codes)
            if len(titles) == len(codes):
                blocks += [*_buckets(title, codes, titles), *_map(title, path, codes, titles, output, map_items, seed)]
    lead = (
        "Entropy in nats and Gini coefficient of the items per used code: 0 means equally many. The first index is the "
        "one that SFT was trained on."
    )
    return Section("sids", "Semantic IDs", lead, blocks)


# ------------------------------------------------------------------------------------------------ quality


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of positive counts: 0 where all are equal, towards 1 where one has everything."""
    ordered = np.sort(counts).astype(float)
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def counts_of(level: np.ndarray) -> np.ndarray:
    """Items of each used code of a level (items,), -1 for no code."""
    return np.unique(level[level >= 0], return_counts=True)[1]


def _quality(found: dict[str, np.ndarray]) -> Table:
    from rq.quality import quality

    columns = {name: _figures(codes, quality(codes)) for name, codes in found.items()}
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [[key, *(number(c[key]) if key in c else "–" for c in columns.values())] for key in keys]
    header = ["figure", *columns]
    if len(columns) == 2:
        first, second = columns.values()
        header.append("difference")
        for row in rows:
            both = row[0] in first and row[0] in second
            row.append(_signed(second[row[0]] - first[row[0]]) if both else "–")
    return Table("Quality of the index files", header, rows)


def _signed(value: float) -> str:
    return f"{value:+,d}" if isinstance(value, int) else f"{round(value, 3) + 0.0:+.3f}"  # no -0.000


def _figures(codes: np.ndarray, quality: dict) -> dict[str, float]:
    result = {
        "items": len(codes),
        "distinct SIDs": quality["distinct_sids"],
        "collision rate": float(quality["collision_rate"]),
        "most items of a SID": quality["max_items_per_sid"],
        "entropy of the SIDs": quality["sid_entropy"],
    }
    for level in range(codes.shape[1]):
        counts = counts_of(codes[:, level])
        share = counts / counts.sum()
        result |= {
            f"level {level + 1}: codes used": len(counts),
            f"level {level + 1}: entropy": float(-(share * np.log(share)).sum()),
            f"level {level + 1}: Gini": gini(counts),
            f"level {level + 1}: most items of a code": int(counts.max()),
        }
    return result


def _charts(found: dict[str, np.ndarray]) -> list:
    """SIDs by number of items, and the items of each code, for every index."""
    charts = [_sizes(found)]
    for name, codes in found.items():
        ordered = {
            f"level {level + 1}": list(enumerate(np.sort(counts_of(codes[:, level]))[::-1].tolist(), start=1))
            for level in range(codes.shape[1])
        }
        charts.append(figures.lines(f"Items per code, largest first: {name}", "code", "items", ordered))
    return charts


def _sizes(found: dict[str, np.ndarray]):
    sizes = {name: np.unique(codes, axis=0, return_counts=True)[1] for name, codes in found.items()}
    most = max(int(each.max()) for each in sizes.values())
    if most == 1:
        return Text("Every SID has one item.")
    last = min(most, 6)
    labels = [*map(str, range(1, last)), f"{last}+" if most > last else str(last)]
    series = {
        name: [int((s == n).sum()) for n in range(1, last)] + [int((s >= last).sum())] for name, s in sizes.items()
    }
    return figures.bars("SIDs by number of items", "items of one SID", "SIDs", labels, series)


def _buckets(name: str, codes: np.ndarray, titles: Sequence[str]) -> list:
    """The SIDs with the most items, if any has two."""
    from rq.index_file import to_sids

    sids, bucket, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    bucket, rows = bucket.ravel(), []
    if sizes.max() == 1:
        return []
    for row in np.argsort(-sizes, kind="stable")[:LARGEST]:
        members = np.flatnonzero(bucket == row)
        shown = " · ".join(titles[item] for item in members[:EXAMPLES])
        rows.append(["".join(to_sids(sids[row : row + 1])[0]), int(sizes[row]), shown])
    return [Table(f"Largest buckets: {name}", ["SID", "items", "titles"], rows)]


# ------------------------------------------------------------------------------------------------ the map


def _map(
    name: str, index: Path, codes: np.ndarray, titles: Sequence[str], output: Output, most: int, seed: int
) -> list:
    """The map of an index's items by their embeddings; a text where there are none."""
    vectors = _embeddings(index, len(codes), output)
    if not most or vectors is None or len(codes) < 8:
        return [Text(f"No map of {name}: it needs the embeddings from which the index was built.")] if most else []
    chosen = np.sort(np.random.default_rng(seed).permutation(len(codes))[:most])
    places = project(vectors[chosen], seed)
    first = codes[chosen, 0]
    used, sizes = np.unique(first, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    # The direction of a code's items from the middle: where codes follow the embeddings, colours change smoothly.
    centres = {int(code): places[first == code].mean(axis=0) - 50 for code in used}
    hues = {code: int(np.degrees(np.arctan2(y, x))) % 360 for code, (x, y) in centres.items()}
    points = [
        Point(round(float(x), 2), round(float(y), 2), int(code), hues[int(code)], titles[item])
        for (x, y), code, item in zip(places, first, chosen, strict=True)
    ]
    rows = []
    for code in used[order]:
        members = chosen[first == code]
        rows.append([f"<a_{code}>", len(members), " · ".join(titles[item] for item in members[:EXAMPLES])])
    table = Table(f"Items by first code: {name}", ["first code", "items drawn", "examples"], rows)
    alt = (
        f"{len(chosen):,} of {len(codes):,} items in two dimensions by t-SNE of their embeddings, coloured by their first "
        f"code, of which there are {len(used)}. Items with one first code have one colour; codes that follow the embeddings give a smooth picture."
    )
    return [Map(f"Items by first code: {name}", alt, points, [(int(used[i]), int(sizes[i])) for i in order], table)]


def _embeddings(index: Path, n_items: int, output: Output) -> np.ndarray | None:
    """The embeddings (items, dim) that an index was built from: those of its record, else the only ones in the folder."""
    from minionerec.common.embeddings import load_embeddings

    given = read_record(index.with_suffix(".run.json")).get("options", {}).get("data_path")
    named = [Path(given)] if isinstance(given, str) and given else []
    for path in [*named, *sorted(output.folder.glob("*/*.emb-*.npy"), reverse=True)]:
        try:
            vectors = load_embeddings(path, "output_dir") if path.is_file() else []
        except UserError:
            continue
        if len(vectors) == n_items:
            return vectors
    return None


def project(vectors: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008) of vectors (items, dim), started from PCA, scaled to [0, 100]²."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    size = min(32, *vectors.shape)
    reduced = PCA(size, random_state=seed).fit_transform(vectors.astype(np.float32))
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(reduced)
    low, high = places.min(axis=0), places.max(axis=0)
    return 100 * (places - low) / np.maximum(high - low, 1e-9)
