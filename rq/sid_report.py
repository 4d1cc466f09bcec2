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

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.options import run
from rq.index_file import read_codes
from rq.picture import write_report
from rq.quality import fitted_error, quality


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
