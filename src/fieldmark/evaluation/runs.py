"""Reads run folders and puts runs that differ in nothing but their seed together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fieldmark.errors import FieldmarkError

COMPARED = ("recall@1", "recall@4", "map@r", "nmi")
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
    def steps(self) -> str:
        """Length of training: optimizer steps where they were given, else epochs."""
        steps = self.settings.get("max_steps")
        return f"{steps} steps" if steps else f"{self.settings.get('epochs'):g} epochs"

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
                when: {name: dict(zip(("mean", "std"), self.spread(when, name), strict=True)) for name in COMPARED}
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
