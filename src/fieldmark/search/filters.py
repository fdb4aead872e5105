"""Filters that strangers write: columns, values and comparisons, nothing that computes.

LanceDB takes any SQL expression, `repeat('a', 10000000000)` too. Of a client only the words of a condition are let
through, so that a filter costs no more than reading its columns.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from fieldmark.errors import FieldmarkError

MAX_LENGTH, MAX_PARTS = 1000, 200
KEYWORDS = ("AND", "OR", "NOT", "IN", "IS", "NULL", "LIKE", "ILIKE", "BETWEEN")
_PART = re.compile(
    r"\s*(?:(?P<value>'(?:[^']|'')*'|\d+(?:\.\d+)?)|`(?P<quoted>[^`]+)`|(?P<name>[^\W\d]\w*)|(?P<sign><=|>=|<>|!=|[=<>(),]))\s*"
)


def check_filter(where: str, columns: Collection[str]) -> str:
    """The filter, if it is a condition on these columns.

    Args:
        where: such as "colour = 'red' AND label <> 'x'"; a column whose name is a word of SQL stands in `backticks`.
        columns: names that may stand in it.

    Raises:
        FieldmarkError: it is too long, or holds anything else.
    """
    parts, place = 0, 0
    name = ""
    while place < len(where):
        part = _PART.match(where, place)
        parts += 1
        if part is None or parts > MAX_PARTS:
            found = where[place : place + 20] if part is None else f"more than {MAX_PARTS} parts"
            raise _refusal(found, columns)
        if part["quoted"] is not None:
            known = part["quoted"] in columns
        elif part["name"] is not None:
            known = part["name"].upper() in KEYWORDS or part["name"].lower() in columns
        else:  # a function's call
            known = part["sign"] != "(" or not name or name.upper() in KEYWORDS
        if not known:
            raise _refusal(part[0].strip(), columns)
        name = part["quoted"] or part["name"] or ""
        place = part.end()
    return where


def _refusal(found: str, columns: Collection[str]) -> FieldmarkError:
    return FieldmarkError(
        f"The filter holds {found!r}; expected columns ({', '.join(columns)}), values in single quotes, comparisons, "
        f"brackets and {', '.join(KEYWORDS)}."
    )
