"""Measures an image-text student: photos and titles find each other, groups are told apart, how wide the gap is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np
from sentence_transformers import SentenceTransformer

from fieldmark.data.captions import Group
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.cross_modal import cross_modal_recall
from fieldmark.evaluation.groups import group_hits, group_scores, group_scores_by_category, group_similarity
from fieldmark.evaluation.modality_gap import ModalityGap, modality_gap
from fieldmark.evaluation.uncertainty import bootstrap_intervals
from fieldmark.progress import JobProgress
from fieldmark.students.items import encode_items

logger = logging.getLogger(__name__)

KS = (1, 5, 10)


@dataclass
class MultimodalEvaluation:
    """What an image-text student does on a catalogue.

    Attributes:
        metrics: `i2t_recall@k`, `t2i_recall@k`, `n_images`, `n_texts`; with groups `text_score`, `image_score`,
            `group_score`, `n_groups`, and of several the modality gap `gap_dist`, `gap_disc`, `gap_ratio`.
        photos: [N, D] vectors of the distinct photos.
        texts: [M, D] vectors of the titles.
        groups: [G, 2, 2] cosines of photo i and caption t of each group.
        by_category: group scores of each category.
        gap: distributions behind the modality gap; None without groups, and of one alone.
        intervals: 95 % bootstrap interval over groups of each group score.
        group_photos: [G, 2, D] vectors of the groups' photos; None without groups.
        group_texts: [G, 2, D] vectors of their captions.
    """

    metrics: dict[str, float]
    photos: np.ndarray
    texts: np.ndarray
    groups: np.ndarray
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)
    gap: ModalityGap | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    group_photos: np.ndarray | None = None
    group_texts: np.ndarray | None = None


def evaluate_multimodal(
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    groups: Sequence[Group] = (),
    *,
    batch_size: int = 64,
    ks: tuple[int, ...] = KS,
) -> MultimodalEvaluation:
    """Cross-modal recall on a catalogue's photos and titles, and group scores, with a progress bar.

    A title fits a photo if it is of the same photo or the same label. Rows that share a photo are its captions.

    Args:
        student: an image-text student.
        catalog: rows; those without a title are photos only.
        groups: two photos and two captions each.
        batch_size: items embedded at once.
        ks: depths of recall.

    Raises:
        FieldmarkError: no title, or a photo cannot be read.
    """
    images, titles = list(catalog["image"]), list(catalog["title"])
    ids = [image if label is None else label for image, label in zip(images, catalog["label"], strict=True)]
    ids = [str(one) for one in ids]
    distinct = list({image: row for row, image in reversed(list(enumerate(images)))}.values())[::-1]
    titled = [row for row, title in enumerate(titles) if title]
    if not titled:
        raise FieldmarkError("The catalogue has no titles; image-text retrieval needs a title column.")
    pairs = [(g.image_0, g.image_1) for g in groups]
    captions = [(g.caption_0, g.caption_1) for g in groups]
    total = len(distinct) + len(titled) + 4 * len(groups)
    with JobProgress("measuring", total) as job:
        done = 0

        def embed(photos: list | None, texts: list[str] | None) -> np.ndarray:
            nonlocal done
            start = done
            vectors = encode_items(
                student, images=photos, texts=texts, batch_size=batch_size, progress=lambda n: job.update(start + n)
            )
            done += len(vectors)
            return vectors

        photos = embed([images[row] for row in distinct], None)
        texts = embed(None, [titles[row] for row in titled])
        metrics = cross_modal_recall(photos, texts, [ids[row] for row in distinct], [ids[row] for row in titled], ks)
        if not groups:
            return MultimodalEvaluation(metrics, photos, texts, np.zeros((0, 2, 2)))
        group_photos = embed([image for pair in pairs for image in pair], None).reshape(len(groups), 2, -1)
        group_texts = embed(None, [text for pair in captions for text in pair]).reshape(len(groups), 2, -1)
    similarity = group_similarity(group_photos, group_texts)
    metrics |= group_scores(similarity)
    gap = None
    if len(groups) > 1:
        gap = modality_gap(group_texts[:, 0], group_texts[:, 1], group_photos[:, 0], group_photos[:, 1])
        metrics |= gap.metrics
    else:
        logger.warning("the modality gap is left out: one group alone has no other text or photo to be compared with")
    categories = group_scores_by_category(similarity, [g.category for g in groups])
    intervals = bootstrap_intervals(group_hits(similarity))
    return MultimodalEvaluation(
        metrics, photos, texts, similarity, categories, gap, intervals, group_photos, group_texts
    )
