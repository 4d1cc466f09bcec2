"""Command-line options from a dataclass: the one place that holds an option's name, type, default and help.

    @dataclass
    class Options(StageOptions):
        train_file: str = option("", "train CSV", role=INPUT)
        lr: float = option(1e-3, "peak learning rate", aliases=["--learning_rate"])
        output_dir: str = option("", "folder for the checkpoint", role=OUTPUT)

    if __name__ == "__main__":
        run(main, Options)

A role says what an option means for the result (`minionerec.common.runs`):

    SETTING   its value shapes the result (default)
    INPUT     a path; the content of the file or folder shapes the result, its name does not
    OUTPUT    a path that the stage writes
    RUNTIME   neither: logging, batch sizes of evaluation, devices, resuming

Started by a launcher (`shell/launcher.sh`), a script also reads options from environment variables: the option
`--learning_rate` from `LEARNING_RATE`. An empty variable means the default; the command line overrides variables.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import shlex
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minionerec.common import console
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.processes import end_with_launcher, leave_group, report_error

SETTING, INPUT, OUTPUT, RUNTIME = "setting", "input", "output", "runtime"
MOST_WEIGHT = 1000  # of a model in a blend or of a part of fused embeddings: no sum overflows
MOST = 2**31 - 1  # the largest integer of an option; libraries hold such numbers in 32 bits
MOST_FLOAT = 1e30  # products with it stay finite in 32 bits for a while; what diverges is named where it does
WITHDRAWALS: list[Callable[[], None]] = []  # undo what a refused start has written; `minionerec.common.runs` adds to it


def option(default, help: str, *, role: str = SETTING, aliases: Sequence[str] = ()):
    """A dataclass field for one option. A list as `default` makes an option of several values."""
    value = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata={"help": help, "role": role, "aliases": tuple(aliases)}, **value)


def role_of(field: dataclasses.Field) -> str:
    """The role of a field made by `option`; `SETTING` for any other field."""
    return field.metadata.get("role", SETTING)


@dataclass
class StageOptions:
    """What every stage takes, and the checks that every stage shares."""

    overwrite: bool = option(
        False, "move a result with other settings aside (to NAME.1) instead of refusing to start", role=RUNTIME
    )
    verbose: bool = option(False, "print details and all warnings of libraries", role=RUNTIME)
    quiet: bool = option(False, "print only results, notes and errors", role=RUNTIME)

    def __post_init__(self):
        if self.verbose and self.quiet:
            raise UserError("--verbose True and --quiet True exclude each other; choose one")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise UserError(f"--{field.name} {value}: expected a finite number")
            if any(isinstance(number, float) and abs(number) > MOST_FLOAT for number in numbers):
                raise UserError(f"--{field.name} {value}: expected at most {MOST_FLOAT:.0e}")
            if field.name != "seed" and any(isinstance(number, int) and abs(number) > MOST for number in numbers):
                raise UserError(f"--{field.name} {value}: expected at most {MOST}")
        if not 0 <= getattr(self, "seed", 0) < 2**32:
            raise UserError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")

    def check(self, **rules: tuple[bool, str]) -> None:
        """Raise `UserError` for the first option whose rule, (holds, what is expected), does not hold."""
        for name, (holds, expected) in rules.items():
            if not holds:
                raise UserError(f"--{name} {getattr(self, name)}: expected {expected}")

    def plain_names(self, *names: str) -> None:
        """Raise `UserError` for the first of the options `names` that cannot be part of a file name."""
        for name in names:
            value = getattr(self, name)
            expected = "a plain name, without slashes, tabs and line ends, which becomes part of file names"
            self.check(**{name: (not {*value} & {*"/\t\r\n\0"}, expected)})

    def at_least(self, least: float, *names: str) -> None:
        """Raise `UserError` for the first of the options `names` below `least`."""
        self.check(**{name: (getattr(self, name) >= least, f"at least {least}") for name in names})

    def require(self, *names: str) -> None:
        """Raise `UserError` for the first of the options `names` that is empty, or an input that does not exist."""
        roles = {field.name: role_of(field) for field in dataclasses.fields(self)}
        for name in names:
            if roles[name] == INPUT:
                require_file(getattr(self, name), name)
            elif not getattr(self, name):
                raise UserError(f"--{name} is required")


def is_weight(text: str) -> bool:
    """Whether `text` is a number from 0 to `MOST_WEIGHT`."""
    try:
        return 0 <= float(text) <= MOST_WEIGHT
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------ parsing


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One line of names per option, with its type or choices; no empty default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(name for name in action.option_strings if "-" not in name[2:])
        if action.nargs == 0:
            return names
        kind = "|".join(map(str, action.choices)) if action.choices else action.type.__name__
        return f"{names} {kind}{' …' * (action.nargs == '+')}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in ("", []) else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        module = getattr(sys.modules["__main__"].__spec__, "name", "")  # of python -m
        command = f"python -m {module}" if module else self.prog
        raise UserError(f"{self.prog}: {message}; `{command} --help` lists the options")


def _bool(text: str) -> bool:
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")


_bool.__name__ = "True|False"  # for --help


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: type) -> None:
    """Add the option of one field: `--some_name`, `--some-name`, its aliases, and for a true default `--no_some_name`."""
    names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}", *field.metadata["aliases"]])
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if types.NoneType in typing.get_args(kind):  # bool | None
        [kind] = set(typing.get_args(kind)) - {types.NoneType}
    keywords = {"type": kind}
    if kind is bool:
        keywords = {"type": _bool, "nargs": "?", "const": True}
    elif typing.get_origin(kind) is list:
        keywords = {"type": typing.get_args(kind)[0], "nargs": "+"}
    elif typing.get_origin(kind) is typing.Literal:
        keywords = {"type": str, "choices": typing.get_args(kind)}
    help = field.metadata["help"].replace("%", "%%")
    parser.add_argument(*names, dest=field.name, default=default, help=help, **keywords)
    if default is True:
        names = dict.fromkeys([f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"])
        parser.add_argument(*names, dest=field.name, action="store_false", help=argparse.SUPPRESS, default=True)


def arguments_from_variables(options_class: type, variables: Mapping[str, str]) -> list[str]:
    """Command-line arguments for every option (or alias) whose upper-case name is a non-empty variable.

    The parts of a list stand between blanks; a part that has blanks is quoted, as in a shell.
    """
    arguments = []
    for field in dataclasses.fields(options_class):
        names = [field.name, *(alias.lstrip("-") for alias in field.metadata.get("aliases", ()))]
        for name in reversed(names):  # the option's own name overrides its aliases
            value = variables.get(name.upper(), "")
            if value and field.default_factory is not dataclasses.MISSING:
                try:
                    arguments += [f"--{field.name}", *shlex.split(value)]
                except ValueError as error:
                    raise UserError(f"{name.upper()} is {value!r}, expected parts between blanks ({error})") from None
            elif value:
                arguments.append(f"--{field.name}={value}")
    return arguments


def parse(options_class: type, arguments: Sequence[str]):
    """An instance of `options_class`. Raises `UserError` for unknown options and invalid values."""
    if os.environ.get("MINIONEREC_VARIABLES"):
        arguments = [*arguments_from_variables(options_class, os.environ), *arguments]
    parser = _Parser(
        allow_abbrev=False,
        usage="%(prog)s [--OPTION VALUE …]",
        description=(sys.modules["__main__"].__doc__ or "").split("\n\n")[0].replace("%", "%%"),
        epilog="An error prints one line and exits with code 2; --debug adds the traceback.",
        formatter_class=_Help,
    )
    kinds = typing.get_type_hints(options_class)
    common = {field.name for field in dataclasses.fields(StageOptions)}  # listed last
    for field in sorted(dataclasses.fields(options_class), key=lambda field: field.name in common):
        _add(parser, field, kinds[field.name])
    options, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    return options_class(**vars(options))


def run(main: Callable, options_class: type) -> None:
    """Parse the command line, call `main(options)`, and turn an error of the user into one line and exit code 2.

    `--debug` also prints the traceback.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    WITHDRAWALS.clear()
    end_with_launcher()
    try:
        options = parse(options_class, arguments)
        console.configure(getattr(options, "verbose", False), getattr(options, "quiet", False))
        main(options)
    except KeyboardInterrupt:
        leave_group(130)
        sys.exit(130)
    except BrokenPipeError:  # `… | head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        report_error(message)
        withdraw()
        leave_group(2)
        sys.exit(2)
    leave_group(0)


def withdraw() -> None:
    """Take back what a refused start has written, the last first; a disk that allows no writing keeps it."""
    for undo in reversed(WITHDRAWALS):
        with contextlib.suppress(OSError):
            undo()


def message_of(error: Exception) -> str | None:
    """The line to print for an error that a user can cause; None for a defect of this program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; check the path, its permissions and the free disk space"
    reason = (str(error).splitlines() or [""])[0]
    torch = sys.modules.get("torch")
    out_of_memory = isinstance(error, MemoryError) or torch and isinstance(error, torch.OutOfMemoryError)
    if out_of_memory or isinstance(error, RuntimeError) and "allocate memory" in reason:
        return f"not enough memory ({reason}); take smaller batches, shorter histories or a smaller model"
    polars, safetensors = sys.modules.get("polars"), sys.modules.get("safetensors")
    if polars and isinstance(error, polars.exceptions.PolarsError):
        return f"a table could not be read or written: {reason}; check the files and the free disk space"
    if safetensors and isinstance(error, safetensors.SafetensorError):
        return f"a file of weights could not be read or written: {reason}; check the checkpoint and the free disk space"
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in reason or "inline_container" in reason):
        return f"a file of weights could not be written: {reason}; check the free disk space"
    return None
