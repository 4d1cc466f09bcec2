"""TODO."""

import sys
import traceback
from collections.abc import Callable

from transformers.hf_argparser import HfArgumentParser

from minionerec.common.errors import UserError
from minionerec.common.processes import leave_group


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


def run(main: Callable, options_class: type) -> None:
    """Parse the command line into `options_class`, call `main`, and turn a `UserError` into one line and exit code 2.

    `--debug` shows the traceback instead.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        parser = _Parser(options_class, allow_abbrev=False)
        options, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown option {unknown[0]}")
        main(options)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        leave_group(2)
        sys.exit(2)
    leave_group(0)
