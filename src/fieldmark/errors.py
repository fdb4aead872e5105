"""The one exception class of the project."""

from __future__ import annotations


class FieldmarkError(Exception):
    """A user's mistake or a broken input: says what was given, what was expected and what to do.

    The command line prints it as one sentence on stderr and exits with code 2.
    """
