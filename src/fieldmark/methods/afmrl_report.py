"""The report of an AFMRL run: the ladder, what the reward did to attributes, what the embedder makes of negatives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldmark.data.product_pairs import sample_products
from fieldmark.evaluation.examples import Thumbnails, take_turns
from fieldmark.evaluation.report import write_report
from fieldmark.evaluation.report_attributes import AttributeFindings, ChangedNames, EnrichedQueries, TwoAnswers
from fieldmark.methods import agcl
from fieldmark.methods.afmrl_negatives import MOST_ITEMS, look_at_negatives
from fieldmark.methods.agcl import ProductTask
from fieldmark.methods.reporting import FinishedRun, curves, duration, percent
from fieldmark.students.build import load_student
from fieldmark.teacher.attribute_labels import Attributes, items_of, read_thoughts

if TYPE_CHECKING:
    from fieldmark.methods.afmrl import Stages

R1 = "instance_recall@1"
SHOWN = (
    R1, "instance_recall@5", "instance_recall@10", "instance_ndcg@10", "coarse_map@1", "coarse_map@10",
    "i2t_recall@1", "t2i_recall@1",
)  # fmt: skip
EMBEDDER_CURVES = {
    "loss": "AGCL: loss",
    "masked_share": "AGCL: share of negatives masked",
    "tanh_bm25": "AGCL: mean tanh(BM25) of negatives",
}
REWARD_CURVES = {
    "reward": "RAR: reward",
    "invalid": "RAR: share of invalid answers",
    "completions/mean_length": "RAR: tokens an answer",
}
LENGTHS = {"think_characters": "thought", "answer_characters": "answer"}
TRAINED = {"generator": "cold start", "agcl": "AGCL", "rar": "RAR", "cit": "CIT"}
GENERATORS = {"attributes": "distilled generator", "rl_attributes": "RL generator"}
_ANSWERS = 6

Thoughts = Mapping[tuple[str, str | None], tuple[str, Attributes]]


def write_afmrl_report(stages: Stages, wanted: Sequence[str], results: Mapping[str, Any]) -> None:
    """Writes `report.html` of a loop that has ended; stages that were not run are left out.

    Args:
        stages: where they lie, and their settings.
        wanted: those that were run.
        results: what `metrics.json` will hold.
    """
    runs = {stage: FinishedRun.read(stages.folder(stage)) for stage in wanted if stage not in GENERATORS}
    asked = {stage: _numbers(stages.file(stage)) for stage in wanted if stage in GENERATORS}
    write_report(
        stages.out / "report.html",
        title=f"AFMRL on {stages.config.data}",
        subtitle=summary(results, runs),
        table=[
            {"model": words_of(name), **_cells(values, results["ladder_intervals"][name])}
            for name, values in results["ladder"].items()
        ],
        notes=notes(runs, list(results["ladder"])),
        curves=charts(runs),
        attributes=find(stages, wanted, results["ladder"], asked),
        health=health(runs, asked),
        settings={name: value for name, value in asdict(stages.config).items() if name != "resume"},
        cost=cost(runs, asked),
    )


def words_of(rung: str) -> str:
    """A row of the ladder as the page names it."""
    return rung.replace("agcl", "AGCL")


def summary(results: Mapping[str, Any], runs: Mapping[str, FinishedRun]) -> str:
    """What was trained, and what came out, in words."""
    steps = [
        f"{TRAINED[stage]} ({max((record['step'] for record in run.log), default=0):,} steps)"
        for stage, run in runs.items()
    ]
    said = f"Stages that train: {', '.join(steps) or 'none'}; seed {results['seed']}."
    reached = [
        f"{percent(values[R1])} % with {_embedder(name)}" for name, values in results["ladder"].items() if R1 in values
    ]
    if not reached:
        return said
    return f"{said} R@1, the share of queries whose nearest item is of the same product: {', '.join(reached)}."


def notes(runs: Mapping[str, FinishedRun], ladder: Sequence[str]) -> list[str]:
    """What the rows mean, and how the generator answered held-out items before and after each of its trainings."""
    told = []
    if "agcl + distilled generator" in ladder:
        told.append(
            "The last rows are of queries with attributes: those with a generator, and CIT with the RL generator's."
        )
    for stage in ("generator", "rar"):
        if stage not in runs:
            continue
        before, after = (runs[stage].metrics[when] for when in ("before", "after"))
        count = after["n_items" if stage == "generator" else "n_queries"]
        sentence = (
            f"On {count:,} held-out items, {TRAINED[stage]} took the generator's valid answers from "
            f"{percent(before['valid'])} to {percent(after['valid'])} %"
        )
        if stage == "rar":
            sentence += (
                f", its reward from {before['reward']:.3f} to {after['reward']:.3f} and its answers from "
                f"{before['tokens']:.0f} to {after['tokens']:.0f} tokens"
            )
        told.append(f"{sentence}.")
    return told


def charts(runs: Mapping[str, FinishedRun]) -> dict[str, Any]:
    """Curves of every stage that trained."""
    drawn: dict[str, Any] = {}
    if "generator" in runs:
        drawn |= curves({"": [runs["generator"].log]}, {"loss": "Cold start: loss"})
    embedders = {TRAINED[stage]: [runs[stage].log] for stage in ("agcl", "cit") if stage in runs}
    drawn |= curves(embedders, EMBEDDER_CURVES)
    if "rar" in runs:
        log = {"": [runs["rar"].log]}
        drawn |= curves(log, REWARD_CURVES)
        lengths = {name: lines[""] for name, lines in curves(log, LENGTHS).items()}
        drawn |= {"RAR: characters an answer": lengths} if lengths else {}
    return drawn


def find(
    stages: Stages, wanted: Sequence[str], ladder: Mapping[str, Mapping[str, float]], asked: Mapping[str, Any]
) -> AttributeFindings | None:
    """What attributes bring, how the reward changed them, and what the last embedder makes of its negatives."""
    last = next((stage for stage in ("cit", "agcl") if stage in wanted), None)
    if last is None:
        return None
    settings = stages.cit if last == "cit" else stages.agcl
    task = agcl.open_task(settings)
    found = AttributeFindings(
        enriched=gains(ladder, asked),
        negatives=look_at_negatives(load_student(stages.folder(last) / "model"), task, settings),
    )
    if "rl_attributes" not in wanted:
        return found
    before, after = (read_thoughts(stages.file(stage)) for stage in GENERATORS)
    answers = changed_answers(task, before, after, settings.seed)
    return replace(found, names=changed_names(before, after), answers=answers)


def gains(ladder: Mapping[str, Mapping[str, float]], asked: Mapping[str, Any]) -> list[EnrichedQueries]:
    """R@1 of the AGCL embedder with each generator's attributes in its queries, beside their cost."""
    return [
        EnrichedQueries(
            generator=name,
            plain=ladder["agcl"][R1],
            recall=ladder[f"agcl + {name}"][R1],
            seconds=asked[stage]["seconds_per_item"],
            valid=asked[stage]["valid"],
        )
        for stage, name in GENERATORS.items()
        if stage in asked and f"agcl + {name}" in ladder
    ]


def changed_names(before: Thoughts, after: Thoughts) -> ChangedNames:
    """For how many items each attribute was named."""
    counts = [Counter(name for _, own in answers.values() for name in own) for answers in (before, after)]
    return ChangedNames(counts[0], counts[1], (len(before), len(after)))


def changed_answers(task: ProductTask, before: Thoughts, after: Thoughts, seed: int) -> list[TwoAnswers]:
    """Some training items about which both generators gave a valid answer, and another one: most names apart first."""
    rows = task.train.select(sample_products(task.train["label"][:], MOST_ITEMS, seed=seed))
    known = [(i, item) for i, item in enumerate(items_of(rows)) if item in before and item in after]
    changed = [(i, before[item], after[item]) for i, item in known if before[item][1] != after[item][1]]
    changed.sort(key=lambda one: -len(one[1][1].keys() ^ one[2][1].keys()))
    labels, photos = rows["label"][:], Thumbnails(rows)
    return [
        TwoAnswers(photos[i], rows[i]["title"], (old[0], new[0]), (old[1], new[1]))
        for i, old, new in take_turns(changed, [str(labels[i]) for i, _, _ in changed], _ANSWERS)
    ]


def health(runs: Mapping[str, FinishedRun], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Whether answers were valid and groups had something to say."""
    facts: dict[str, Any] = {}
    for stage, found in asked.items():
        reasons = Counter(found["invalid"]).most_common(1)
        note = f"of {found['items']:,} answers" + (f"; most often: {reasons[0][0]}" if reasons else "")
        facts[f"Valid answers: {GENERATORS[stage]}"] = {"value": f"{percent(found['valid'])} %", "note": note}
    if "rar" in runs:
        equal = [record["frac_reward_zero_std"] for record in runs["rar"].log if "frac_reward_zero_std" in record]
        if equal:
            note = "of the groups of answers: these teach nothing"
            facts["Groups of equal rewards"] = {"value": f"{percent(sum(equal) / len(equal))} %", "note": note}
        failed = runs["rar"].metrics["failed_rewards"]
        facts["Rewards that failed"] = {"value": failed, "note": "answers that could not be searched with"}
    return facts


def cost(runs: Mapping[str, FinishedRun], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Time of each stage."""
    note = "training and both measurements"
    facts: dict[str, Any] = {
        f"Time of {TRAINED[stage]}": {"value": duration(run.metrics["seconds"]), "note": note}
        for stage, run in runs.items()
    }
    for stage, found in asked.items():
        if found["seconds_per_item"] is not None:
            time = duration(found["seconds_per_item"] * found["items"])
            facts[f"Time of the {GENERATORS[stage]}'s attributes"] = {
                "value": time,
                "note": f"of {found['items']:,} items",
            }
    return facts


def _numbers(file: Path) -> dict[str, Any]:
    """What lies beside the attributes of a generator."""
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


def _cells(values: Mapping[str, float], intervals: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {"value": values[key], "interval": intervals.get(key)} for key in SHOWN if key in values}


def _embedder(rung: str) -> str:
    return "the untrained embedder" if rung == "untrained" else words_of(rung)
