"""TODO."""


class UserError(Exception):
    """Something the user can mend. The message is one line: where, what was found, what was expected, what to do."""
