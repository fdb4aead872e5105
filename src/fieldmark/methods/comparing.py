"""The page of `fieldmark compare --html`: groups of runs side by side, in numbers and in the photos they found.

Numbers come from the run folders. Photos come from the catalogue that the runs name and from two trained students: one
seed of the first group and one of the last. The teacher is not asked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fieldmark.data.catalog import select_split
from fieldmark.data.options import CatalogOptions, read_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.comparison import GroupQueries, group_queries, runs_without_queries, same_queries
from fieldmark.evaluation.confusions import recall_by_differing_attributes
from fieldmark.evaluation.examples import Thumbnails, confusions, differing_galleries, galleries
from fieldmark.evaluation.report import write_report
from fieldmark.evaluation.retrieval import PerQuery, retrieval_per_query
from fieldmark.evaluation.runs import COMPARED, Group, Run
from fieldmark.evaluation.student import KEPT_NEIGHBOURS, embed_catalog
from fieldmark.evaluation.uncertainty import p_text, paired_test
from fieldmark.methods.reporting import (
    COUNTS,
    LOSSES,
    R1_IN_WORDS,
    FinishedRun,
    cost,
    counted_photos,
    curves,
    health,
    on_r1,
    percent,
    student_words,
)
from fieldmark.progress import JobProgress
from fieldmark.students.build import load_student


def write_comparison(groups: Sequence[Group], path: Path) -> Path:
    """Writes one HTML file about groups of runs; returns its path.

    Args:
        groups: of `group_runs`, in the order of the table. The photos show the first one's student against the last
            one's, both of their first seed.
        path: the file.

    Raises:
        FieldmarkError: the catalogue or a student of these runs cannot be read.
    """
    named = dict(zip(group_names(groups), groups, strict=True))
    queries = [group_queries(group) for group in groups]
    names = list(named)
    shown = {name: named[name] for name in (names[0], names[-1])}
    finished = {name: [FinishedRun.read(run.folder) for run in group.runs] for name, group in named.items()}
    for group in shown.values():
        _check_model(group.runs[0])
    test = _common_photos(list(shown.values()))
    labels, attributes, photos = list(test["label"]), list(test["attributes"]), Thumbnails(test)
    vectors = {name: _vectors(group.runs[0], test) for name, group in shown.items()}
    found = {name: _search(embeddings, test) for name, embeddings in vectors.items()}
    logs = {name: [run.log for run in runs] for name, runs in finished.items()}
    return write_report(
        path,
        title=" and ".join(named) if len(named) < 3 else f"{len(named)} trainings compared",
        subtitle=_summary(named, queries, test),
        table=_table(named, queries),
        notes=_notes(named, queries, shown),
        curves=curves(logs),
        galleries=_galleries(found, labels, photos),
        confusions=confusions(found[names[-1]], labels, attributes, vectors[names[-1]], photos),
        differing={name: recall_by_differing_attributes(one, labels, attributes) for name, one in found.items()},
        health=health(logs),
        settings=gathered_settings(finished),
        cost=cost(finished),
    )


def group_names(groups: Sequence[Group]) -> list[str]:
    """A short name of each group that tells it from the others: method and loss, then the settings that differ."""
    names = []
    for group in groups:
        words = [_method_words(group)]
        if len({other.settings.get("pooling") for other in groups}) > 1:
            words.append(f"{group.settings.get('pooling')} pooling")
        if len({other.steps for other in groups}) > 1:
            words.append(group.steps)
        words += [f"{key.replace('_', ' ')} {value}" for key, value in group.differs.items() if key != "preference"]
        if len({other.settings.get("data") for other in groups}) > 1:
            words.append(f"on {group.settings.get('data')}")
        names.append(", ".join(words))
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)]


def _method_words(group: Group) -> str:
    """Method and loss, or the preferences that stand beside contrast."""
    if group.method == "maple":
        preference = group.settings.get("preference")
        return "Contrast alone" if preference == "none" else f"MAPLE, {preference}"
    loss = str(group.settings.get("loss"))
    return ("" if group.method == "metric" else f"{group.method.upper()} over ") + LOSSES.get(loss, loss)


def measured_photos(run: Run) -> datasets.Dataset:
    """The photos that a run was measured on, read as its `config.yaml` says.

    Raises:
        FieldmarkError: they cannot be read; names the run.
    """
    names = {field.name for field in fields(CatalogOptions)}
    try:
        catalog, _ = read_catalog(CatalogOptions(**{key: run.settings[key] for key in names & run.settings.keys()}))
        return select_split(catalog, "test")
    except FieldmarkError as error:
        raise FieldmarkError(
            f"The page shows test photos, and those of the run {run.folder} cannot be read ({error}); run `compare` "
            "where the run was trained, or without --html."
        ) from error


def _common_photos(groups: Sequence[Group]) -> datasets.Dataset:
    tests = [measured_photos(group.runs[0]) for group in groups]
    if any(list(test["item_id"]) != list(tests[0]["item_id"]) for test in tests[1:]):
        raise FieldmarkError(
            f"The runs {groups[0].runs[0].folder} and {groups[-1].runs[0].folder} were measured on different photos, "
            "and the page shows the same queries of both; give runs on the same data, or leave --html out."
        )
    return tests[0]


def _check_model(run: Run) -> None:
    if not (run.folder / "model" / "modules.json").is_file():
        raise FieldmarkError(
            f"The page shows what a student found, and the run {run.folder} has no model/; give a run that kept it, "
            "or leave --html out."
        )


def _vectors(run: Run, test: datasets.Dataset) -> np.ndarray:
    with JobProgress(f"photos of {run.folder}", len(test)) as job:
        return embed_catalog(load_student(run.folder / "model"), test, progress=job.update)


def _search(embeddings: np.ndarray, test: datasets.Dataset) -> PerQuery:
    return retrieval_per_query(embeddings, list(test["label"]), roles=list(test["role"]), k=KEPT_NEIGHBOURS)


def _galleries(found: Mapping[str, PerQuery], labels: Sequence[Any], photos: Thumbnails) -> list[dict[str, Any]]:
    if len(found) == 1:
        return galleries(next(iter(found.values())), labels, photos)
    return differing_galleries(found, labels, photos)


def _summary(named: Mapping[str, Group], queries: Sequence[GroupQueries | None], test: datasets.Dataset) -> str:
    """What was compared on what, and who was better on how many queries."""
    settings = [group.settings for group in named.values()]
    students = " or ".join(dict.fromkeys(student_words(one) for one in settings))
    data = " or ".join(dict.fromkeys(str(one["data"]) for one in settings))
    counts = [f"{name} ({group.steps}, {seeds_text(group)})" for name, group in named.items()]
    sentences = [
        f"{students} was trained on {data}: {'; '.join(counts)}.",
        f"It was measured on {counted_photos(test)} that it had not been trained on.",
    ]
    if len(named) > 1 and same_queries(queries, len(named) - 1):
        first, last = queries[0], queries[-1]
        assert first is not None
        assert last is not None
        ours, theirs = last.values["after"]["recall@1"], first.values["after"]["recall@1"]
        names, paired = list(named), paired_test(ours, theirs)
        low, high = (percent(bound) for bound in paired.interval)
        sentences.append(
            f"R@1, {R1_IN_WORDS}, is {percent(float(theirs.mean()))} % with {names[0]} and "
            f"{percent(float(ours.mean()))} % with {names[-1]}, a difference of {percent(paired.difference)} "
            f"points (95 % interval {low} to {high}): better on {paired.better:,} queries, worse on {paired.worse:,}, "
            f"equal on {paired.same:,} ({p_text(paired.p_value)})."
        )
    return " ".join(sentences)


def seeds_text(group: Group) -> str:
    """Such as "3 seeds"."""
    return f"{len(group.runs)} seed" + "s" * (len(group.runs) != 1)


def _table(named: Mapping[str, Group], queries: Sequence[GroupQueries | None]) -> list[dict[str, Any]]:
    """A row for each group after training, and before it one for each different start."""
    starts: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = []
    for (name, group), one in zip(named.items(), queries, strict=True):
        bounds = {} if one is None else one.intervals()
        start = _cells(group, "before", bounds)
        starts.setdefault(tuple(group.spread("before", metric) for metric in COMPARED), {"model": name, **start})
        rows.append({"model": name, **_cells(group, "after", bounds)})
    alone = len(starts) == 1
    before = [row | {"model": "untrained" if alone else f"{row['model']}: untrained"} for row in starts.values()]
    return [*before, *rows]


def _cells(group: Group, when: str, bounds: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for metric in COMPARED:
        mean, spread = group.spread(when, metric)
        cells[metric] = {"value": mean, "spread": spread, "interval": bounds.get(when, {}).get(metric)}
    first = group.runs[0].before if when == "before" else group.runs[0].after
    return cells | {key: first.get(key) for key in COUNTS if key in first}


def _notes(named: Mapping[str, Group], queries: Sequence[GroupQueries | None], shown: Mapping[str, Group]) -> list[str]:
    """Paired tests on R@1 (means over seeds), what is missing, and whose photos are shown."""
    names, notes = list(named), []
    for name, one in zip(names, queries, strict=True):
        if one is not None:
            paired = paired_test(one.values["after"]["recall@1"], one.values["before"]["recall@1"])
            notes.append(on_r1(paired.sentence(name, "its untrained student")))
    for number in range(1, len(names)):
        ours, theirs = queries[number], queries[0]
        if same_queries(queries, number) and ours is not None and theirs is not None:
            paired = paired_test(ours.values["after"]["recall@1"], theirs.values["after"]["recall@1"])
            notes.append(on_r1(paired.sentence(names[number], names[0])))
    older = runs_without_queries(list(named.values()))
    if older:
        notes.append(f"No intervals and no paired test with {', '.join(older)}: no per_query.parquet (older runs).")
    folders = " and ".join(f"{name}, seed {group.runs[0].seed}" for name, group in shown.items())
    return [*notes, f"Photos, confused classes and recall by attributes are those of one seed: {folders}."]


def gathered_settings(finished: Mapping[str, Sequence[FinishedRun]]) -> dict[str, Any]:
    """Settings that all share as they are; of others the value of each group."""
    first = {name: runs[0].settings for name, runs in finished.items()}
    keys = dict.fromkeys(key for settings in first.values() for key in settings if key not in ("out", "seed"))
    gathered: dict[str, Any] = {}
    for key in keys:
        values = {name: settings.get(key, "–") for name, settings in first.items()}
        same = len({str(value) for value in values.values()}) == 1
        gathered[key] = next(iter(values.values())) if same else "; ".join(f"{v} ({n})" for n, v in values.items())
    return gathered | {"seeds": {name: [run.metrics["seed"] for run in runs] for name, runs in finished.items()}}
