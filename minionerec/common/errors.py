"""The one error that a user can cause."""


class UserError(Exception):
    """Invalid input. The message is one line: where, what was found, what was expected, what to do."""
