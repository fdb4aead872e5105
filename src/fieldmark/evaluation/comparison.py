"""Groups of runs compared query by query: intervals over queries, and paired tests.

Runs of a group differ in their seed alone, so a query's value is its mean over the seeds. A test says whether the
queries agree on which of two trainings is better; it says nothing of how far another seed would move both, which is
what the spread over seeds is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.runs import COMPARED, PER_QUERY, Group, read_per_query
from fieldmark.evaluation.uncertainty import Paired, bootstrap_intervals, paired_test

WHEN = ("before", "after")
# nmi is a property of all photos together, no mean over queries
PER_QUERY_METRICS = tuple(metric for metric in COMPARED if metric.startswith(("recall@", "map@r")))
TESTED = ("recall@1", "map@r")


@dataclass(frozen=True)
class GroupQueries:
    """The counted queries of a group of runs.

    Attributes:
        item_ids: [Q] text, sorted.
        values: before or after -> metric -> [Q] float64, the mean over the group's seeds.
    """

    item_ids: np.ndarray
    values: dict[str, dict[str, np.ndarray]]

    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """95 % bootstrap intervals over queries: before or after -> metric -> (low, high)."""
        return {when: bootstrap_intervals(values) for when, values in self.values.items()}


@dataclass(frozen=True)
class PairedGroups:
    """One paired test: (group number, before or after) of both sides, the metric and the result."""

    first: tuple[int, str]
    second: tuple[int, str]
    metric: str
    result: Paired

    def summary(self) -> dict[str, Any]:
        """The test as one JSON object."""
        sides = {side: dict(zip(("group", "when"), getattr(self, side), strict=True)) for side in ("first", "second")}
        return {**sides, "metric": self.metric, **asdict(self.result)}


def runs_without_queries(groups: Sequence[Group]) -> list[str]:
    """Folders of the runs that have no `per_query.parquet`: they are older than that file."""
    return [str(run.folder) for group in groups for run in group.runs if not (run.folder / PER_QUERY).is_file()]


def group_queries(group: Group) -> GroupQueries | None:
    """The queries of a group, means over its seeds; None where one of its runs has no `per_query.parquet`.

    Raises:
        FieldmarkError: a broken file, or runs of the group that were measured on different photos.
    """
    if runs_without_queries([group]):
        return None
    item_ids: np.ndarray | None = None
    totals: dict[str, dict[str, Any]] = {when: dict.fromkeys(PER_QUERY_METRICS, 0.0) for when in WHEN}
    for run in group.runs:
        for when, found in read_per_query(run.folder).items():
            ids = np.array(found.item_ids, dtype=object)[found.counted]
            order = np.argsort(ids)
            if item_ids is None:
                item_ids = ids[order]
            elif not np.array_equal(item_ids, ids[order]):
                raise FieldmarkError(
                    f"The runs {group.runs[0].folder} and {run.folder} have the same settings and were measured on "
                    "different photos: the data changed between them; compare runs on the same data."
                )
            for metric in PER_QUERY_METRICS:
                totals[when][metric] = totals[when][metric] + found.values(metric)[order]
    assert item_ids is not None
    means = {
        when: {metric: total / len(group.runs) for metric, total in metrics.items()} for when, metrics in totals.items()
    }
    return GroupQueries(item_ids, means)


def paired_groups(queries: Sequence[GroupQueries | None]) -> list[PairedGroups]:
    """After against before of each group, then the first group against each other one on the same queries.

    Args:
        queries: of each group; None leaves the group out.
    """
    sides = [((number, "after"), (number, "before")) for number in range(len(queries))]
    sides += [((0, "after"), (number, "after")) for number in range(1, len(queries)) if same_queries(queries, number)]
    tests = []
    for first, second in sides:
        ours, theirs = queries[first[0]], queries[second[0]]
        if ours is None or theirs is None:
            continue
        for metric in TESTED:
            result = paired_test(ours.values[first[1]][metric], theirs.values[second[1]][metric])
            tests.append(PairedGroups(first, second, metric, result))
    return tests


def same_queries(queries: Sequence[GroupQueries | None], number: int) -> bool:
    """Whether group `number` was measured on the queries of the first group."""
    first, other = queries[0], queries[number]
    return first is not None and other is not None and np.array_equal(first.item_ids, other.item_ids)
