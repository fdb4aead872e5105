"""The report of a run, or of several of the same start: gathers numbers, curves and photos, and writes the page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from sentence_transformers import SentenceTransformer

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.confusions import recall_by_differing_attributes
from fieldmark.evaluation.examples import Thumbnails, confusions, galleries
from fieldmark.evaluation.report import write_report
from fieldmark.evaluation.runs import read_per_query
from fieldmark.evaluation.student import Evaluation
from fieldmark.evaluation.uncertainty import p_text, paired_test
from fieldmark.methods.witness import Witness, explained_pairs

SHOWN = ("recall@1", "recall@4", "map@r", "nmi")
R1_IN_WORDS = "the share of queries whose nearest photo is of their class"
COUNTS = ("n_queries", "n_gallery", "n_skipped")
# key of the log -> (name, what it says, whether it is a share)
HEALTH = {
    "mixed_groups": ("Mixed groups", "pairs with both right and wrong answers: only these teach", True),
    "verdict_accuracy": ("Right verdicts", "of the teacher's answers during training", True),
    "valid_json": ("Valid JSON", "of the teacher's answers", True),
    "completion_length": ("Tokens an answer", "mean over training", False),
}
CURVES = {"loss": "Loss"} | {key: HEALTH[key][0] for key in ("mixed_groups", "verdict_accuracy")}
LOSSES = {
    "proxy_anchor": "Proxy Anchor",
    "potential_field": "Potential Field",
    "multi_similarity": "Multi-Similarity",
    "info_nce": "InfoNCE",
}


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder says: `metrics.json`, `config.yaml`, `log.jsonl`."""

    folder: Path
    metrics: dict[str, Any]
    settings: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Reads the folder of a run that has ended.

        Raises:
            FieldmarkError: a file is missing or broken.
        """
        try:
            return cls(
                folder,
                json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
                yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
                [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()],
            )
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise FieldmarkError(
                f"metrics.json, config.yaml or log.jsonl of {folder} is missing or broken ({type(error).__name__}); "
                "give the whole folder of a finished run."
            ) from error


def write_run_report(
    folders: Mapping[str, Path],
    train: datasets.Dataset,
    test: datasets.Dataset,
    student: SentenceTransformer,
    evaluation: Evaluation,
    path: Path,
    *,
    title: str,
    witness: Witness | None = None,
) -> None:
    """One HTML file about one or several runs of the same start.

    Args:
        folders: name -> run folder, in the order of the table; the last one is the one that the photos show.
        train: the photos that were trained on.
        test: the photos that were measured.
        student: the trained student of the last run.
        evaluation: that student on `test`.
        path: the file.
        title: its heading.
        witness: shows a teacher's words and attention about the student's tokens.
    """
    runs = {name: FinishedRun.read(folder) for name, folder in folders.items()}
    last = list(runs)[-1]
    found, embeddings = evaluation.per_query, evaluation.embeddings
    labels, attributes, photos = list(test["label"]), list(test["attributes"]), Thumbnails(test)
    write_report(
        path,
        title=title,
        subtitle=summary(runs, train, test),
        table=_table(runs),
        notes=paired_sentences(runs),
        curves=curves({name: [run.log] for name, run in runs.items()}),
        galleries=galleries(found, labels, photos),
        confusions=confusions(found, labels, attributes, embeddings, photos),
        differing={last: recall_by_differing_attributes(found, labels, attributes)},
        pairs=[] if witness is None else explained_pairs(student, test, embeddings, witness),
        health=health({name: [run.log] for name, run in runs.items()}),
        settings=runs[last].settings,
        cost=cost({name: [run] for name, run in runs.items()}),
    )


def summary(runs: Mapping[str, FinishedRun], train: datasets.Dataset, test: datasets.Dataset) -> str:
    """What was trained on what, how, and what came out, in words."""
    last = list(runs.values())[-1]
    settings, before, after = last.settings, last.metrics["before"], last.metrics["after"]
    low, high = last.metrics["intervals"]["after"]["recall@1"]
    steps = max((record["step"] for record in last.log), default=0)
    paired = _after_against_before(last)
    sentences = [
        f"{student_words(settings)} was trained on {counted_photos(train)} from {settings['data']} with "
        f"{method_words(last.metrics['method'], settings)}: {steps:,} optimizer {'step' if steps == 1 else 'steps'}, "
        f"seed {last.metrics['seed']}.",
        f"It was measured on {counted_photos(test)} that it had not been trained on.",
        f"R@1, {R1_IN_WORDS}, went from {percent(before['recall@1'])} to {percent(after['recall@1'])} % "
        f"(95 % interval {percent(low)}–{percent(high)}): better on {paired.better:,} queries, worse on "
        f"{paired.worse:,}, equal on {paired.same:,} ({p_text(paired.p_value)}).",
    ]
    for other, run in list(runs.items())[:-1]:
        sentences.append(f"Its control, {other}, reached {percent(run.metrics['after']['recall@1'])} %.")
    return " ".join(sentences)


def counted_photos(catalog: datasets.Dataset) -> str:
    """Such as "960 photos of 120 classes"."""
    return f"{len(catalog):,} photos of {len(set(catalog['label'])):,} classes"


def student_words(settings: Mapping[str, Any]) -> str:
    """The student in words: whose tower it is, and how its tokens become one vector."""
    source = Path(str(settings.get("student") or settings.get("teacher")))
    name = "the embedded teacher" if source.parts[-2:] == ("teacher", "embedded") else source.name
    pooling = "an attention pooler" if settings.get("pooling") == "attention" else "mean pooling"
    return f"A student (the vision tower of {name} with {pooling})"


def method_words(method: str, settings: Mapping[str, Any]) -> str:
    """The method in words."""
    loss = LOSSES.get(str(settings.get("loss")), str(settings.get("loss")))
    if method == "saga":
        return f"SAGA ({loss}, and a frozen multimodal teacher that compares pairs of photos)"
    return loss if method == "metric" else f"{method.upper()} over {loss}"


def percent(fraction: float) -> str:
    """Per cent with one decimal."""
    return f"{100 * fraction:.1f}"


def paired_sentences(runs: Mapping[str, FinishedRun]) -> list[str]:
    """R@1 query by query: each run against the untrained student, and the last against the others."""
    names = list(runs)
    sentences = [_after_against_before(run).sentence(name, "the untrained student") for name, run in runs.items()]
    found = {name: read_per_query(run.folder)["after"] for name, run in runs.items()}
    for other in names[:-1]:
        if found[other].item_ids == found[names[-1]].item_ids:
            paired = paired_test(found[names[-1]].values("recall@1"), found[other].values("recall@1"))
            sentences.append(paired.sentence(names[-1], other))
    return [on_r1(sentence) for sentence in sentences]


def on_r1(sentence: str) -> str:
    """A sentence of a paired test, with the metric it is about."""
    return f"On R@1, {sentence[0].lower()}{sentence[1:]}."


def curves(
    logs: Mapping[str, Sequence[list[dict[str, Any]]]], names: Mapping[str, str] = CURVES
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What `names` names (key of the log -> heading) over training, one line a run; of several seeds their mean, at the
    steps that all have."""
    charts = {}
    for key, heading in names.items():
        lines = {name: _mean_line(of_seeds, key) for name, of_seeds in logs.items()}
        charts[heading] = {name: points for name, points in lines.items() if points}
    return {heading: lines for heading, lines in charts.items() if lines}


def health(logs: Mapping[str, Sequence[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Means over training of what says whether the teacher's signal reached the student."""
    facts: dict[str, Any] = {}
    for name, of_seeds in logs.items():
        records = [record for log in of_seeds for record in log]
        for key, (heading, note, is_share) in HEALTH.items():
            values = [record[key] for record in records if key in record]
            if values:
                mean = float(np.mean(values))
                text = f"{percent(mean)} %" if is_share else f"{mean:.0f}"
                facts[f"{name}: {heading.lower()}"] = {"value": text, "note": note}
        said = Counter(record["message"].partition(": ")[2] for record in records if "message" in record)
        if said:
            facts[f"{name}: steps without the teacher's gradient"] = {
                "value": f"{said.total()} of {sum('loss' in record for record in records)}",
                "note": f"most often: {said.most_common(1)[0][0]}",
            }
    return facts


def cost(runs: Mapping[str, Sequence[FinishedRun]]) -> dict[str, Any]:
    """Time and memory of each name, of several seeds their mean."""
    facts: dict[str, Any] = {}
    for name, of_seeds in runs.items():
        seconds = float(np.mean([run.metrics["seconds"] for run in of_seeds]))
        records = [record for run in of_seeds for record in run.log if "seconds" in record]
        facts[f"{name}: time"] = {"value": duration(seconds), "note": "training and both measurements"}
        if records:
            waiting = float(np.mean([record.get("data_wait_share", 0.0) for record in records]))
            step = float(np.median([record["seconds"] for record in records]))
            facts[f"{name}: time a step"] = {
                "value": duration(step),
                "note": f"median; {percent(waiting)} % of the time waiting for photos",
            }
        memory = max(run.metrics["peak_memory_gb"] for run in of_seeds)
        facts[f"{name}: memory"] = {"value": f"{memory:.1f} GB", "note": "peak of the process"}
    return facts


def _after_against_before(run: FinishedRun) -> Any:
    found = read_per_query(run.folder)
    return paired_test(found["after"].values("recall@1"), found["before"].values("recall@1"))


def _table(runs: Mapping[str, FinishedRun]) -> list[dict[str, Any]]:
    first = next(iter(runs.values())).metrics
    rows = [{"model": "untrained", **_cells(first, "before")}]
    return rows + [{"model": name, **_cells(run.metrics, "after")} for name, run in runs.items()]


def _cells(metrics: Mapping[str, Any], when: str) -> dict[str, Any]:
    values, intervals = metrics[when], metrics["intervals"][when]
    cells = {key: {"value": values[key], "interval": intervals.get(key)} for key in SHOWN}
    return cells | {key: values[key] for key in COUNTS}


def _mean_line(logs: Sequence[list[dict[str, Any]]], key: str) -> list[tuple[int, float]]:
    by_seed = [{record["step"]: record[key] for record in log if key in record} for log in logs]
    steps = sorted(set.intersection(*(set(points) for points in by_seed)))
    return [(step, float(np.mean([points[step] for points in by_seed]))) for step in steps]


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
