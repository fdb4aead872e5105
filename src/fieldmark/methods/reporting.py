"""Gathers what a run's report shows: table, curves, galleries, and what teacher and pooler saw in some pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from sentence_transformers import SentenceTransformer

from fieldmark.data.aviary import draw_with_masks_uri
from fieldmark.data.batches import class_centroids, sample_pairs
from fieldmark.data.photos import load_square
from fieldmark.evaluation.report import write_report
from fieldmark.evaluation.retrieval import retrieval_per_query
from fieldmark.teacher.compare import Domain, attribute_token_spans, compare_prompt, parse_verdict
from fieldmark.teacher.model import Teacher, VisualTokens
from fieldmark.teacher.prefix import replay, rollout

SHOWN = ("recall@1", "recall@4", "map@r", "nmi")
HEALTH = ("mixed_groups", "verdict_accuracy", "valid_json", "completion_length")


@dataclass(frozen=True)
class Witness:
    """A teacher that is asked, for the report, about some pairs: its prompt's domain and the layer of its attention."""

    teacher: Teacher
    domain: Domain
    attention_layer: int


def write_run_report(
    runs: Mapping[str, Path],
    test: datasets.Dataset,
    student: SentenceTransformer,
    embeddings: np.ndarray,
    path: Path,
    *,
    title: str,
    witness: Witness | None = None,
) -> None:
    """One HTML file about one or several runs of the same start.

    Args:
        runs: name -> run folder, in the order of the table.
        test: the photos that were measured.
        student: the trained student whose galleries and attention are shown.
        embeddings: [len(test), D], that student's vectors.
        path: the file.
        title: its heading.
        witness: shows a teacher's words and attention about the student's tokens.
    """
    logs = {name: _read_log(run / "log.jsonl") for name, run in runs.items()}
    metrics = {name: json.loads((run / "metrics.json").read_text(encoding="utf-8")) for name, run in runs.items()}
    last = list(runs.values())[-1]
    pairs = [] if witness is None else explained_pairs(student, test, embeddings, witness)
    seconds = {f"{name}: seconds": m["seconds"] for name, m in metrics.items()}
    write_report(
        path,
        title=title,
        subtitle=f"{len(test)} test photos of {len(set(test['label']))} classes that were not trained on",
        table=_table(metrics),
        curves=_curves(logs),
        galleries=galleries(test, embeddings),
        pairs=pairs,
        health=_health(logs),
        settings=yaml.safe_load((last / "config.yaml").read_text(encoding="utf-8")),
        cost=seconds | {"peak memory, GB": max(m["peak_memory_gb"] for m in metrics.values())},
    )


def galleries(test: datasets.Dataset, embeddings: np.ndarray, count: int = 10, k: int = 6) -> list[dict[str, Any]]:
    """Queries with their nearest photos: half of them chosen from what went wrong, half at random."""
    labels = list(test["label"])
    found = retrieval_per_query(embeddings, labels, roles=list(test["role"]), k=k)
    rng = np.random.default_rng(0)
    wrong = rng.permutation(np.flatnonzero(found.counted & ~found.hit_at_1))[: count // 2]
    rest = np.setdiff1d(np.flatnonzero(found.counted), wrong)
    chosen = [*wrong, *rng.permutation(rest)[: count - len(wrong)]]
    shown = []
    for row in chosen:
        query = int(found.query[row])
        results = [
            (_thumbnail(test[int(i)]["image"]), labels[int(i)], float(score), bool(correct))
            for i, score, correct in zip(found.neighbours[row], found.scores[row], found.correct[row], strict=True)
            if i >= 0
        ]
        shown.append({"query": _thumbnail(test[query]["image"]), "query_label": labels[query], "results": results})
    return shown


def explained_pairs(
    student: SentenceTransformer,
    test: datasets.Dataset,
    embeddings: np.ndarray,
    witness: Witness,
    count: int = 6,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """For some test pairs: the teacher's words about the trained student's tokens, and where teacher and pooler
    looked."""
    labels = list(test["label"])
    centroids = class_centroids(labels, embeddings)
    drawn = sample_pairs(labels, count, seed=seed, epoch=0, step=0, kind="balanced", centroids=centroids)
    teacher, domain = witness.teacher, witness.domain
    tower, pooler = student[0], student[1]
    student.eval()
    prompt = teacher.prompt(compare_prompt(domain), 2, tower.tokens_per_image)  # type: ignore[union-attr,arg-type]
    shown = []
    for number, (a, b, same) in enumerate(drawn):
        refs = [test[i]["image"] for i in (a, b)]
        with torch.no_grad():
            pixels = tower.preprocess(refs)["pixel_values"].to(teacher.device)  # type: ignore[operator]
            features = tower({"pixel_values": pixels})
            visual = VisualTokens(features["token_embeddings"], tuple(features["deepstack"]))
            beta = pooler(features).get("pooling_attention")
            rolled = rollout(
                teacher,
                prompt,
                visual,
                group_size=1,
                temperature=0.7,
                top_p=0.95,
                max_new_tokens=512,
                generator=torch.Generator().manual_seed(seed + number),
            )
            ids, mask = rolled.ids[0], rolled.mask[0]
            rows = torch.zeros(1, 2, ids.shape[1], dtype=torch.bool, device=ids.device)
            length = int(mask.sum())
            rows[0, :, :length] = attribute_token_spans(teacher.tokenizer, ids[0, :length], domain)
            looked = replay(
                teacher,
                prompt,
                visual,
                ids,
                mask,
                temperature=0.7,
                attention_layer=witness.attention_layer,
                attention_rows=rows,
                checkpoint=False,
            ).attention
        verdict = parse_verdict(rolled.texts[0][0], domain)
        attributes = [test[i]["attributes"] for i in (a, b)]
        differing = _differing(attributes)
        shown.append(
            {
                "images": tuple(load_square(ref, 224) for ref in refs),
                "labels": (labels[a], labels[b]),
                "truth_same": same,
                "verdict_same": verdict.same,
                "words": _words(verdict.fields, domain) or rolled.texts[0][0],
                "teacher_attention": None if looked is None else tuple(_square(x) for x in looked[0]),
                "pooler_attention": None if beta is None else tuple(_square(x) for x in beta),
                "masks": _masks(refs, differing),
                "differing_attributes": differing,
            }
        )
    return shown


def _words(fields: Mapping[str, Any] | None, domain: Domain) -> tuple[dict[str, str], dict[str, str]] | None:
    """The two descriptions of an answer, None where it has none."""
    first, second = ((fields or {}).get(key) for key in domain.item_keys)
    return (first, second) if isinstance(first, dict) and isinstance(second, dict) else None


def _differing(attributes: Sequence[Mapping[str, str] | None]) -> list[str]:
    first, second = (dict(row or {}) for row in attributes)
    return [name for name, value in first.items() if second.get(name) != value]


def _masks(refs: Sequence[Any], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Where the marks that differ are drawn (the aviary knows)."""
    if not names or not all(isinstance(ref, str) and ref.startswith("aviary://") for ref in refs):
        return None
    drawings = [draw_with_masks_uri(ref) for ref in refs]
    first, second = (np.any([drawing.masks[name] for name in names], axis=0) for drawing in drawings)
    return first, second


def _square(row: torch.Tensor) -> np.ndarray:
    side = round(len(row) ** 0.5)
    return row.detach().float().cpu().numpy().reshape(side, side)


def _thumbnail(ref: Any) -> Any:
    return load_square(ref, 160)


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _table(metrics: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    first = next(iter(metrics.values()))
    rows = [{"model": "untrained", **{key: first["before"][key] for key in SHOWN}}]
    return rows + [{"model": name, **{key: m["after"][key] for key in SHOWN}} for name, m in metrics.items()]


def _curves(logs: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[tuple[int, float]]]:
    curves = {}
    for name, log in logs.items():
        for key in ("loss", *HEALTH[:2]):
            points = [(record["step"], record[key]) for record in log if key in record]
            if points:
                curves[f"{name}: {key.replace('_', ' ')}"] = points
    return curves


def _health(logs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    health = {}
    for name, log in logs.items():
        for key in HEALTH:
            values = [record[key] for record in log if key in record]
            if values:
                health[f"{name}: {key.replace('_', ' ')} (mean)"] = round(float(np.mean(values)), 3)
        health |= {f"{name}, step {r['step']}": r["message"] for r in log if "message" in r}
    return health
