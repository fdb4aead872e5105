"""The report: one HTML file that needs no network, shows what runs did, and can be forwarded.

Everything is inside the file: style, charts as SVG, photos as data URIs, and one short script that filters; without it
everything is shown. The page's own policy lets nothing else load or run. Photos are made smaller until the file fits
in 5 MB.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.group_results import GroupResults
from fieldmark.evaluation.modality_gap import ModalityGap
from fieldmark.evaluation.report_attributes import (
    AttributeFindings,
    answers_view,
    enriched_view,
    names_view,
    negatives_view,
)
from fieldmark.evaluation.report_charts import HEIGHT, WIDTH, draw_chart
from fieldmark.evaluation.report_image_text import (
    CandidateExample,
    agreement_view,
    candidates_view,
    categories_view,
    gap_view,
)
from fieldmark.evaluation.report_images import RAMP
from fieldmark.evaluation.report_sections import Size, confusions_view, galleries_view, pairs_view
from fieldmark.evaluation.report_table import bars_view, facts_view, table_view

MAX_BYTES = 5_000_000
# Tried in this order until the page fits.
_SIZES = (
    Size(224, 320, 82),
    Size(176, 256, 76),
    Size(144, 208, 70),
    Size(112, 160, 62),
    Size(80, 112, 52),
    Size(56, 96, 45),
    Size(40, 72, 40),
)


def write_report(
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    table: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    curves: Mapping[str, Any] | None = None,
    attributes: AttributeFindings | None = None,
    categories: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    groups: GroupResults | None = None,
    gaps: Mapping[str, ModalityGap] | None = None,
    candidates: Sequence[CandidateExample] = (),
    galleries: Sequence[Mapping[str, Any]] = (),
    confusions: Sequence[Mapping[str, Any]] = (),
    differing: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    pairs: Sequence[Mapping[str, Any]] = (),
    health: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the report. A part that is empty is left out.

    Args:
        path: the HTML file.
        title: headline.
        subtitle: a short paragraph: what was trained on what, how, and what came out.
        table: one row per model: `model` (its name) and metrics under the keys of `retrieval_metrics` and
            `clustering_metrics`; a metric may be a number, (mean, spread) or {"value", "spread", "interval"}, and
            `x_std` is shown as the spread of `x`.
        notes: sentences below the table, such as those of paired tests.
        curves: per chart a list of (step, value), or a mapping from series names to such lists.
        attributes: what a generator's attributes bring, how they changed, and what they weigh.
        categories: model -> category of groups -> its `group_scores`, the last model's best ones come first.
        groups: what each test group scored with the teacher and the student, for plots of one against the other.
        gaps: `before` and `after` training: the student's modality gap.
        candidates: candidate sets of the training data, in the orders of teacher and student.
        galleries: per query `query` (photo), `query_label`, `results` (list of (photo, label, score, correct), or a
            mapping from models to such lists), and optionally `group` (a heading) and `note`.
        confusions: per pair of classes `classes` (two names), `count` of `queries`, `differing` (list of (attribute,
            value of the first, value of the second), or None where attributes are not known), and `examples`: each
            with `query`, `wrong`, and optionally `missed`, a (photo, label) each.
        differing: model -> rows of `recall_by_differing_attributes`.
        pairs: per pair `images` (two photos), `labels` (two), `truth_same` (bool), `verdict_same` (bool, or None where
            the teacher gave no valid answer), `words` (two attribute mappings, or the teacher's raw text), and
            optionally `teacher_attention`, `pooler_attention` (two [h, w] arrays or token vectors each), `masks` (two
            [h, w] arrays, true on the part that differs), `differing_attributes` (names) and `note`.
        health: name -> value, or name -> {"value": ..., "note": ...}.
        settings: name -> value, nested mappings allowed.
        cost: name -> value, such as minutes and memory.

    Returns:
        The path written.

    Raises:
        FieldmarkError: the file would exceed 5 MB even with the smallest photos, or an entry is malformed.
    """
    environment = Environment(
        loader=PackageLoader("fieldmark.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    script = _packaged("report.js")
    named = attributes or AttributeFindings()
    fixed = {
        "style": Markup(_packaged("report.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "ramp": ", ".join(f"rgb{colour}" for colour in RAMP),
        "title": title,
        "subtitle": subtitle,
        "table": table_view(table),
        "notes": list(notes),
        "charts": _charts(curves or {}),
        "chart_size": (WIDTH, HEIGHT),
        "enriched": enriched_view(named.enriched),
        "changed_names": names_view(named.names),
        "categories": categories_view(categories or {}),
        "agreement": agreement_view(groups),
        "gap": gap_view(gaps or {}, groups),
        "differing": bars_view(differing or {}),
        "health": facts_view(health or {}),
        "settings": facts_view(settings or {}),
        "cost": facts_view(cost or {}),
    }
    for size in _SIZES:
        pictures = {
            "two_answers": answers_view(named.answers, size),
            "negatives": negatives_view(named.negatives, size),
            "candidates": candidates_view(candidates, size),
            "galleries": galleries_view(galleries, size),
            "confusions": confusions_view(confusions, size),
            "pairs": pairs_view(pairs, size),
        }
        page = template.render(fixed | pictures).encode("utf-8")
        if len(page) <= MAX_BYTES:
            break
    else:
        raise FieldmarkError(
            f"the report would take {len(page) / 1e6:.1f} MB with {len(galleries)} galleries, {len(confusions)} "
            f"confused classes, {len(candidates)} candidate sets and {len(pairs)} pairs; it must stay within "
            "5 MB: show fewer"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page)
    return path


def _packaged(name: str) -> str:
    """A file beside this one, as it stands in the page."""
    return resources.files("fieldmark.evaluation").joinpath(name).read_text(encoding="utf-8")


def _charts(curves: Mapping[str, Any]) -> list[Any]:
    drawn = [
        draw_chart(name, points if isinstance(points, Mapping) else {"": points}) for name, points in curves.items()
    ]
    return [chart for chart in drawn if chart is not None]
