"""README.md of a checkpoint's folder, in the form of a Hugging Face model card (https://hf.co/docs/hub/model-cards).

A stage writes it just before its record says that the run is complete, so a finished run has one. `add_test` puts test
metrics into it when the checkpoint is evaluated. A README.md that none of the stages has written is left as it is.
Neither digests nor the record's outputs include it: it can be edited or removed.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from minionerec.common import runs
from minionerec.common.console import note
from minionerec.common.files import atomic_file
from minionerec.common.text import printable
from minionerec.common.tracking import read_log

TEST, END = "<!-- test metrics -->", "<!-- end of test metrics -->"
NO_TEST = "Not evaluated on test rows yet."
SHOWN = ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR")
KINDS = {
    "sft": "A language model that writes the semantic ID of the next item, after supervised fine-tuning.",
    "rl": "A language model that writes the semantic ID of the next item, after reinforcement learning (GRPO) over "
    "catalog-constrained completions.",
    "baseline": "A collaborative baseline of next-item recommendation.",
}


def write(run: runs.Run, *, base_model: str = "", test: Mapping | None = None) -> None:
    """Write the card of a run whose result is a folder. Call it before `run.finish`.

    base_model: what the training started from, empty for random weights; test: content of a metrics.json, if measured.
    """
    folder = run.path.parent
    path = folder / runs.CARD
    if path.exists() and not runs.is_our_card(path):
        note(f"{path} was not written by this program and is kept; the model card is not written")
        return
    options = {name: portable(value) for name, value in run.record["options"].items()}
    record = run.record | {"options": options, "seconds": run.seconds(), "device": runs.device()}
    _write(path, card_of(folder, record, base_model, test))


def add_test(folder: Path, test: Mapping, *, replace: bool = True) -> None:
    """Put `test`, the content of a metrics.json, into the card in `folder`, if there is one of ours.

    replace: False keeps the test metrics that the card already has.
    """
    path = folder / runs.CARD
    if not runs.is_our_card(path) or (
        not replace and NO_TEST not in path.read_text(encoding="utf-8", errors="replace")
    ):
        return
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        before, found, rest = card.text.partition(TEST)
        if not found or END not in rest:
            return
        card.text = f"{before}{TEST}\n{test_table(test)}\n{END}{rest.partition(END)[2]}"
        card.data.model_name, card.data.eval_results = folder.resolve().name, results_of(test)
        _write(path, f"---\n{card.data.to_yaml()}\n---\n{card.text}")
    except (OSError, ValueError) as error:  # a folder that cannot be written, a card that was edited
        note(f"the model card {path} is not updated ({error})")


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as f:
        f.write(text.rstrip() + "\n")


# ------------------------------------------------------------------------------------------------ content


def card_of(folder: Path, record: Mapping, base_model: str, test: Mapping | None) -> str:
    """The text of a card."""
    from huggingface_hub import ModelCardData

    stage, options = record["stage"], record.get("options", {})
    name, is_hub_name = folder.resolve().name, bool(base_model) and not Path(base_model).exists()
    language_model = stage in ("sft", "rl")
    data = ModelCardData(
        model_name=name if test else None,
        eval_results=results_of(test) if test else None,
        license=licence_of(base_model),
        library_name="transformers" if language_model else None,
        pipeline_tag="text-generation" if language_model else None,
        base_model=base_model if is_hub_name else None,
        tags=["recommendation", "sequential-recommendation", "minionerec"]
        + (["generative-recommendation", "semantic-ids"] if language_model else [options.get("model", "sasrec")]),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n{runs.CARD_MARK}",
        f"# {text(name)}",
        f"{KINDS.get(stage, stage)} Trained with MiniOneRec.",
        f"- Base model: {code(portable(base_model)) if base_model else 'none, the weights were random'}",
        *_section("Test metrics", f"{TEST}\n{test_table(test) if test else NO_TEST}\n{END}"),
        *_section("Validation", validation(folder, test)),
        *_section("Use", usage(name) if language_model else "Read with `load_checkpoint` of `minionerec.baselines.models`."),
        *_section("Data", table(("file", "path", "digest (BLAKE2b)"), inputs_of(record))),
        *_section(
            "Options", table(("option", "value"), [(name, code(value)) for name, value in options.items()])
            + "\n\nAll others have their defaults."
        ),
        *_section("Command", f"```bash\n{printable(runs.command_line(record))}\n```"),
        *_section("Made with", table(("what", "value"), made_with(record))),
        *_section(
            "Licence",
            "MiniOneRec's code has the Apache-2.0 licence. The weights are also subject to the licences of the base model "
            "and of the data: check them, and set `license` at the top, before this folder is published.",
        ),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _section(title: str, body: str) -> list[str]:
    return [f"## {title}", body]


def licence_of(base_model: str) -> str:
    """The licence that a base model's own card names, else `unknown`."""
    path = Path(base_model) / runs.CARD
    if not base_model or not path.is_file():
        return "unknown"
    found = re.match(r"---\n.*?^license: *([\w.-]+) *$.*?^---$", path.read_text("utf-8", "replace"), re.S | re.M)
    return found[1] if found else "unknown"


def results_of(test: Mapping) -> list:
    """The headline metrics as `EvalResult`s, for the card's model-index."""
    from huggingface_hub import EvalResult

    headline = test if test.get("headline") != "unseen" else test["unseen"]
    dataset = Path(test.get("test_data_path", "test")).stem
    common = {"task_type": "sequential-recommendation", "dataset_type": "test", "dataset_name": dataset}
    return [
        EvalResult(**common, metric_type=name, metric_name=name, metric_value=round(headline["item"][name], 4))
        for name in SHOWN
        if name in headline["item"]
    ]


def test_table(test: Mapping) -> str:
    """Both protocols with 95 % intervals, as a table, and how they were measured."""
    both = {"all items": test} | ({"unseen items": test["unseen"]} if "unseen" in test else {})
    names = [name for name in SHOWN if name in test["item"]]
    rows = [(name, *(_value(own, name) for own in both.values())) for name in names]
    headline = "unseen" if test.get("headline") == "unseen" else "all"
    beams = f", {test['num_beams']} beams" if "num_beams" in test else ""
    said = f"{test.get('rows', '?')} test rows{beams}, by item, over the full catalog; headline: {headline} items."
    return f"{said} Brackets: 95 % bootstrap intervals.\n\n{table(('metric', *both), rows)}"


def _value(own: Mapping, name: str) -> str:
    interval = own.get("intervals", {}).get(name)
    return f"{own['item'][name]:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def validation(folder: Path, test: Mapping | None) -> str:
    """What chose the weights: the best evaluation of the log, or a baseline's metrics on valid."""
    if test and "valid" in test:
        return table(
            ("metric", "value"), [(name, f"{test['valid'][name]:.4f}") for name in SHOWN if name in test["valid"]]
        )
    entries = [entry for entry in read_log(folder) if any(name.startswith("eval_") for name in entry)]
    names = ["step", "eval_loss", *(f"eval_{name}" for name in SHOWN)]
    names = [name for name in names if any(name in entry for entry in entries)]
    if not entries:
        return "No evaluation was logged."
    rows = [[_number(entry.get(name)) for name in names] for entry in entries]
    return "Every evaluation of the training.\n\n" + table([name.removeprefix("eval_") for name in names], rows)


def _number(value) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value if value is not None else "–")


def usage(name: str) -> str:
    """How to ask the model."""
    return (
        "Generation must be constrained to the catalog: `model.generate` alone writes SIDs of no item.\n\n"
        f'```bash\npython recommend.py --base_model {shlex.quote(name)} --info_file <info file> --history "<item>; <item>"\n```'
    )


def portable(value):
    """An option's value for a card that others read: an absolute path from the project's root, or only its last part."""
    if isinstance(value, list):
        return [portable(part) for part in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    path = Path(value)
    return str(path.relative_to(runs.ROOT)) if path.is_relative_to(runs.ROOT) else f"…/{path.name}"


def inputs_of(record: Mapping) -> list[tuple[str, str, str]]:
    """(option, path, digest) of each input."""
    options = record.get("options", {})
    return [(name, code(options.get(name, "")), code(digest)) for name, digest in record.get("inputs", {}).items()]


def made_with(record: Mapping) -> list[tuple[str, str]]:
    """Commit, device, seconds and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    return [
        ("commit", code(record.get("commit") or "not known")),
        ("digest of the code", code(record.get("code", ""))),
        ("device", text(str(record.get("device", "")))),
        ("seconds", f"{record.get('seconds', 0):.0f}"),
        ("versions", text(versions)),
    ]


# ------------------------------------------------------------------------------------------------ markdown


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A markdown table; cells are markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def text(value: str) -> str:
    """Plain text, with the characters escaped that markdown or HTML would act on."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", printable(" ".join(value.split())))


def code(value) -> str:
    """A value as a code span in a table; empty for an empty one."""
    shown = printable(" ".join((value if isinstance(value, str) else json.dumps(value)).split()))
    fence = "``" if "`" in shown else "`"
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown.replace('|', chr(92) + '|')}{space}{fence}" if shown else ""
