"""The pictures of the report: queries and what they found, classes taken for each other, pairs the teacher compared."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.report_images import heat_uri, mean_inside, outline_uri, photo_uri

_LOOKERS = (("teacher_attention", "Teacher"), ("pooler_attention", "Pooler"))
# verdict -> what the filter calls it
_OUTCOMES = {"wrong": "Wrong verdicts", "right": "Right verdicts", "none": "No valid answer"}


@dataclasses.dataclass(frozen=True)
class Size:
    """How large photos are stored: longer side in pixels, and JPEG quality."""

    gallery: int
    pair: int
    quality: int


def galleries_view(galleries: Sequence[Mapping[str, Any]], size: Size) -> dict[str, Any] | None:
    """Queries by their group, in order of appearance, and the classes that can be chosen."""
    if not galleries:
        return None
    counts = Counter(str(gallery["query_label"]) for gallery in galleries)
    keys = {label: f"c{i}" for i, label in enumerate(sorted(counts, key=lambda label: (label.casefold(), label)))}
    groups: dict[str, list[dict[str, Any]]] = {}
    for gallery in galleries:
        view = _gallery(gallery, size) | {"key": keys[str(gallery["query_label"])]}
        groups.setdefault(str(gallery.get("group", "")), []).append(view)
    return {
        "count": len(galleries),
        "choices": [(key, label, counts[label]) for label, key in keys.items()],
        "groups": [{"name": name, "items": items} for name, items in groups.items()],
    }


def confusions_view(confusions: Sequence[Mapping[str, Any]], size: Size) -> list[dict[str, Any]]:
    """Two classes each: how often they are taken for each other, what differs, and examples."""
    return [_confusion(confusion, size) for confusion in confusions]


def pairs_view(pairs: Sequence[Mapping[str, Any]], size: Size) -> dict[str, Any] | None:
    """Compared pairs, how the verdicts can be filtered, and where attention fell over all of them."""
    if not pairs:
        return None
    items = [_pair(pair, size) for pair in pairs]
    counts = Counter(item["outcome"] for item in items)
    return {
        "count": len(items),
        "choices": [(key, name, counts[key]) for key, name in _OUTCOMES.items() if counts[key]],
        "items": items,
        "looked": any(item["looked"] for item in items),
        "masked": any(item["masked"] for item in items),
        "inside": _inside(pairs),
    }


def _gallery(gallery: Mapping[str, Any], size: Size) -> dict[str, Any]:
    label, results = str(gallery["query_label"]), gallery["results"]
    named = results if isinstance(results, Mapping) else {"": results}
    return {
        "src": photo_uri(_photo(gallery["query"]), size.gallery, size.quality),
        "label": label,
        "alt": f"Query photo: {label}",
        "strips": [_strip(str(name), found, size) for name, found in named.items()],
        "note": str(gallery.get("note", "")),
    }


def _strip(name: str, found: Sequence[Any], size: Size) -> dict[str, Any]:
    behind = f" by {name}" if name else ""
    results = [
        {
            "src": photo_uri(_photo(photo), size.gallery, size.quality),
            "label": str(label),
            "score": f"{float(score):.3f}",
            "correct": bool(correct),
            "alt": f"Neighbour {rank}{behind}: {label}, {'same class as the query' if correct else 'another class'}",
        }
        for rank, (photo, label, score, correct) in enumerate(found, start=1)
    ]
    right = sum(bool(result["correct"]) for result in results)
    return {"name": name, "results": results, "right": f"{right} of {len(results)} right"}


def _confusion(confusion: Mapping[str, Any], size: Size) -> dict[str, Any]:
    classes, differing = [str(name) for name in confusion["classes"]], confusion.get("differing")
    count, queries = int(confusion["count"]), int(confusion["queries"])
    return {
        "classes": classes,
        "count": f"{count:,} of {queries:,} {'query' if queries == 1 else 'queries'} found the other class first",
        "differing": None
        if differing is None
        else [(str(name).replace("_", " "), str(first), str(second)) for name, first, second in differing],
        "examples": [_triple(example, size) for example in confusion["examples"]],
    }


def _triple(example: Mapping[str, Any], size: Size) -> list[dict[str, Any]]:
    """The query, the wrong photo it found first, and the nearest right one it missed (where there is one)."""
    shown = []
    for key, role in (("query", "Query"), ("wrong", "Found first"), ("missed", "Missed")):
        if example.get(key) is not None:
            photo, label = example[key]
            shown.append(
                {
                    "src": photo_uri(_photo(photo), size.gallery, size.quality),
                    "role": role,
                    "label": str(label),
                    "kind": {"query": "", "wrong": "miss", "missed": "hit"}[key],
                    "alt": f"{role}: {label}",
                }
            )
    return shown


def _pair(pair: Mapping[str, Any], size: Size) -> dict[str, Any]:
    truth, verdict = bool(pair["truth_same"]), pair["verdict_same"]
    differing = [str(name) for name in pair.get("differing_attributes") or ()]
    rows, text = _words(pair["words"], differing)
    return {
        "labels": [str(label) for label in pair["labels"]],
        "truth": "same class" if truth else "different classes",
        "verdict": "no valid answer" if verdict is None else "same class" if verdict else "different classes",
        "outcome": "none" if verdict is None else "right" if bool(verdict) == truth else "wrong",
        "photos": [_pair_photo(pair, side, size) for side in (0, 1)],
        "rows": [row for row in rows if row["told"] or row["true"]],
        "alike": [row for row in rows if not row["told"] and not row["true"]],
        "text": text,
        "differing": [name.replace("_", " ") for name in differing],
        "looked": any(pair.get(key) is not None for key, _ in _LOOKERS),
        "masked": pair.get("masks") is not None,
        "inside": _inside([pair]),
        "note": str(pair.get("note", "")),
    }


def _pair_photo(pair: Mapping[str, Any], side: int, size: Size) -> dict[str, Any]:
    label, name = pair["labels"][side], ("left", "right")[side]
    layers = []
    for key, who in _LOOKERS:
        if pair.get(key) is not None:
            alt = f"{who}'s attention over the {name} photo ({label}), brighter is more"
            layers.append({"who": who, "src": heat_uri(pair[key][side]), "alt": alt})
    masks = pair.get("masks")
    return {
        "src": photo_uri(_photo(pair["images"][side]), size.pair, size.quality),
        "label": str(label),
        "alt": f"{name.capitalize()} photo: {label}",
        "layers": layers,
        "outline": None if masks is None or masks[side] is None else outline_uri(masks[side]),
    }


def _inside(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Mean share of attention inside the masks, beside the share of the photo that they cover.

    Over the photos with a mask in which everyone looked somewhere: an answer that describes nothing has no attention.
    """
    present = [(key, who) for key, who in _LOOKERS if any(pair.get(key) is not None for pair in pairs)]
    photos = [
        (pair, side)
        for pair in pairs
        if pair.get("masks") is not None and all(pair.get(key) is not None for key, _ in present)
        for side in (0, 1)
        if np.any(pair["masks"][side]) and all(_looked(pair[key][side]) for key, _ in present)
    ]
    if not present or not photos:
        return None
    shares = [
        (who, f"{100 * mean_inside([(pair[key][side], pair['masks'][side]) for pair, side in photos]):.0f} %")
        for key, who in present
    ]
    area = mean_inside([(None, pair["masks"][side]) for pair, side in photos])
    return {"shares": shares, "area": f"{100 * area:.0f} %", "photos": len(photos)}


def _looked(weights: Any) -> bool:
    return float(np.asarray(weights).sum()) > 0


def _words(words: Any, differing: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The teacher's attributes side by side, or its raw text."""
    if words is None or isinstance(words, str):
        return [], words or "The teacher said nothing."
    sides = list(words.values()) if isinstance(words, Mapping) else list(words)
    if len(sides) != 2 or not all(isinstance(side, Mapping) for side in sides):
        raise FieldmarkError("words of a pair are neither a text nor two attribute mappings; give one of these")
    left, right = ({str(k): str(v) for k, v in side.items()} for side in sides)
    names = list(dict.fromkeys([*differing, *left, *right]))
    rows = [
        {
            "name": name.replace("_", " "),
            "left": left.get(name, "–"),
            "right": right.get(name, "–"),
            "told": left.get(name) != right.get(name),
            "true": name in differing,
        }
        for name in names
    ]
    return rows, ""


def _photo(photo: Any) -> Image.Image:
    if not isinstance(photo, Image.Image):
        raise FieldmarkError(f"a photo of the report is a {type(photo).__name__}; give an opened PIL image")
    return photo
