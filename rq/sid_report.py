"""Compare indexes: quality figures of one or several, as a table, as JSON and as a picture.

    python -m rq.sid_report output/quickstart/data/ml-100k.index.json         --data_path output/quickstart/raw/ml-100k.emb-minilm-td.npy --output_file output/compare.json

Several index files give a line each. --output_file writes all figures, and a picture with the suffix .png. `rq.quality`
explains the figures. Every quantizer writes them for its index, as <D>.index.quality.json and .png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from minionerec.common import runs
from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.options import INPUT, OUTPUT, StageOptions, option, run
from rq.files import report_path


@dataclass
class Options(StageOptions):
    index: list[str] = option([], "index files; also as first arguments, without the flag", role=INPUT)
    data_path: str = option("", "their embeddings, for the fitted error", role=INPUT)
    output_file: str = option("", "file for the figures, a .json; the picture goes next to it", role=OUTPUT)

    def __post_init__(self):
        super().__post_init__()
        is_json = not self.output_file or self.output_file.endswith(".json")
        self.check(output_file=(is_json, "a name like compare.json"))


def report_of(path: str | Path, embeddings) -> dict:
    """The report of an index file: the one next to it, if it is of this index, and what can be computed now.

    embeddings: a tensor (items, dim), or None.
    """
    from rq.index_file import read_codes
    from rq.quality import fitted_error, quality

    codes = read_codes(path, "index")
    after = quality(codes)
    if embeddings is not None:
        if len(embeddings) != len(codes):
            raise UserError(
                f"{path}: {len(codes)} items, but --data_path has {len(embeddings)} rows; give the embeddings of this index"
            )
        after["fitted_error"] = fitted_error(embeddings, codes)
    written = report_path(path)
    there = read_json(written, "index") if written.exists() else {}
    known = there.get("after", {})
    if not isinstance(known, dict) or not isinstance(there.get("before", {}), dict):
        raise UserError(f"{written}: not a quality report; remove it, or make the index again")
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
    """A text table, one line per report; errors are those of the last level."""
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


def is_comparison(path: Path) -> bool:
    """Whether a file is the figures that an earlier call wrote."""
    content = runs.read_record(path)
    return bool(content) and all(isinstance(each, dict) and "after" in each for each in content.values())


def main(options: Options) -> None:
    if not options.index:
        raise UserError("one or more index files are required: python -m rq.sid_report A.index.json B.index.json")

    import torch

    from rq.picture import write_report

    output = Path(options.output_file)
    embeddings = torch.from_numpy(load_embeddings(options.data_path)) if options.data_path else None
    reports = {path: report_of(path, embeddings) for path in options.index}
    if options.output_file:
        own = is_comparison(output)  # then the picture is that of an earlier call too
        runs.make_room(options, lambda _: own, output, output.with_suffix(".png"))
    print(table(reports))
    if options.output_file:
        write_report(output, reports, reports)
        print(f"wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--index")  # the index files may come first, without the flag
    run(main, Options)
