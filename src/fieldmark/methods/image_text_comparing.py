"""The page of `fieldmark compare --html` for runs on photos and texts: numbers, curves, categories of groups.

All of it comes from the run folders; neither the catalogue, the students nor the teacher are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.group_results import WHEN, GroupResults, read_groups_of
from fieldmark.evaluation.report import write_report
from fieldmark.evaluation.runs import Group
from fieldmark.evaluation.uncertainty import bootstrap_intervals, paired_test
from fieldmark.methods.comparing import gathered_settings, group_names, seeds_text
from fieldmark.methods.image_text_reporting import COUNTS, CURVES, SHOWN, told_of_pairs
from fieldmark.methods.reporting import FinishedRun, cost, curves, percent


def write_image_text_comparison(groups: Sequence[Group], path: Path) -> Path:
    """Writes one HTML file about groups of runs; returns its path.

    Args:
        groups: of `group_runs`, in the order of the table; all of them measured with texts.
        path: the file.

    Raises:
        FieldmarkError: a run folder is broken, or runs that differ in their seed alone have other test groups.
    """
    named = dict(zip(group_names(groups), groups, strict=True))
    finished = {name: [FinishedRun.read(run.folder) for run in group.runs] for name, group in named.items()}
    results = {name: _results(group) for name, group in named.items()}
    return write_report(
        path,
        title=" and ".join(named) if len(named) < 3 else f"{len(named)} trainings compared",
        subtitle=_summary(named),
        table=_table(named, results),
        notes=_notes(results),
        curves=curves({name: [run.log for run in runs] for name, runs in finished.items()}, CURVES),
        categories=_categories(results),
        settings=gathered_settings(finished),
        cost=cost(finished),
    )


def _results(group: Group) -> list[GroupResults]:
    """Test groups of each seed; none where a run was measured without."""
    found = [read_groups_of(run.folder) for run in group.runs]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return []
    if any(one.captions != known[0].captions for one in known):
        raise FieldmarkError(
            f"The runs {', '.join(str(run.folder) for run in group.runs)} have the same settings and were measured on "
            "different groups: the data changed between them; compare runs on the same data."
        )
    return known


def _hits(seeds: Sequence[GroupResults], when: str) -> dict[str, np.ndarray]:
    """[G] mean over seeds of each group score."""
    found = [one.hits(when) for one in seeds]
    return {key: np.mean([one[key] for one in found], axis=0) for key in found[0]}


def _summary(named: Mapping[str, Group]) -> str:
    data = " or ".join(dict.fromkeys(str(group.settings["data"]) for group in named.values()))
    trained = "; ".join(f"{name} ({group.steps}, {seeds_text(group)})" for name, group in named.items())
    told = []
    for name, group in named.items():
        mean = {key: group.spread("after", key)[0] for key in ("i2t_recall@1", "group_score")}
        score = mean["group_score"]
        groups = "" if score is None else f", group score {percent(score)} %"
        told.append(f"{name} reaches a photo to text R@1 of {percent(mean['i2t_recall@1'] or 0.0)} %{groups}")
    return f"Trained on {data}: {trained}. {'; '.join(told)}."


def _table(named: Mapping[str, Group], results: Mapping[str, list[GroupResults]]) -> list[dict[str, Any]]:
    """A row for each group after training, and before it one for each different start."""
    starts: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = []
    for name, group in named.items():
        seeds = results[name]
        bounds = {when: bootstrap_intervals(_hits(seeds, when)) if seeds else {} for when in WHEN}
        start = {"model": name, **_cells(group, "before", bounds)}
        starts.setdefault(tuple(group.spread("before", key) for key in SHOWN), start)
        rows.append({"model": name, **_cells(group, "after", bounds)})
    alone = len(starts) == 1
    before = [row | {"model": "untrained" if alone else f"{row['model']}: untrained"} for row in starts.values()]
    return [*before, *rows]


def _cells(group: Group, when: str, bounds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in SHOWN:
        mean, spread = group.spread(when, key)
        if mean is not None:
            found[key] = {"value": mean, "spread": spread, "interval": bounds[when].get(key)}
    first = group.runs[0].after
    return found | {key: first[key] for key in COUNTS if key in first}


def _notes(results: Mapping[str, list[GroupResults]]) -> list[str]:
    """Each training against its start, the others against the first; how far each orders as its teacher does."""
    told = []
    names = [name for name, seeds in results.items() if seeds]
    for name in names:
        paired = paired_test(
            _hits(results[name], "after")["group_score"], _hits(results[name], "before")["group_score"]
        )
        told.append(told_of_pairs("group score", paired, name, "its untrained student"))
    for name in names[1:]:
        ours, theirs = results[name], results[names[0]]
        if ours[0].captions == theirs[0].captions:
            paired = paired_test(_hits(ours, "after")["group_score"], _hits(theirs, "after")["group_score"])
            told.append(told_of_pairs("group score", paired, name, names[0]))
    for name in names:
        found = [[one.correlation(when) for one in results[name]] for when in WHEN]
        if None not in found[0] + found[1]:
            before, after = (float(np.mean(values)) for values in found)  # type: ignore[arg-type]
            told.append(
                f"{name}: rank correlation of cosines with the teacher's scores {before:.2f} before, {after:.2f} after."
            )
    return told


def _categories(results: Mapping[str, list[GroupResults]]) -> dict[str, Any]:
    """The trained students' group scores of each category, means over seeds."""
    found: dict[str, Any] = {}
    for name, seeds in results.items():
        if seeds:
            each = [one.by_category("after") for one in seeds]
            found[name] = {
                category: {key: float(np.mean([one[category][key] for one in each])) for key in scores}
                for category, scores in each[0].items()
            }
    return found
