"""The picture of an index's quality."""

from pathlib import Path

import numpy as np

from minionerec.common.files import atomic_file, write_json


def write_report(path: Path, content: dict, reports: dict[str, dict]) -> None:
    """`content` as JSON at `path`, and a picture of `reports` (name -> report) as .png next to it."""
    write_json(path, content)
    with atomic_file(path.with_suffix(".png"), "wb") as f:
        picture(reports).savefig(f, format="png", dpi=110)


def picture(reports: dict[str, dict]):
    """A matplotlib figure of four panels: codes and perplexity, items per SID, errors, collision rates."""
    from matplotlib.figure import Figure  # imported here: it is slow

    figure = Figure(figsize=(11, 8), layout="constrained")
    codes, histogram, errors, rates = figure.subplots(2, 2).flat
    width = 0.8 / len(reports)
    for i, (name, report) in enumerate(reports.items()):
        after, color = report["after"], f"C{i % 10}"
        before = report.get("before", after)
        shift = (i - (len(reports) - 1) / 2) * width
        levels = np.arange(len(after["codes_used"]))
        codes.bar(levels + shift, after["codes_used"], width, color=color, alpha=0.35)
        codes.bar(levels + shift, after["perplexity"], width, color=color)
        for figures, alpha in ((before, 0.35), (after, 1.0)):
            sizes = np.array([int(size) for size in figures["items_per_sid"]])
            histogram.bar(sizes + shift, list(figures["items_per_sid"].values()), width, color=color, alpha=alpha)
        for kind, style in (("reconstruction_error", "o-"), ("fitted_error", "x--")):
            if after.get(kind):
                errors.plot(range(1, len(after[kind]) + 1), after[kind], style, color=color)
        pair = [100 * before["collision_rate"], 100 * after["collision_rate"]]
        rates.bar(np.arange(2) + shift, pair, width, color=color, label=name)
    codes.set(title="codes used (pale) and perplexity", xlabel="level", ylabel="codes")
    histogram.set(title="items per SID, before (pale) and after", xlabel="items on one SID", ylabel="SIDs")
    histogram.set(yscale="log", ylim=(0.5, None))
    errors.set(
        title="error: the quantizer's own (o), fitted (x)", xlabel="levels used", ylabel="share of variance left"
    )
    rates.set(title="collision rate", ylabel="% of items", xticks=[0, 1], xticklabels=["before", "after"])
    for panel in (codes, histogram, errors):
        panel.xaxis.get_major_locator().set_params(integer=True)
    legend = figure.legend(loc="outside lower center", fontsize="small", ncols=min(3, len(reports)))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may contain $
    return figure
