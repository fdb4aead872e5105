"""Why an item may have been found: what is known of it beside what it is compared with.

The student sees pixels, not attributes: these do not say what made the cosine, they say what a person would check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fieldmark.search.answers import Difference, Why
from fieldmark.search.rows import Item


def explain(items: Sequence[Item], query: Item | None = None, text: str | None = None) -> list[Why]:
    """What to say of each result.

    Args:
        items: results, best first.
        query: the query if it is an item; without it the first result is what the others are compared with.
        text: the query's text, if it has one.
    """
    return [
        compare(item, query or (items[0] if place else None), found_words(item, text))
        for place, item in enumerate(items)
    ]


def compare(item: Item, reference: Item | None, words: list[str]) -> Why:
    """Attributes that both have, by whether they are the same."""
    there: Mapping[str, str] = {} if reference is None else reference.attributes
    both = {name: value for name, value in item.attributes.items() if name in there}
    return Why(
        compared_with=None if reference is None else reference.item_id,
        same={name: value for name, value in both.items() if there[name] == value},
        different={
            name: Difference(here=value, there=there[name]) for name, value in both.items() if there[name] != value
        },
        words=words,
    )


def found_words(item: Item, text: str | None) -> list[str]:
    """Words of a text, in its order, that stand in an item's title or attributes."""
    own = set(_words(" ".join([item.title or "", *item.attributes.values()])))
    return [word for word in dict.fromkeys(_words(text or "")) if word in own]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
