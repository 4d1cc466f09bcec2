"""How good an index is: figures as JSON and as a picture, of one index or of several side by side.

    python -m rq.sid_report A.index.json B.index.json --data_path <D>.emb-minilm-td.npy --output_file compare.json

prints a table; --output_file writes the figures and a .png beside them. Every quantizer writes the same for its own
index, as <D>.index.quality.json and .png. Reconstruction errors are shares of the embedding's variance that are left
after 1, 2, ... levels:

    reconstruction_error   by the quantizer itself: its codebooks, or its decoder
    fitted_error           by the mean residual of the items of each code: needs the index and the embedding alone, so
                           any two indexes can be compared, whatever made them
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cli import HfArg, UserError, atomic_file, read_json, run, write_json
from rq.embeddings import load_embeddings
from rq.models.rq import ResidualModel
from rq.sid_index import quality, read_codes, resolve, write_index


@dataclass
class Options:
    index: list[str] = HfArg(default_factory=list, help="index files; also without the flag, before any other")
    data_path: str = HfArg(default="", help="their embeddings, for the fitted error")
    output_file: str = HfArg(default="", help="a .json for the figures; the picture goes beside it")

    def __post_init__(self):
        if not self.index:
            raise UserError("give one or more index files: python -m rq.sid_report A.index.json B.index.json")
        if self.output_file and not self.output_file.endswith(".json"):
            raise UserError(f"--output_file is {self.output_file!r}, expected a name like compare.json")


# ------------------------------------------------------------------------------------------------ index and report


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


def variance(embeddings: Tensor) -> float:
    """The sum of squares around the mean."""
    return (embeddings - embeddings.mean(dim=0)).square().sum(dtype=torch.float64).item()


@torch.inference_mode()
def fitted_error(embeddings: Tensor, codes: np.ndarray) -> list[float]:
    """Share of the variance of embeddings (items, dim) left after each level that every item has a code at."""
    residual, shares = embeddings - embeddings.mean(dim=0), []
    total = residual.square().sum(dtype=torch.float64).item()
    for column in codes.T[(codes >= 0).all(axis=0)]:
        code = torch.from_numpy(np.unique(column, return_inverse=True)[1].reshape(-1)).to(residual.device)
        sums = residual.new_zeros(int(code.max()) + 1, residual.shape[1]).index_add_(0, code, residual)
        residual = residual - (sums / torch.bincount(code).unsqueeze(1))[code]
        shares.append(round(residual.square().sum(dtype=torch.float64).item() / total, 6))
    return shares


def report_of(path: str | Path, embeddings: Tensor | None) -> dict:
    """The report of an index file: what stands beside it, if it is this index's, and what can be told now."""
    codes = read_codes(path, "index")
    after = quality(codes)
    if embeddings is not None:
        if len(embeddings) != len(codes):
            raise UserError(f"{path}: {len(codes)} items, but --data_path has {len(embeddings)} rows")
        after["fitted_error"] = fitted_error(embeddings, codes)
    beside = Path(path).with_suffix(".quality.json")
    there = read_json(beside, "index") if beside.exists() else {}
    known = there.get("after", {})
    if all(known.get(name) == after[name] for name in ("n_items", "items_per_sid", "perplexity", "codes_used")):
        return there | {"after": known | after}
    return {"after": after}


# ------------------------------------------------------------------------------------------------ showing it


def write_report(path: Path, content: dict, reports: dict[str, dict]) -> None:
    """`content` as JSON at `path`, and a picture of `reports` (name -> report) as .png beside it."""
    write_json(path, content)
    with atomic_file(path.with_suffix(".png"), "wb") as f:
        picture(reports).savefig(f, format="png", dpi=110)


def picture(reports: dict[str, dict]):
    """A matplotlib figure of four panels: codes and perplexity, items per SID, errors, collision rates."""
    from matplotlib.figure import Figure  # here, since it is slow to import

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
    figure.legend(loc="outside lower center", fontsize="small", ncols=min(3, len(reports)))
    return figure


COLUMNS = (
    "index",
    "collision",
    "before",
    "after",
    "max/SID",
    "codes used",
    "perplexity",
    "recon. error",
    "fitted error",
)


def table(reports: dict[str, dict]) -> str:
    """A text table, a line for each of `reports`; errors are those of the last level."""
    lines = [COLUMNS]
    for name, report in reports.items():
        after = report["after"]
        before = report.get("before", {}).get("collision_rate")
        errors = [after.get(kind) for kind in ("reconstruction_error", "fitted_error")]
        lines.append(
            (
                name,
                report.get("collision", "-"),
                "-" if before is None else f"{before:.4f}",
                f"{after['collision_rate']:.4f}",
                str(after["max_items_per_sid"]),
                "/".join(map(str, after["codes_used"])),
                "/".join(f"{x:.0f}" for x in after["perplexity"]),
                *(f"{error[-1]:.4f}" if error else "-" for error in errors),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(options: Options) -> None:
    embeddings = torch.from_numpy(load_embeddings(options.data_path)) if options.data_path else None
    reports = {path: report_of(path, embeddings) for path in options.index}
    print(table(reports))
    if options.output_file:
        output = Path(options.output_file)
        write_report(output, reports, reports)
        print(f"wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--index")
    run(main, Options)
