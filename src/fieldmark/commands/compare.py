"""`fieldmark compare RUN RUN ...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fieldmark.commands.arguments import parse
from fieldmark.commands.console import number, print_json, print_table


@dataclass
class CompareOptions:
    """Arguments of `compare`.

    Attributes:
        runs: run folders; those that differ in their seed alone count as one.
        json: print one JSON object.
    """

    runs: list[str]
    json: bool = False


def run(argv: list[str]) -> None:
    """Prints mean and sample standard deviation over seeds, before and after training."""
    options = parse(
        CompareOptions,
        argv,
        prog="fieldmark compare",
        description="Runs side by side: mean and sample standard deviation over seeds.",
        positional=("runs",),
        switches=("json",),
    )
    from fieldmark.evaluation.runs import COMPARED, group_runs

    groups = group_runs([Path(name) for name in options.runs])
    if options.json:
        print_json({"groups": [group.summary() for group in groups]})
        return
    rows = []
    for group in groups:
        seeds = f"{len(group.runs)} seed" + "s" * (len(group.runs) > 1)
        name = [f"{group.method} {group.settings.get('loss')}, {group.settings.get('pooling')}"]
        name.append(f"{group.steps}, {seeds}")
        name += [f"{key} {value}" for key, value in group.differs.items()]
        if len({other.settings.get("data") for other in groups}) > 1:
            name.append(str(group.settings.get("data")))
        for when in ("before", "after"):
            cells = [_mean_and_spread(*group.spread(when, metric)) for metric in COMPARED]
            rows.append(("\n".join(name) if when == "before" else "", when, *cells))
    print_table("mean ± sample standard deviation over seeds", ("runs", "", *COMPARED), rows)


def _mean_and_spread(mean: float | None, spread: float | None) -> str:
    return number(mean) if spread is None else f"{number(mean)} ± {number(spread)}"
