"""The parts of the report about photos and texts: teacher against student, the modality gap, candidate sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fieldmark.evaluation.group_results import WHEN, GroupResults, orders_alike
from fieldmark.evaluation.modality_gap import ModalityGap
from fieldmark.evaluation.report_images import photo_uri
from fieldmark.evaluation.report_plots import MINI_SIZE, draw_histogram, draw_scatter, mini_scatter
from fieldmark.evaluation.report_sections import Size

STUDENTS = {"before": "Untrained", "after": "Trained"}
GAP_NAMES = {
    "T0I0": "T0I0: captions 0 with photos 0, the matched set",
    "T0I1": "T0I1: captions 0 with photos 1, the mismatched set",
    "T0T0": "T0T0: captions 0 with one another",
    "I0I0": "I0I0: photos 0 with one another",
}
_MOST_CANDIDATES = 8
_BINS = 40


@dataclass(frozen=True)
class CandidateExample:
    """One candidate set of the training data; entry 0 of everything is the anchor's own match.

    Attributes:
        photos: [K + 1] small photos, the anchor's first.
        texts: [K + 1] their texts, the anchor's first.
        text_to_image: `teacher`, `before`, `after` -> [K + 1] scores of the anchor's text with each photo.
        image_to_text: the same of the anchor's photo with each text.
    """

    photos: list[Image.Image]
    texts: list[str]
    text_to_image: dict[str, list[float]]
    image_to_text: dict[str, list[float]]


def agreement_view(results: GroupResults | None) -> dict[str, Any] | None:
    """Plots of cosine against alignment score, and the rank correlation of each category, the highest first."""
    if results is None:
        return None
    bounds = {who: _bounds(getattr(results, who)) for who in ("teacher", *WHEN)}
    rows = []
    for name in results.named:
        chosen = results.rows(name)
        plots = [
            mini_scatter(results.teacher[chosen], getattr(results, when)[chosen], bounds["teacher"], bounds[when])
            for when in WHEN
        ]
        found = [results.correlation(when, name) for when in WHEN]
        rows.append(
            {
                "name": _words(name),
                "pairs": f"{4 * int(chosen.sum()):,}",
                "plots": plots,
                "values": [_rho(value) for value in found],
                "change": _change(found),
                "order": -2.0 if found[1] is None else found[1],
            }
        )
    return {
        "plots": [
            draw_scatter(
                STUDENTS[when],
                results.teacher,
                getattr(results, when),
                f"ρ = {_rho(results.correlation(when))}",
            )
            for when in WHEN
        ],
        "rows": sorted(rows, key=lambda row: -row["order"]),
        "mini": MINI_SIZE,
        "pairs": f"{results.teacher.size:,}",
        "groups": f"{len(results.teacher):,}",
    }


def categories_view(categories: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any] | None:
    """Group scores of each category, a bar for each model; the last model's best categories first.

    Args:
        categories: model -> category -> `group_score`, `text_score`, `image_score`, `n_groups`.
    """
    models = list(categories)
    names = sorted({name for of_model in categories.values() for name in of_model})
    if not names:
        return None
    last = categories[models[-1]]
    names.sort(key=lambda name: (-last.get(name, {}).get("group_score", -1.0), name))
    return {
        "models": models,
        "rows": [
            {
                "name": _words(name),
                "groups": f"{next(int(one[name]['n_groups']) for one in categories.values() if name in one):,}",
                "bars": [_bar(model, i, categories[model].get(name)) for i, model in enumerate(models)],
            }
            for name in names
        ],
    }


def gap_view(gaps: Mapping[str, ModalityGap], results: GroupResults | None) -> list[dict[str, Any]]:
    """Of each student the distributions behind the gap, and those of the pairs inside groups."""
    if not gaps:
        return []
    views = []
    for when, gap in gaps.items():
        found = {words: gap.densities[name] for name, words in GAP_NAMES.items()}
        facts = (("W_dist", gap.w_dist), ("W_disc", gap.w_disc), ("ratio", gap.ratio))
        plots = [draw_histogram("All pairs", gap.edges, found, facts)]
        if results is not None:
            plots.append(_inside_groups(getattr(results, when)))
        views.append({"name": STUDENTS[when], "plots": plots})
    return views


def candidates_view(examples: Sequence[CandidateExample], size: Size) -> list[dict[str, Any]]:
    """Candidate sets: photos in three orders, and texts with three scores each in the teacher's order."""
    return [_example(example, size) for example in examples]


def _inside_groups(cosines: np.ndarray) -> Any:
    own, crossed = cosines[:, [0, 1], [0, 1]].ravel(), cosines[:, [0, 1], [1, 0]].ravel()
    low, high = float(cosines.min()), float(cosines.max())
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS // 2 + 1)
    found = {"own caption": own, "the group's other caption": crossed}
    densities = {name: np.histogram(values, edges, density=True)[0] for name, values in found.items()}
    return draw_histogram(
        "Pairs inside groups", edges, densities, [("difference of means", own.mean() - crossed.mean())]
    )


def _bounds(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _bar(model: str, number: int, scores: Mapping[str, float] | None) -> dict[str, Any]:
    if scores is None:
        return {"model": model, "number": number % 5, "text": "–", "share": 0.0, "note": ""}
    parts = f"text {100 * scores['text_score']:.0f}, image {100 * scores['image_score']:.0f}"
    share = 100 * scores["group_score"]
    return {"model": model, "number": number % 5, "text": f"{share:.0f}", "share": round(share, 1), "note": parts}


def _example(example: CandidateExample, size: Size) -> dict[str, Any]:
    uris = [photo_uri(photo, size.gallery, size.quality) for photo in example.photos]
    anchor = example.texts[0]
    scores = example.image_to_text
    ranks = {who: _ranks(values) for who, values in scores.items()}
    order = _order(scores["teacher"])
    return {
        "src": uris[0],
        "text": anchor,
        "alt": f"Anchor: {anchor}",
        "strips": [_strip(example, who, uris) for who in ("teacher", *WHEN)],
        "texts": [
            {
                "text": example.texts[i],
                "own": i == 0,
                "scores": [(f"{scores[who][i]:.3f}", ranks[who][i]) for who in ("teacher", *WHEN)],
            }
            for i in order[:_MOST_CANDIDATES]
        ],
        "alike": [_alike(scores, when) for when in WHEN],
    }


def _strip(example: CandidateExample, who: str, uris: Sequence[str]) -> dict[str, Any]:
    scores = example.text_to_image
    values = scores[who]
    order = _order(values)
    name = {"teacher": "Teacher", "before": "Untrained student", "after": "Trained student"}[who]
    left_out = f", first {_MOST_CANDIDATES} of {len(order)}" if len(order) > _MOST_CANDIDATES else ""
    note = "alignment score" if who == "teacher" else f"cosine; {_alike(scores, who)}"
    return {
        "name": name,
        "note": note + left_out,
        "texts": who == "teacher",
        "results": [
            {
                "src": uris[i],
                "text": example.texts[i],
                "own": i == 0,
                "score": f"{values[i]:.3f}",
                "alt": f"{name}, rank {rank}{', the anchor itself' if i == 0 else ''}: {example.texts[i]}",
            }
            for rank, i in enumerate(order[:_MOST_CANDIDATES], start=1)
        ],
    }


def _alike(scores: Mapping[str, Sequence[float]], when: str) -> str:
    right, pairs = orders_alike(scores["teacher"], scores[when])
    return f"{right} of {pairs} pairs in the teacher's order"


def _order(values: Sequence[float]) -> list[int]:
    """The highest first, of equal ones the earlier."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def _ranks(values: Sequence[float]) -> list[int]:
    """1 for the highest; equal values share the better rank."""
    return [1 + sum(other > value for other in values) for value in values]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _rho(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _change(found: Sequence[float | None]) -> str:
    before, after = found
    return "–" if before is None or after is None else f"{after - before:+.2f}".replace("-", "−")
