"""The parts of the report about a generator's attributes: what they bring, how they changed, what they weigh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from fieldmark.evaluation.report_charts import number_text
from fieldmark.evaluation.report_images import photo_uri
from fieldmark.evaluation.report_sections import Size

_MOST_NAMES = 24


@dataclass(frozen=True)
class EnrichedQueries:
    """What queries find with the attributes of one generator in them.

    Attributes:
        generator: its name.
        plain: their R@1 without attributes.
        recall: with them.
        seconds: an answer of the generator; None where it was not measured.
        valid: share of its answers.
    """

    generator: str
    plain: float
    recall: float
    seconds: float | None
    valid: float


@dataclass(frozen=True)
class ChangedNames:
    """How many items each attribute was named for, by two generators.

    Attributes:
        before: name to items, of the first generator.
        after: of the second.
        items: items that each gave a valid answer about.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    items: tuple[int, int]


@dataclass(frozen=True)
class TwoAnswers:
    """What two generators said of one item: what they thought first, and the attributes."""

    photo: Image.Image
    title: str
    thoughts: tuple[str, str]
    attributes: tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Negative:
    """An item of another product near a query.

    Attributes:
        photo: its photo.
        title: its title.
        cosine: of the query and it.
        raised: tanh(BM25) of their attributes.
        shared: words of both, the rarest first.
    """

    photo: Image.Image
    title: str
    cosine: float
    raised: float
    shared: Sequence[str]


@dataclass(frozen=True)
class HardQuery:
    """A query, the cosine of its own match, and the nearest items of other products."""

    photo: Image.Image
    title: str
    attributes: Mapping[str, Any]
    own: float
    negatives: Sequence[Negative]


@dataclass(frozen=True)
class MaskedPair:
    """A query, its own match and an item of another product that is taken for the same; title and photo of each."""

    titles: tuple[str, str, str]
    photos: tuple[Image.Image, Image.Image, Image.Image]
    own: float
    other: float


@dataclass(frozen=True)
class Negatives:
    """What a trained embedder makes of the negatives of a sample of its training items.

    Attributes:
        items: items looked at.
        queries: of them, those with a match to find.
        delta: margin of the mask.
        hard: some queries with their nearest negatives.
        masked: some masked pairs, the one furthest above the margin first.
        n_masked: masked pairs in all.
        n_pairs: pairs of a query and a negative in all.
        margin: the most by which a negative is nearer than the query's match.
    """

    items: int
    queries: int
    delta: float
    hard: Sequence[HardQuery]
    masked: Sequence[MaskedPair]
    n_masked: int
    n_pairs: int
    margin: float


@dataclass(frozen=True)
class AttributeFindings:
    """All of these parts; one that is empty is left out."""

    enriched: Sequence[EnrichedQueries] = ()
    names: ChangedNames | None = None
    answers: Sequence[TwoAnswers] = ()
    negatives: Negatives | None = None


def enriched_view(rows: Sequence[EnrichedQueries]) -> list[dict[str, str]]:
    """A row for the queries without attributes, then one a generator: R@1, its gain in points, and its cost."""
    if not rows:
        return []
    first = {"name": "no attributes", "recall": _percent(rows[0].plain), "gain": "–", "seconds": "–", "valid": "–"}
    return [first] + [
        {
            "name": row.generator,
            "recall": _percent(row.recall),
            "gain": _points(row.recall - row.plain, 1),
            "seconds": "–" if row.seconds is None else f"{number_text(row.seconds)} s",
            "valid": f"{_percent(row.valid)} %",
        }
        for row in rows
    ]


def names_view(names: ChangedNames | None) -> dict[str, Any] | None:
    """Attributes by the share of items that they were named for, those that changed most first."""
    if names is None:
        return None
    shares = {
        name: tuple(
            counts.get(name, 0) / max(items, 1)
            for counts, items in zip((names.before, names.after), names.items, strict=True)
        )
        for name in {**names.before, **names.after}
    }
    order = sorted(shares, key=lambda name: (-abs(shares[name][1] - shares[name][0]), name))
    return {
        "rows": [
            {
                "name": name,
                "fate": _fate(names.before.get(name, 0), names.after.get(name, 0)),
                "cells": [
                    {"count": f"{counts.get(name, 0):,}", "share": round(100 * share, 1)}
                    for counts, share in zip((names.before, names.after), shares[name], strict=True)
                ],
                "change": _points(shares[name][1] - shares[name][0], 0),
            }
            for name in order[:_MOST_NAMES]
        ],
        "left_out": max(0, len(order) - _MOST_NAMES),
        "items": [f"{count:,}" for count in names.items],
        "mean": [
            number_text(round(sum(counts.values()) / max(items, 1), 2))
            for counts, items in zip((names.before, names.after), names.items, strict=True)
        ],
    }


def answers_view(answers: Sequence[TwoAnswers], size: Size) -> list[dict[str, Any]]:
    """Items with both answers side by side."""
    return [
        {
            "src": photo_uri(one.photo, size.gallery, size.quality),
            "title": one.title,
            "alt": f"Item: {one.title}",
            "thoughts": one.thoughts,
            "rows": [
                {
                    "name": name,
                    "values": [_value(own.get(name)) for own in one.attributes],
                    "told": one.attributes[0].get(name) != one.attributes[1].get(name),
                }
                for name in dict.fromkeys([*one.attributes[0], *one.attributes[1]])
            ],
        }
        for one in answers
    ]


def negatives_view(found: Negatives | None, size: Size) -> dict[str, Any] | None:
    """Queries with their nearest negatives, masked pairs, and how many there are."""
    if found is None:
        return None
    return {
        "items": f"{found.items:,}",
        "queries": f"{found.queries:,}",
        "delta": number_text(found.delta),
        "margin": f"{found.margin:+.3f}".replace("-", "−"),
        "n_masked": f"{found.n_masked:,}",
        "n_pairs": f"{found.n_pairs:,}",
        "hard": [_hard(one, size) for one in found.hard],
        "masked": [_masked(one, size) for one in found.masked],
    }


def _hard(query: HardQuery, size: Size) -> dict[str, Any]:
    return {
        "src": photo_uri(query.photo, size.gallery, size.quality),
        "title": query.title,
        "alt": f"Query: {query.title}",
        "attributes": "; ".join(f"{name}: {_value(value)}" for name, value in query.attributes.items()),
        "own": f"{query.own:.3f}",
        "results": [
            {
                "src": photo_uri(one.photo, size.gallery, size.quality),
                "title": one.title,
                "alt": f"Negative {rank}: {one.title}",
                "cosine": f"{one.cosine:.3f}",
                "raised": f"{one.raised:.2f}",
                "shared": ", ".join(one.shared),
            }
            for rank, one in enumerate(query.negatives, start=1)
        ],
    }


def _masked(pair: MaskedPair, size: Size) -> list[dict[str, str]]:
    notes = ("", f"cosine {pair.own:.3f}", f"cosine {pair.other:.3f}")
    return [
        {
            "src": photo_uri(photo, size.gallery, size.quality),
            "role": role,
            "title": title,
            "note": note,
            "alt": f"{role}: {title}",
        }
        for photo, role, title, note in zip(
            pair.photos, ("Query", "Its match", "Left out"), pair.titles, notes, strict=True
        )
    ]


def _points(difference: float, digits: int) -> str:
    """A difference of shares in points of a per cent; none has no sign."""
    text = f"{100 * difference:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _fate(before: int, after: int) -> str:
    return "dropped" if not after else "new" if not before else ""


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
