"""The documentation agrees with the code.

- Every command in README.md, CONTRIBUTING.md, RESULTS.md and docs/ names a script that exists, options and variables
  that it has, and values that it accepts (`docs/log.md` quotes commands of earlier commits and is left out).
- Commands on the quickstart's files run (slow: on a small data set in their place), and so do the Python snippets.
- The README has at most 130 lines, its tree is the disk's, its results are those of RESULTS.md.
- Links lead to files and headings that exist; paths in code spans exist.
- Messages that `docs/troubleshooting.md` quotes are in the code.
- The log is in order of time, and each heading has a verdict.
"""

import ast
import csv
import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, environment_of

import rl
from minionerec.common.errors import UserError
from minionerec.common.options import arguments_from_variables, parse

README, RESULTS, LOG = ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "docs" / "log.md"
PAGES = [README, RESULTS, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CURRENT = [page for page in PAGES if page != LOG]
ROOMS = ("minionerec", "rq", "preprocess", "benchmarks", "config", "shell", "tests", "docs", "results")
SHELL_WORDS = {
    "source",
    "cd",
    "export",
    "echo",
    "cat",
    "cp",
    "mkdir",
    "ls",
    "pip",
    "git",
    "ruff",
    "pytest",
    "pre-commit",
}
OTHER_FLAGS = {"--help", "--debug", "--no-deps", "--standalone", "--config_file"}  # not options of one script
LAUNCH_FLAGS = {  # of torchrun, accelerate launch and sbatch
    "--nnodes", "--node_rank", "--master_addr", "--master_port", "--nproc_per_node", "--num_machines", "--machine_rank",
    "--main_process_ip", "--main_process_port", "--num_processes", "--nodes", "--gpus-per-node",
}  # fmt: skip
OTHER_VARIABLES = {
    "NCCL_SOCKET_IFNAME",
    "NCCL_DEBUG",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "HF_HUB_OFFLINE",
    "WANDB_MODE",
}
VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.S)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(page: Path, language: str = "bash") -> list[str]:
    """The contents of a page's fenced blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def code_spans(page: Path) -> list[str]:
    """The inline code spans of a page, line breaks as blanks."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


# ------------------------------------------------------------------------------------------------ commands


@functools.cache
def options_of(script: str):
    """The options dataclass of `sft.py` or `rq.rqvae`; None for a module that is not this project's."""
    module = script.removesuffix(".py")
    if not (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
        assert module.split(".")[0] not in ROOMS and not script.endswith(".py"), f"{script} does not exist"
        return None
    return getattr(importlib.import_module(module), "Options", None)


def names_of(options) -> set[str]:
    """The flags of an options dataclass, aliases included, with their dashes."""
    flags = set()
    for field in dataclasses.fields(options):
        flags |= {f"--{field.name}", *field.metadata.get("aliases", ())}
    return flags | OTHER_FLAGS


def script_of(launcher: str) -> str | None:
    """The script that a launcher starts; None for run.sh and test.sh, which start none or several."""
    text = (ROOT / launcher).read_text(encoding="utf-8")
    found = re.search(r'^launch .*?([\w.]+) "\$@"$', text, re.M)
    assert found or launcher in ("run.sh", "test.sh"), f"{launcher} does not end in a line like launch python SCRIPT"
    return found and found[1]


@functools.cache
def shell_words() -> frozenset[str]:
    """Every word of the launchers and of shell/: the variables that they know are among them."""
    files = [*ROOT.glob("*.sh"), *ROOT.glob("rq/**/*.sh"), *ROOT.glob("shell/*.sh")]
    return frozenset(word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8")))


def sources() -> list[Path]:
    """The project's Python files, tests left out."""
    rooms = ("minionerec", "rq", "preprocess", "benchmarks")
    return [*ROOT.glob("*.py"), *(file for room in rooms for file in sorted((ROOT / room).rglob("*.py")))]


@functools.cache
def all_flags() -> frozenset[str]:
    """The flags of every script that has options."""
    scripts = [file for file in sources() if re.search(r"^    run\(main", file.read_text(encoding="utf-8"), re.M)]
    modules = [str(file.relative_to(ROOT).with_suffix("")).replace("/", ".") for file in scripts]
    return frozenset(flag for module in modules if options_of(module) for flag in names_of(options_of(module)))


def simple_commands(text: str) -> list[list[str]]:
    """The words of each command of a shell text, split at pipes, `&&` and line ends; comments left out."""
    commands = []
    for line in re.sub(r"<\w[^<>\n]*>", "…", text).replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("|", "&&", "&", ";") or word.startswith((">", "2>", "<(")):
                commands.append(words)
                words = []
            else:
                words.append(word)
    return [command for command in commands if command]


def is_placeholder(value: str) -> bool:
    return bool(re.search(r"[…$<>]", value)) or value == "..."


def check_options(options, variables: dict[str, str], words: list[str]) -> None:
    """Raise where `words` hold an unknown flag, or a value of them or of `variables` is refused."""
    known, arguments, group = names_of(options), [], []
    words = [word for word in words if word not in ("--debug", "…", "...")]
    while words and not words[0].startswith("--"):
        words.pop(0)  # files that a script takes without a flag
    for word in [*words, "--"]:
        if word.startswith("--"):
            if not any(is_placeholder(part) for part in group):
                arguments += group
            group = [word]
            flag = word.split("=")[0]
            assert flag in known | {"--"}, f"no option {flag}"
        else:
            group.append(word)
    if "--help" in arguments:
        return
    given = {name: value for name, value in variables.items() if not is_placeholder(value)}
    parse(options, [*arguments_from_variables(options, given), *arguments])


def check_command(words: list[str]) -> None:
    """Raise, saying why, where a command could not start."""
    variables = {}
    while words and (assignment := VARIABLE.fullmatch(words[0])):
        variables[assignment[1]] = assignment[2]
        words = words[1:]
    if not words or words[0] in SHELL_WORDS or words[0].startswith(("#", ".venv")):
        return
    if words[0] == "sbatch":  # shell/slurm.sh starts a launcher with these variables
        script = next(number for number, word in enumerate(words) if word.endswith(".sh"))
        assert (ROOT / words[script]).exists(), f"{words[script]} does not exist"
        check_launch_flags(words[1:script])
        words = ["bash", *words[script + 1 :]]
    if words[0] in ("torchrun", "accelerate"):
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        check_launch_flags(words[1:script])
        words = ["python", *words[script:]]
    assert words[0] in ("bash", "python"), f"unknown command {words[0]}"
    if words[0] == "python":
        script, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        if options := options_of(script):
            check_options(options, {}, rest)
        return
    launcher, rest = words[1], words[2:]
    assert (ROOT / launcher).exists(), f"{launcher} does not exist"
    script = script_of(launcher)
    options = script and options_of(script)
    known = set(shell_words())
    if options:
        known |= {flag.lstrip("-").upper() for flag in names_of(options)}
        check_options(options, variables, rest)
    elif variables:  # run.sh passes variables on to every stage
        known |= {flag.lstrip("-").upper() for flag in all_flags()}
    unknown = set(variables) - known - OTHER_VARIABLES
    assert not unknown, f"{launcher} does not use {sorted(unknown)}"


def check_launch_flags(words: list[str]) -> None:
    unknown = {word.split("=")[0] for word in words if word.startswith("--")} - LAUNCH_FLAGS - OTHER_FLAGS
    assert not unknown, f"unknown flags of a launch: {sorted(unknown)}"


def documented_commands(page: Path) -> list[str]:
    spans = [span for span in code_spans(page) if re.match(r"([A-Z_0-9]+=\S* )*(bash|python) \S+", span)]
    return [*fenced(page), *spans]


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_every_command_could_start(page):
    wrong = []
    for text in documented_commands(page):
        for words in simple_commands(text):
            try:
                check_command(words)
            except (AssertionError, UserError, ImportError) as error:
                wrong.append(f"{' '.join(words)[:150]}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_every_flag_and_variable_in_a_code_span_exists(page):
    spans = [span for span in code_spans(page) if not re.match(r"(bash|python|pip|torchrun|accelerate|git) ", span)]
    flags = {flag for span in spans for flag in re.findall(r"^--[A-Za-z]\w+", span)}
    assert not flags - all_flags() - OTHER_FLAGS
    variables = {VARIABLE.match(word)[1] for span in spans for word in span.split() if VARIABLE.match(word)}
    upper = {flag.lstrip("-").upper() for flag in all_flags()}
    assert not variables - upper - shell_words() - OTHER_VARIABLES


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("python no_such_script.py", "does not exist"),
        ("python -m benchmarks.no_such_module --json", "does not exist"),
        ("bash no_such_launcher.sh", "does not exist"),
        ("python sasrec.py --no_such_option 1", "no option --no_such_option"),
        ("python sasrec.py --epochs many", "invalid int value"),
        ("python sasrec.py --model best", "expected one of"),
        ("bash sft.sh --no_such_option 1", "no option --no_such_option"),
        ("EPOCHS=none bash sasrec.sh", "invalid int value"),
        ("NO_SUCH_VARIABLE=1 bash sasrec.sh", "does not use"),
        ("NO_SUCH_VARIABLE=1 bash run.sh", "does not use"),
        ("MODEL=markov \\\n    bash sasrec.sh --bad 1 # why", "no option --bad"),
        ("frobnicate", "unknown command"),
        ("torchrun --nproc_per_node 2 sft.py --bad 1", "no option --bad"),
        ("torchrun --bad 2 sft.py", "unknown flags of a launch"),
        ("accelerate launch --num_processes 2 rl.py --beta many", "invalid float value"),
        ("sbatch shell/slurm.sh none.sh", "none.sh does not exist"),
        ("BETA=many sbatch shell/slurm.sh rl.sh", "invalid float value"),
    ],
)
def test_a_command_that_cannot_start_is_found(command, reason):
    with pytest.raises((AssertionError, UserError), match=re.escape(reason)):
        for words in simple_commands(command):
            check_command(words)


# ------------------------------------------------------------------------------------------------ commands that run


RUNNABLE = {"convert_dataset.sh", "sasrec.sh", "sft.sh", "rl.sh", "evaluate.sh", "recommend.py", "report.py"}
RUNNABLE |= {"rq/rqvae.sh", "rq/generate_indices.sh", "rq/rqkmeans_constrained.sh", "rq/rqkmeans_plus.sh"}


def runnable_blocks() -> list:
    """The bash blocks that read only the quickstart's files and start only the stages of `RUNNABLE`."""
    blocks = []
    for page in CURRENT:
        for number, block in enumerate(fenced(page)):
            commands = simple_commands(block)
            started = [w for words in commands for w in words if w.endswith((".sh", ".py"))]
            if (
                "output/quickstart" in block
                and started
                and set(started) <= RUNNABLE
                and not re.search(r"…|<\w|NNODES|my_|output/hashed|vllm", block)  # vLLM: test_vllm.py
            ):
                blocks.append(pytest.param(block, id=f"{name_of(page)}-{number}"))
    return blocks


@pytest.fixture(scope="module")
def quickstart(world, base_model, checkpoint_folder, tmp_path_factory):
    """A folder `output` like the one that run.sh leaves, with the small data set in place of MovieLens-100K."""
    output = tmp_path_factory.mktemp("documented") / "output"
    raw, data = output / "quickstart" / "raw", output / "quickstart" / "data"
    shutil.copytree(world.folder, raw)
    for path in sorted(raw.rglob("toy*"), reverse=True):
        path.rename(path.with_name(path.name.replace("toy", "ml-100k")))
    for name, folder in (("base", base_model), ("sft", checkpoint_folder), ("rl", checkpoint_folder)):
        shutil.copytree(folder, output / "quickstart" / name)
    items = json.loads((raw / "ml-100k.item.json").read_text())
    for item, title in zip(items.values(), ("Star Wars (1977)", "Alien (1979)", "Blade Runner (1982)"), strict=False):
        item["title"] = title
    (raw / "ml-100k.item.json").write_text(json.dumps(items))
    embeddings = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)  # enough rows for 256 codes
    np.save(raw / "ml-100k.emb-minilm-td.npy", embeddings)
    names = f"DATASET_NAME=ml-100k DATA_DIR={raw} OUTPUT_DIR={raw} MAX_HISTORY=20"
    run_block(f"{names} bash convert_dataset.sh --overwrite True")
    shutil.copytree(raw, data, ignore=shutil.ignore_patterns("*.inter", "*.npy", "*.run.json", "*.1"))
    files = " ".join(f"{name.upper()}_FILE={data}/{name}/ml-100k.csv" for name in ("train", "valid", "test"))
    files += f" INFO_FILE={data}/info/ml-100k.txt"
    for model in ("sasrec", "markov"):
        run_block(f"MODEL={model} {files} OUTPUT_DIR={output}/quickstart/{model} bash sasrec.sh")
    return output


def run_block(block: str) -> subprocess.CompletedProcess:
    script = "set -e\n" + "\n".join(line for line in block.splitlines() if ".venv/bin/activate" not in line)
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment_of(NPROC=1), capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
@pytest.mark.parametrize("block", runnable_blocks())
def test_documented_commands_run(block, quickstart):
    done = run_block(re.sub(r"(?<![\w/])output(?=/)", str(quickstart), block))
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def python_snippets(page: str, output: Path) -> list[str]:
    """The Python blocks of a page, on the files below `output`."""
    blocks = fenced(ROOT / "docs" / page, "python")
    return [re.sub(r"(?<![\w/])output(?=/)", str(output), block) for block in blocks]


def run_python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_snippets_of_a_log_and_of_a_server_run(quickstart, tmp_path):
    [snippet] = python_snippets("console.md", quickstart)
    assert "eval_NDCG@10" in run_python(snippet, tmp_path)
    [snippet] = python_snippets("recommend.md", quickstart)
    best = ast.literal_eval(run_python(snippet, tmp_path).splitlines()[-1])
    assert len(best) == 10 and len(set(best)) == 10 and all(sid.startswith("<a_") for sid in best)


@pytest.mark.slow
def test_the_quantizer_and_the_task_of_the_page_run(quickstart, tmp_path, monkeypatch):
    """The quantizer's index is converted; the task makes a row per sample that has a history."""
    import polars as pl

    import data
    from minionerec.catalog.items import Items

    output = tmp_path / "output"
    shutil.copytree(quickstart / "quickstart" / "raw", output / "quickstart" / "raw")
    items = len(json.loads((output / "quickstart" / "raw" / "ml-100k.item.json").read_text()))
    vectors = np.random.default_rng(0).normal(size=(items, 16)).astype(np.float32)
    np.save(output / "quickstart" / "raw" / "ml-100k.emb-minilm-td.npy", vectors)
    quantizer, task = python_snippets("extending.md", output)
    assert run_python(quantizer, tmp_path).startswith("collision rate ")
    [block] = [block for block in fenced(ROOT / "docs" / "extending.md") if "convert_dataset.sh" in block]
    done = run_block(re.sub(r"(?<![\w/])output(?=/)", str(output), block))
    assert done.returncode == 0 and (output / "hashed" / "train" / "ml-100k.csv").exists(), done.stderr

    monkeypatch.setattr(data, "TASKS", dict(data.TASKS))
    exec(task, {})
    rows = pl.DataFrame({"history": [[0, 1], []], "target": [2, 0]}, schema_overrides={"history": pl.List(pl.Int64)})
    prompts = data.Prompts(category="lamps")
    monkeypatch.setitem(prompts.tasks, "last_title", prompts.tasks["sid_seq2title"])
    catalog = Items(["<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>"], ["Desk lamp", "Bulb", "Hook"])
    [example] = data.TASKS["last_title"].examples(rows, catalog, prompts)
    assert example.answer == "Bulb" and "<a_0><b_0><a_0><b_1>" in example.prompt and "Bulb" not in example.prompt


# ------------------------------------------------------------------------------------------------ the README


def on_disk(folder: Path) -> set[str]:
    """Names in `folder` that belong to the project: not hidden, not ignored by git."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    return {path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name not in ignored}


def test_readme_has_at_most_130_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_pages_say_where_digits_repeat_and_how_wide_intervals_are():
    for page, said in (
        ("README.md", r"95 % interval .* digits do not repeat"),
        ("RESULTS.md", r"a figure holds for its commit and its type of cpu: on another type"),
        ("docs/evaluation.md", r"repeat to the digit on one cpu type"),
        ("docs/troubleshooting.md", r"digits differ from results.md"),
    ):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert re.search(said, text, re.IGNORECASE), page


def test_readme_tree_is_the_disk():
    [tree] = fenced(README, "text")
    entries: dict[str, set[str]] = {}
    folder = ""
    for line in tree.splitlines():
        name, *description = line.split()
        assert description, f"{name} has no description"
        if line.startswith(" "):
            entries[folder].add(name.rstrip("/"))
        else:
            folder = name.rstrip("/")
            assert folder not in entries, f"{folder} is listed twice"
            entries[folder] = set()
    assert set(entries) == on_disk(ROOT)
    assert entries["minionerec"] == {name for name in on_disk(ROOT / "minionerec") if name != "__init__.py"}


def table_under(page: Path, heading: str) -> dict[str, list[str]]:
    """The first table after a heading: first cell -> the other cells."""
    text = page.read_text(encoding="utf-8").split(f"\n## {heading}", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows if not set(row[0]) <= set("-: ")}


def test_readme_results_are_those_of_results():
    assert table_under(README, "Results") == table_under(RESULTS, "Quickstart")


def test_the_recipe_of_the_rl_page_is_that_of_its_launcher():
    launcher = (ROOT / "rl.sh").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"^(\w+)=\$\{.*:-([\w.-]*)\}+", launcher, re.MULTILINE))
    page = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")
    lines = page.split("## The recipe of rl.sh")[1].split("\n\n")[1].splitlines()[2:]
    found = {}
    for names, values in (line.split(" | ")[:2] for line in lines):
        found |= dict(zip(re.findall(r"`(\w+)`", names), values.replace("`", "").split(", "), strict=True))
    assert found["EVAL_ROWS"] == "all" and defaults["EVAL_ROWS"] == "-1" and len(found) == 8
    assert float(found.pop("BETA")) == float(defaults["BETA"])
    used = {name: defaults[name] or getattr(rl.Options, name.lower()) for name in found}  # empty: the script's default
    assert {name: value for name, value in found.items() if used[name] != value} == {"EVAL_ROWS": "all"}


def test_quickstart_table_is_in_the_raw_results():
    with open(ROOT / "results" / "run_sh.csv", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["data"] == "MovieLens-100K"]
    newest = max(row["date"] for row in rows)
    commit = next(row["commit"] for row in rows if row["date"] == newest)  # the newest run is first
    table = table_under(RESULTS, "Quickstart")
    metrics = table.pop("model")
    assert table == {row["model"]: [row[name] for name in metrics] for row in rows if row["commit"] == commit}


def test_the_default_runs_are_in_the_raw_results():
    """NDCG@10 of the newest run on each data set, in its protocol; the best baseline is the best."""
    with open(ROOT / "results" / "run_sh.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for data, (protocol, best, *values, _, _) in list(table_under(RESULTS, "Default runs").items())[1:]:
        name, split = {"all": (f"{data}, all items", "test"), "unseen": (data, "test, unseen items")}[protocol]
        own = [row for row in rows if (row["data"], row["split"]) == (name, split)]
        newest = [row for row in own if row["commit"] == own[0]["commit"]]  # the first
        found = {row["model"]: row["NDCG@10"] for row in newest}
        assert values == [found[model] for model in ("sft", "rl", "blend")]
        baselines = {model: found[model] for model in ("popularity", "markov", "sasrec")}
        assert best.split() == list(max(baselines.items(), key=lambda each: each[1]))


# ------------------------------------------------------------------------------------------------ links and paths


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for link in links:
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_paths_in_code_spans_exist(page):
    named = [span for span in code_spans(page) if re.fullmatch(r"[\w\-]+(/[\w\-.]+)+/?", span)]
    ours = [path for path in named if path.split("/")[0] in ROOMS]
    assert not [path for path in ours if not (ROOT / path).exists()]


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.stem != "index" and page.name not in index]


# ------------------------------------------------------------------------------------------------ messages


def texts_in_code() -> str:
    """The texts of all Python files, one per line, with … for what is filled in, and the shell files."""
    texts = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    return "\n".join([*texts, *(file.read_text(encoding="utf-8") for file in ROOT.glob("shell/*.sh"))])


def test_quoted_messages_are_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?`) \|", page, re.M)
    known = texts_in_code()
    parts = [part.strip() for cell in cells for message in re.findall(r"`(.*?)`", cell) for part in message.split("…")]
    assert len(cells) > 30 and not [part for part in parts if part not in known]


# ------------------------------------------------------------------------------------------------ the log


def test_log_is_newest_first_with_verdicts():
    headings = re.findall(r"^## (.*)$", LOG.read_text(encoding="utf-8"), re.M)
    assert headings and all(re.match(r"\d{4}-\d\d-\d\d: ", heading) for heading in headings)
    dates = [heading[:10] for heading in headings]
    assert dates == sorted(dates, reverse=True)
    assert not [heading for heading in headings if not re.search(r"– .*(positive|negative|neutral)", heading)]
