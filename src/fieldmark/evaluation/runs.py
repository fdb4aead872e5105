"""Reads run folders, what each query of a run found, and puts runs that differ in nothing but their seed together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    from fieldmark.evaluation.retrieval import PerQuery

PER_QUERY = "per_query.parquet"
COMPARED = ("recall@1", "recall@4", "map@r", "nmi")
COMPARED_WITH_TEXTS = ("i2t_recall@1", "t2i_recall@1", "text_score", "image_score", "group_score", "gap_ratio")
COMPARED_PRODUCTS = (
    "instance_recall@1",
    "enriched_instance_recall@1",
    "instance_ndcg@10",
    "i2t_recall@1",
    "t2i_recall@1",
)
# settings that say where a run lies and how fast it went, not what was trained
ASIDE = ("out", "seed", "resume", "workers", "eval_batch_size", "save_steps")
NAMED = ("loss", "pooling", "data")


@dataclass(frozen=True)
class Run:
    """A finished run: where it lies, its method, settings and metrics before and after."""

    folder: Path
    method: str
    seed: int
    settings: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True)
class Group:
    """Runs of one method with the same settings, and the settings in which other groups of that method differ."""

    runs: list[Run]
    differs: dict[str, Any]

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    @property
    def compared(self) -> tuple[str, ...]:
        """Metrics that runs of this kind are compared by: those of photos, of photos and texts, or of products."""
        after = self.runs[0].after
        if "instance_recall@1" in after:
            return COMPARED_PRODUCTS
        return COMPARED_WITH_TEXTS if "i2t_recall@1" in after else COMPARED

    @property
    def steps(self) -> str:
        """Length of training: optimizer steps where they were given, else epochs; a run of stages has neither."""
        steps, epochs = self.settings.get("max_steps"), self.settings.get("epochs")
        if not (steps or epochs):
            return "all stages"
        return f"{steps} steps" if steps else f"{epochs:g} epochs"

    def spread(self, when: str, metric: str) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation over the runs, `when` being before or after; None where there is none."""
        metrics = [run.before if when == "before" else run.after for run in self.runs]
        values = [one[metric] for one in metrics if metric in one]
        if len(values) < len(self.runs):
            return None, None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    def summary(self) -> dict[str, Any]:
        """The group as one JSON object."""
        return {
            "method": self.method,
            **{name: self.settings.get(name) for name in NAMED},
            "max_steps": self.settings.get("max_steps"),
            "epochs": self.settings.get("epochs"),
            "differs": self.differs,
            "seeds": [run.seed for run in self.runs],
            "runs": [str(run.folder) for run in self.runs],
            **{
                when: {name: dict(zip(("mean", "std"), self.spread(when, name), strict=True)) for name in self.compared}
                for when in ("before", "after")
            },
        }


def read_run(folder: Path) -> Run:
    """Reads `metrics.json` and `config.yaml` of a run folder.

    Raises:
        FieldmarkError: no such folder, not a run, a run that has not ended, a broken file.
    """
    if not folder.is_dir():
        raise FieldmarkError(f"The run {folder} does not exist; give folders that `fieldmark train --out` made.")
    metrics_file, settings_file = folder / "metrics.json", folder / "config.yaml"
    if not settings_file.is_file():
        raise FieldmarkError(
            f"{folder} is not a run: it has no config.yaml; give folders that `fieldmark train --out` made."
        )
    if not metrics_file.is_file():
        raise FieldmarkError(f"The run {folder} has no metrics.json: its training has not ended.")
    try:
        metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
        settings = yaml.safe_load(settings_file.read_text(encoding="utf-8"))
        settings = {key: value for key, value in settings.items() if key not in ASIDE}
        return Run(folder, metrics["method"], metrics["seed"], settings, metrics["before"], metrics["after"])
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise FieldmarkError(
            f"The metrics.json or config.yaml of {folder} is broken ({type(error).__name__}); train that run again."
        ) from error


@dataclass(frozen=True)
class QueryResults:
    """What each query of one measurement found. Entry i of every attribute belongs to the same query.

    Attributes:
        item_ids: the queries.
        labels: their classes.
        counted: [Q] bool, whether the query has a positive; means are taken over these.
        first_hit: [Q] int64, rank (from 1) of the first positive; 0 where there is none.
        average_precision: [Q] float64, average precision at R.
        nearest: item_id of the nearest item; None in a gallery without another item.
        nearest_wrong: item_id of the nearest item of another class; None where there is none.
    """

    item_ids: list[str]
    labels: list[str]
    counted: np.ndarray
    first_hit: np.ndarray
    average_precision: np.ndarray
    nearest: list[str | None]
    nearest_wrong: list[str | None]

    def values(self, metric: str) -> np.ndarray:
        """[counted queries] what each adds to the mean of `recall@k` (bool) or `map@r` (float64).

        Raises:
            FieldmarkError: another metric.
        """
        if metric == "map@r":
            return self.average_precision[self.counted]
        name, _, depth = metric.partition("@")
        if name != "recall" or not depth.isdigit():
            raise FieldmarkError(f"{metric!r} is not known per query; use recall@k or map@r.")
        return self.first_hit[self.counted] <= int(depth)


def write_per_query(
    run_folder: Path, found: Mapping[str, PerQuery], item_ids: Sequence[str], labels: Sequence[str]
) -> None:
    """Writes `per_query.parquet`: one row for each query and measurement.

    Args:
        run_folder: a run.
        found: "before" and "after" training: what each query found, with one neighbour or more; rows are those of the
            catalogue.
        item_ids: item_id of each row of the catalogue.
        labels: class of each row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids, classes = pa.array(item_ids, pa.string()), pa.array(labels, pa.string())
    tables = [
        pa.table(
            {
                "when": pa.array([when] * len(one.query), pa.string()),
                "item_id": ids.take(pa.array(one.query)),
                "label": classes.take(pa.array(one.query)),
                "counted": one.counted,
                "first_hit": one.first_hit,
                "average_precision": one.average_precision,
                "nearest": ids.take(pa.array(one.neighbours[:, 0], mask=one.neighbours[:, 0] < 0)),
                "nearest_wrong": ids.take(pa.array(one.nearest_wrong, mask=one.nearest_wrong < 0)),
            }
        )
        for when, one in found.items()
    ]
    pq.write_table(pa.concat_tables(tables), run_folder / PER_QUERY)


def read_per_query(run_folder: Path) -> dict[str, QueryResults]:
    """Reads `per_query.parquet` of a run: what each query found "before" and "after" training.

    Raises:
        FieldmarkError: the run has no such file (it is older), or the file is broken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run_folder / PER_QUERY
    if not path.is_file():
        raise FieldmarkError(
            f"The run {run_folder} has no {PER_QUERY}: it is an older run; train it again to look at its queries."
        )
    try:
        table = pq.read_table(path)
        when = table["when"].to_numpy()
        return {name: _query_results(table.filter(pa.array(when == name))) for name in ("before", "after")}
    except (pa.ArrowException, KeyError, OSError) as error:
        raise FieldmarkError(f"{path} is broken ({type(error).__name__}); train that run again.") from error


def _query_results(table: Any) -> QueryResults:
    return QueryResults(
        item_ids=table["item_id"].to_pylist(),
        labels=table["label"].to_pylist(),
        counted=table["counted"].to_numpy(),
        first_hit=table["first_hit"].to_numpy(),
        average_precision=table["average_precision"].to_numpy(),
        nearest=table["nearest"].to_pylist(),
        nearest_wrong=table["nearest_wrong"].to_pylist(),
    )


def group_runs(folders: Sequence[Path]) -> list[Group]:
    """Reads runs and groups those that differ in their seed alone, in the order of their first run.

    Raises:
        FieldmarkError: see :func:`read_run`; or a run is given twice, which would shrink the spread.
    """
    seen: set[Path] = set()
    groups: dict[str, list[Run]] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise FieldmarkError(f"The run {folder} was given twice; give each run once.")
        seen.add(folder.resolve())
        run = read_run(folder)
        groups.setdefault(json.dumps([run.method, run.settings], sort_keys=True, default=str), []).append(run)
    return [Group(runs, _differing(runs[0], [other[0] for other in groups.values()])) for runs in groups.values()]


def _differing(run: Run, others: list[Run]) -> dict[str, Any]:
    """Settings of a run that are not shown by name and that another group of its method has otherwise."""
    same_method = [other for other in others if other.method == run.method]
    return {
        key: value
        for key, value in run.settings.items()
        if key not in (*NAMED, "max_steps") and any(other.settings.get(key) != value for other in same_method)
    }
