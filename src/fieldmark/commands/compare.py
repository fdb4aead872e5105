"""`fieldmark compare RUN RUN ...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldmark.commands.arguments import parse
from fieldmark.commands.console import console, interval, number, print_json, print_table, quiet_libraries
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    from fieldmark.evaluation.comparison import GroupQueries, PairedGroups
    from fieldmark.evaluation.runs import Group


@dataclass
class CompareOptions:
    """Arguments of `compare`.

    Attributes:
        runs: run folders; those that differ in their seed alone count as one.
        json: print one JSON object.
        html: also write one HTML page about these runs to this file; of runs on photos alone it reads the test photos
            and embeds them with the first and the last student.
    """

    runs: list[str]
    json: bool = False
    html: str | None = None


def run(argv: list[str]) -> None:
    """Prints means before and after training, their spread over seeds, intervals over queries and paired tests."""
    options = parse(
        CompareOptions,
        argv,
        prog="fieldmark compare",
        description="Runs side by side: mean, spread over seeds, interval over queries, paired tests.",
        positional=("runs",),
        switches=("json",),
    )
    from fieldmark.evaluation.comparison import group_queries, paired_groups, runs_without_queries
    from fieldmark.evaluation.runs import COMPARED, group_runs

    groups = group_runs([Path(name) for name in options.runs])
    if options.html is not None:
        _write_page(groups, Path(options.html))
    queries = [group_queries(group) for group in groups]
    tests = paired_groups(queries)
    older = runs_without_queries([group for group in groups if group.compared == COMPARED])
    intervals = [None if one is None else one.intervals() for one in queries]
    if options.json:
        summaries = [group.summary() | {"intervals": bounds} for group, bounds in zip(groups, intervals, strict=True)]
        print_json({"groups": summaries, "paired": [test.summary() for test in tests], "runs_without_queries": older})
        return
    names = [_name(group, groups) for group in groups]
    _print_means(groups, names, intervals)
    firsts = [name[0] for name in names]
    short = [name[0] if firsts.count(name[0]) == 1 else ", ".join(name) for name in names]
    _print_tests(tests, short)
    _print_left_out(queries, short, older)
    if options.html is not None:
        _say(f"The page: {options.html}")


def _write_page(groups: Sequence[Group], path: Path) -> None:
    """The page, before the tables are printed: a photo that is missing is said before anything else."""
    if path.is_dir():
        raise FieldmarkError(f"--html {path} is a directory; give the name of a file, such as {path / 'compare.html'}.")
    from fieldmark.evaluation.runs import COMPARED

    kinds = {group.compared == COMPARED for group in groups}
    if len(kinds) > 1:
        raise FieldmarkError(
            "Some of these runs were measured on photos alone, some on photos and texts, and a page compares runs of "
            "one kind; give runs of one kind, or leave --html out."
        )
    quiet_libraries()
    if kinds == {True}:
        from fieldmark.methods.comparing import write_comparison

        write_comparison(groups, path)
    else:
        from fieldmark.methods.image_text_comparing import write_image_text_comparison

        write_image_text_comparison(groups, path)


def _name(group: Group, groups: Sequence[Group]) -> list[str]:
    """A group in words, a line each: method, length and seeds, what differs from the others."""
    seeds = f"{len(group.runs)} seed" + "s" * (len(group.runs) > 1)
    given = group.settings
    kinds = [given.get("loss"), *(f"{kind} {given[kind]}" for kind in ("preference", "weights") if given.get(kind))]
    name = [" ".join([group.method, *filter(None, kinds)]) + (f", {given['pooling']}" if given.get("pooling") else "")]
    name.append(f"{group.steps}, {seeds}")
    name += [f"{key} {value}" for key, value in group.differs.items()]
    if len({other.settings.get("data") for other in groups}) > 1:
        name.append(str(group.settings.get("data")))
    return name


def _print_means(groups: Sequence[Group], names: Sequence[list[str]], intervals: Sequence[Any]) -> None:
    """A table for runs with photos alone, one for those with texts."""
    for metrics in dict.fromkeys(group.compared for group in groups):
        rows = []
        for group, name, bounds in zip(groups, names, intervals, strict=True):
            if group.compared != metrics:
                continue
            for when in ("before", "after"):
                known = {} if bounds is None else bounds[when]
                cells = [_cell(group.spread(when, metric), known.get(metric)) for metric in metrics]
                rows.append(("\n".join(name) if when == "before" else "", when, *cells))
        title = "mean ± sample standard deviation over seeds"
        if any(intervals):
            title += ", below it the 95 % interval over queries"
        print_table(title, ("runs", "", *metrics), rows)


def _print_tests(tests: Sequence[PairedGroups], short: Sequence[str]) -> None:
    rows, said = [], ""
    for test in tests:
        (group, when), (other, other_when) = test.first, test.second
        sides = f"{short[group]}: {when}\nagainst {other_when if other == group else short[other]}"
        result = test.result
        counts = (f"{count:,}" for count in (result.better, result.worse, result.same))
        difference = f"{result.difference:+.3f}\n{interval(result.interval)}"
        rows.append(("" if sides == said else sides, test.metric, *counts, difference, _p_value(result.p_value)))
        said = sides
    if rows:
        columns = ("on the same queries", "", "better", "worse", "same", "difference", "p")
        print_table("paired sign test over queries, means over seeds", columns, rows)


def _print_left_out(queries: Sequence[GroupQueries | None], short: Sequence[str], older: Sequence[str]) -> None:
    """Says which groups have no interval or no test, and why."""
    from fieldmark.evaluation.comparison import same_queries

    if older:
        have = "has" if len(older) == 1 else "have"
        _say(f"No intervals and no paired test for {', '.join(older)}, which {have} no per_query.parquet (older runs).")
    for other in range(1, len(queries)):
        if queries[0] is not None and queries[other] is not None and not same_queries(queries, other):
            _say(f"No paired test against {short[other]}, which was measured on other queries.")


def _say(sentence: str) -> None:
    console().print(sentence, markup=False, highlight=False, soft_wrap=True)


def _cell(mean_and_spread: tuple[float | None, float | None], bounds: tuple[float, float] | None) -> str:
    mean, spread = mean_and_spread
    text = number(mean) if spread is None else f"{number(mean)} ± {number(spread)}"
    return f"{text}\n{interval(bounds)}" if bounds else text


def _p_value(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
