"""The record of a run: what a result was made from, so that a stage knows whether to skip, resume or start.

    run = begin(options, "sft", folder=options.output_dir, writes=["*.safetensors", "config.json", "checkpoint-*"])
    if run.complete:
        return
    …                       # run.resume: an unfinished run with the same identity was found
    run.finish()

The record is `run.json` in the result's folder, or `<name>.run.json` next to a result that is a file. It is written when
the run begins, so that inputs are recorded as they were then, and again when it ends.

The identity of a run is its stage, its options of role SETTING and the digests of its options of role INPUT
(`minionerec.common.options`). The record also says, outside the identity: command, options of any role that differ from
their defaults, code version, commit, package versions, device, time, seconds, the files that were written, and a random
`id`, which every start of the same run keeps: what an unfinished run leaves for its next start is marked with it.

    what is found                                    what happens
    no result                                        fresh start
    complete, same identity, all files there         nothing to do
    complete, same identity, a file is missing       made again
    unfinished, same identity                        resumed
    another identity, and none of its files          fresh start
    another identity, or files without a record      refused; with --overwrite True the old result moves to NAME.1

Two processes never write one result: the second start is refused (`minionerec.common.locks`).

Nothing of a result is ever deleted here. Where a start is refused before the stage has written anything, `withdraw` takes
the record back, and what was moved aside returns.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minionerec.common.console import detail, duration, note, say
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, write_json
from minionerec.common.locks import hold, release
from minionerec.common.options import INPUT, SETTING, WITHDRAWALS, role_of
from minionerec.common.tracking import LOG_FILE

ROOT = Path(__file__).parents[2]
RECORD = "run.json"
MANIFEST = "manifest.json"  # of a checkpoint-N (language_model/numbered_checkpoints.py): its run and its files
PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "trl",
    "accelerate",
    "peft",
    "deepspeed",
    "polars",
    "numpy",
    "faiss-cpu",
)
CARD, CARD_MARK = "README.md", "<!-- written by MiniOneRec -->"  # the model card, and how it is told from another's
# What a folder's digest covers: models, tokenizers, templates, tables. Records, figures and logs are left out.
DIGESTED = {".json", ".safetensors", ".bin", ".model", ".txt", ".yaml", ".npz", ".npy", ".gguf", ".csv", ".jinja"}
NOT_DIGESTED = {RECORD, MANIFEST, "metrics.json", "trainer_state.json", "training_args.bin", "result.json", LOG_FILE}


@dataclass
class Run:
    """A run that has begun. `state` is fresh, resume or complete."""

    state: str
    path: Path  # of the record
    record: dict
    files: Sequence[str | Path] = ()  # the results, where they are files
    writes: Sequence[str] = ()  # the results, where they are in the record's folder, as glob patterns
    claims: tuple = ("", (), ())  # folder, writes and files as `begin` got them: what a start may have written
    before: bytes | None = None  # the record's content when this run began
    moved: Sequence[tuple[Path, Path]] = ()  # an older result: (where it was, where it is)
    had_log: bool = False  # a log that this run did not begin
    made: Sequence[Path] = ()  # folders that were made for the record, the innermost first

    @property
    def complete(self) -> bool:
        return self.state == "complete"

    @property
    def resume(self) -> bool:
        return self.state == "resume"

    def finish(self) -> None:
        """Mark the run as complete, with the files that it has written."""
        base = self.path.parent
        found = [Path(file) for file in self.files]
        found += [path for pattern in self.writes for path in sorted(base.glob(pattern)) if path.is_file()]
        outputs = {os.path.relpath(path, base): path.stat().st_size for path in found}
        self.record |= {"complete": True, "seconds": self.seconds(), "outputs": outputs, "device": device()}
        write_json(self.path, self.record)
        release(self.path)
        say(f"{self.record['stage']}: done in {duration(self.record['seconds'])}")
        if self.withdraw in WITHDRAWALS:
            WITHDRAWALS.remove(self.withdraw)

    def withdraw(self) -> None:
        """Undo a start that was refused: the record is as before, what moved aside returns. Not where there are results."""
        release(self.path)
        if results(*self.claims, {}, self.path):
            return
        if self.before is None or self.moved:
            self.path.unlink(missing_ok=True)
            if self.claims[0] and not self.had_log:  # that of a training that diverged before its first checkpoint
                (self.path.parent / LOG_FILE).unlink(missing_ok=True)
        else:
            with atomic_file(self.path, "wb") as f:
                f.write(self.before)
        for old, new in self.moved:
            new.rename(old)
        emptied = sorted({new.parent for _, new in self.moved}, key=lambda folder: -len(folder.parts))
        for folder in (*emptied, *self.made):
            with contextlib.suppress(OSError):  # it is not empty, or it is where the moved files are now
                folder.rmdir()

    def seconds(self) -> float:
        """Seconds of this run so far."""
        return round(time.time() - self.record["started"] + self.record.get("seconds_before", 0), 1)


def begin(
    options,
    stage: str,
    *,
    folder: str | Path = "",
    files: Sequence[str | Path] = (),
    record: str | Path = "",
    writes: Sequence[str] = (),
    inputs: Mapping[str, str | Path] | None = None,
) -> Run:
    """Start a run of `stage`, or find it finished. Call it before anything is written, in the main process.

    folder, writes: the result is a folder; what the stage writes there, as glob patterns.
    files, record: the result is these files; where the record goes (default: next to the first).
    inputs: files that shape the result, in addition to the options of role INPUT.

    Raises `UserError` where a result with another identity, or files without a record, would be overwritten, and where
    another process is writing it.
    """
    path = Path(folder) / RECORD if folder else Path(record or Path(files[0]).with_suffix(".run.json"))
    announce(options, stage, inputs or {})
    hold(path)
    identity = identity_of(options, stage, inputs or {})
    found = read_record(path)
    existing, moved = results(folder, writes, files, found, path), []
    same = bool(found) and {key: found.get(key) for key in identity} == identity
    if same:
        missing = [name for name in found.get("outputs", ()) if not (path.parent / name).exists()]
        if found.get("complete") and not missing:
            say(f"{folder or files[0]}: complete with these options, nothing to do")
            note_changes(found, path)
            release(path)
            return Run("complete", path, found, files, writes)
        if found.get("complete"):
            say(f"{path.parent / missing[0]} is missing; made again")
        state = "fresh" if found.get("complete") else "resume"
    else:
        state = "fresh"
        if existing:
            reason = difference(found, identity) if found else f"{existing[0].name} was not made by this stage"
            if not getattr(options, "overwrite", False):
                release(path)
                raise _taken(folder or existing[0], reason)
            moved = move_aside([*existing, *companions(folder)], folder)
            note(f"the old result ({reason}) moves to {target_of(moved, folder)}")
    seconds = found.get("seconds_before", 0) if state == "resume" else 0
    new = identity | {
        "id": (same and found.get("id")) or secrets.token_hex(8),
        "complete": False,
        "command": " ".join(sys.argv),
        "options": changed_options(options),
        "code": code_version(),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | versions(),
        "started": time.time(),
        "seconds_before": seconds,
    }
    before = path.read_bytes() if path.is_file() else None
    had_log = (path.parent / LOG_FILE).exists()
    made = [parent for parent in path.parents if not parent.exists()]
    write_json(path, new)
    say(f"{stage}: {'resumes' if state == 'resume' else 'writes'} {folder or ', '.join(map(str, files[:1]))}")
    run = Run(state, path, new, files, writes, (folder, writes, files), before, moved, had_log, made)
    WITHDRAWALS.append(run.withdraw)
    return run


def refuse_unknown(options, *files: str | Path) -> None:
    """Raise `UserError` for a file without a record: what a later stage of a command would refuse, before its first one."""
    for file in map(Path, files):
        if file.exists() and not file.with_suffix(".run.json").exists() and not options.overwrite:
            raise _taken(file, f"{file.name} was not made by this stage")


def make_room(options, ours: Callable[[Path], bool], *files: str | Path) -> None:
    """Before a command without a record writes `files`: refuse those that exist and are not `ours`, or move them aside."""
    foreign = [path for path in map(Path, files) if path.exists() and not (path.is_file() and ours(path))]
    for path in foreign:
        if path.is_dir():
            raise UserError(f"{path}: found a folder, expected the name of a file; choose another output")
        if not options.overwrite:
            raise _taken(path, f"{path.name} was not made by this command")
    for path in foreign:
        [(_, new)] = move_aside([path], "")
        note(f"{path} was not made by this command; it moves to {new}")


def _taken(place: str | Path, reason: str) -> UserError:
    return UserError(
        f"{place}: holds another result ({reason}); choose another output, or --overwrite True to move the old one aside"
    )


def announce(options, stage: str, inputs: Mapping[str, str | Path]) -> None:
    """Print what a stage reads; with --verbose also the options that differ from their defaults."""
    fields = dataclasses.fields(options)
    paths = [getattr(options, field.name) for field in fields if role_of(field) == INPUT] + list(inputs.values())
    flat = [part for path in paths if path for part in (path if isinstance(path, list | tuple) else [path])]
    say(f"{stage}: reads {', '.join(dict.fromkeys(map(relative, flat)))}")
    for name, value in changed_options(options).items():
        detail(f"{stage}: --{name} {value}")


def relative(path: str | Path) -> str:
    """A path inside the working directory without the latter."""
    return str(path).removeprefix(f"{os.getcwd()}/")


# ------------------------------------------------------------------------------------------------ identity


def identity_of(options, stage: str, inputs: Mapping[str, str | Path]) -> dict:
    """What makes a result: the stage, settings by name, and a digest of each input."""
    settings, paths = {}, dict(inputs)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if role_of(field) == SETTING:
            settings[field.name] = value
        elif role_of(field) == INPUT:
            paths[field.name] = value
    if accelerate := accelerate_settings():
        settings["accelerate"] = accelerate
    digests = {name: digest(path) for name, path in paths.items() if path}
    return json.loads(json.dumps({"stage": stage, "settings": settings, "inputs": digests}))


def changed_options(options) -> dict:
    """{name: value} of the options of any role whose value is not the default."""
    changed = {}
    for field in dataclasses.fields(options):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if getattr(options, field.name) != default:
            changed[field.name] = getattr(options, field.name)
    return json.loads(json.dumps(changed, default=str))


def accelerate_settings() -> dict:
    """What `accelerate launch` has set that shapes a result: mixed precision and the ZeRO stage."""
    names = {"mixed_precision": "ACCELERATE_MIXED_PRECISION", "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE"}
    found = {name: os.environ.get(variable, "no") for name, variable in names.items()}
    return {name: value for name, value in found.items() if value != "no"}


def digest(path: str | Path | Sequence) -> str:
    """A digest of a file's bytes, or of the files of a folder; a name that is no path (a model of the hub) is itself.

    Other results in a folder, which have records, are no part of it: `<name>.*` next to `<name>.run.json`, and folders.
    """
    if isinstance(path, list | tuple):
        return " ".join(digest(part) for part in path)
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as f:
            return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    if not path.is_dir():
        return str(path)
    total = hashlib.blake2b(digest_size=16)
    others = tuple(record.name.removesuffix(RECORD) for record in path.glob(f"*.{RECORD}"))
    folders = {record.parent.name for record in path.glob(f"*/{RECORD}")}
    for file in sorted([*path.glob("*"), *path.glob("*/*")]):
        name = file.relative_to(path)
        own = not name.parts[0].startswith((".", "checkpoint-", *others)) and name.parts[0] not in folders
        if file.is_file() and file.suffix in DIGESTED and file.name not in NOT_DIGESTED and own:
            total.update(f"{name}\0{digest(file)}\0".encode())
    return total.hexdigest()


def difference(found: dict, identity: dict) -> str:
    """The first difference between a record and an identity, in words."""
    if found.get("stage") != identity["stage"]:
        return f"it was made by {found.get('stage')}"
    for kind in ("settings", "inputs"):
        there, now = found.get(kind, {}), identity[kind]
        for name in sorted({*there, *now}):
            if there.get(name) != now.get(name):
                if kind == "inputs" and name in there and name in now:
                    return f"the content of {name} has changed"
                return f"{name} is {there.get(name)!r} there and {now.get(name)!r} now"
    return "no setting differs"


def command_line(record: Mapping) -> str:
    """The command that gives a record's options, also where a launcher took them from variables."""
    script, _, rest = record.get("command", "").partition(" ")
    path = Path(script)
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    inner = len(path.parts) > 1 and not path.is_absolute()  # `python -m rq.rqvae` is recorded as its file
    words = ["-m", ".".join(path.with_suffix("").parts)] if inner else [path.name]
    if "options" not in record:
        return f"python {shlex.join(words)} {rest}".strip()
    for name, value in record["options"].items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return f"python {shlex.join(words)}"


# ------------------------------------------------------------------------------------------------ files


def read_record(path: Path) -> dict:
    """The record in `path`; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def require_finished(folder: str | Path) -> None:
    """Raise `UserError` where the record in `folder` says that the run has not finished."""
    found = read_record(Path(folder) / RECORD)
    if found and not found.get("complete"):
        raise UserError(f"{folder}: {found.get('stage')} has not finished there; re-run it with the same options first")


def results(folder, writes: Sequence[str], files: Sequence, found: dict, path: Path) -> list[Path]:
    """The files of an earlier result: those of its record, and those that this stage would write over."""
    names = [path.parent / name for name in found.get("outputs", ())]
    names += [match for pattern in writes for match in sorted(Path(folder).glob(pattern))]
    names += [Path(file) for file in files]
    existing = [name for name in dict.fromkeys(names) if name.exists()]
    beside = [path] if found else []
    if folder and (path.parent / LOG_FILE).exists():
        beside.append(path.parent / LOG_FILE)
    return [*existing, *beside] if existing else []


def companions(folder: str | Path) -> list[Path]:
    """What describes a result in a folder without being part of it: the model card that a stage wrote."""
    card = Path(folder or ".") / CARD
    return [card] if folder and is_our_card(card) else []


def is_our_card(path: Path) -> bool:
    """Whether a stage has written this README.md (minionerec/common/model_card.py)."""
    try:
        return CARD_MARK in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def move_aside(existing: Sequence[Path], folder: str | Path) -> list[tuple[Path, Path]]:
    """Rename an earlier result: into `<folder>.1`, or each file to `<file>.1`, or the next number that is free.

    Returns (where it was, where it is) of each file or folder.
    """
    number, folder = 1, str(folder).rstrip("/")
    if folder and Path(folder).name in ("", ".."):  # `.`
        folder = str(Path(folder).resolve())
    targets = [folder] if folder else existing
    while any(Path(f"{target}.{number}").exists() for target in targets):
        number += 1
    inside = {path: Path(f"{folder}.{number}", os.path.relpath(path, folder)) for path in existing} if folder else {}
    moved = [(path, inside.get(path, Path(f"{path}.{number}"))) for path in existing]
    for path, new in moved:
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    return moved


def moved_aside(path: Path) -> bool:
    """Whether a folder is an older result that was renamed to NAME.1: NAME is there, or its record was written at NAME.

    A name that only looks like that, such as sasrec_lr0.5, is the folder's own.
    """
    found = re.fullmatch(r"(.+)\.[1-9]\d{0,2}", path.name)
    options = read_record(path / RECORD).get("options") if found else None
    options = options if isinstance(options, dict) else {}
    written = [Path(str(options[name])).name for name in ("output_dir", "ckpt_dir") if options.get(name)]
    return bool(found) and path.name not in written and (found[1] in written or path.with_name(found[1]).exists())


def target_of(moved: Sequence[tuple[Path, Path]], folder: str | Path) -> str:
    """The name to print for what moved: the new folder, or the first file."""
    old, new = moved[0]
    return str(new).removesuffix("/" + os.path.relpath(old, folder)) if folder else str(new)


def note_changes(found: dict, path: Path) -> None:
    """Say what differs although the identity does not: files edited since, another version of the code."""
    for name, size in found.get("outputs", {}).items():
        if (path.parent / name).stat().st_size != size:
            note(f"{path.parent / name} was changed after this stage wrote it; the changed file is kept")
    if found.get("code") != code_version():
        note(f"made by another version of the code ({found.get('code')}); remove it to make it again")


# ------------------------------------------------------------------------------------------------ provenance


@functools.cache
def code_version() -> str:
    """A digest of the project's Python files."""
    total = hashlib.blake2b(digest_size=8)
    files = [
        *ROOT.glob("*.py"),
        *(f for room in ("minionerec", "rq", "preprocess") for f in (ROOT / room).rglob("*.py")),
    ]
    for file in sorted(files):
        total.update(file.read_bytes())
    return total.hexdigest()


@functools.cache
def commit() -> str:
    """The commit of the code, with -dirty where files differ from it; empty outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that shape results, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """The name of the GPU, or of the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
