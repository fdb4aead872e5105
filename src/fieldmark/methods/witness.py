"""What teacher and pooler saw in some pairs of test photos: the teacher's words, its verdict, and where both looked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from fieldmark.data.aviary import draw_with_masks_uri
from fieldmark.data.batches import class_centroids, sample_pairs
from fieldmark.data.photos import load_square
from fieldmark.teacher.compare import Domain, attribute_token_spans, compare_prompt, parse_verdict
from fieldmark.teacher.model import Teacher, VisualTokens
from fieldmark.teacher.prefix import replay, rollout


@dataclass(frozen=True)
class Witness:
    """A teacher that is asked, for the report, about some pairs: its prompt's domain and the layer of its attention."""

    teacher: Teacher
    domain: Domain
    attention_layer: int


def explained_pairs(
    student: SentenceTransformer,
    test: datasets.Dataset,
    embeddings: np.ndarray,
    witness: Witness,
    count: int = 10,
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
