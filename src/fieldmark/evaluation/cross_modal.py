"""Recall between photos and their captions, where a photo has several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.inputs import Rows, checked_labels, encode_labels
from fieldmark.evaluation.neighbours import Scores, top_k
from fieldmark.evaluation.retrieval import checked_ks


def cross_modal_recall(
    image_embeddings: Any, text_embeddings: Any, image_ids: Any, text_ids: Any, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k from image to text and from text to image by cosine in float32, as on MS-COCO and Flickr30K.

    A query is found at k if any item of its id is among the k nearest of the other modality; of equal scores the lower
    index comes first. Queries without any such item are left out and counted.

    Args:
        image_embeddings: ``[N, D]``, each photo once.
        text_embeddings: ``[M, D]``, one a caption.
        image_ids: N integers or strings.
        text_ids: M of the same kind: the id of the photo that the caption is of.
        ks: depths; a k beyond the other side means all of it.

    Returns:
        ``i2t_recall@k`` and ``t2i_recall@k`` for each k (0 to 1), ``n_images`` and ``n_texts`` (queries of each
        direction), ``n_skipped`` (of both, without a positive). Memory beyond the input: that of `Scores`, and
        12 bytes a query for each of the largest k.

    Raises:
        FieldmarkError: empty input, lengths or widths that differ, NaN, infinity or a row of zeros, ids that are no
            integers or strings, a k below 1, or no photo with a caption.
    """
    ks = checked_ks(ks)
    images, texts = Rows(image_embeddings, "image embeddings"), Rows(text_embeddings, "text embeddings")
    image_codes, text_codes = encode_labels(
        checked_labels(len(images), image_ids, "image ids"), checked_labels(len(texts), text_ids, "text ids")
    )
    forth, back = np.isin(image_codes, text_codes), np.isin(text_codes, image_codes)
    if not forth.any():
        raise FieldmarkError("no image id is among the text ids; give captions the ids of their photos")
    metrics: dict[str, float] = {}
    for name, recalls in (
        ("i2t", _recalls(images, texts, image_codes, text_codes, forth, ks)),
        ("t2i", _recalls(texts, images, text_codes, image_codes, back, ks)),
    ):
        metrics |= {f"{name}_recall@{k}": recall for k, recall in zip(ks, recalls)}
    skipped = int((~forth).sum() + (~back).sum())
    return metrics | {"n_images": int(forth.sum()), "n_texts": int(back.sum()), "n_skipped": skipped}


def _recalls(
    queries: Rows, gallery: Rows, codes: np.ndarray, gallery_codes: np.ndarray, counted: np.ndarray, ks: Sequence[int]
) -> list[float]:
    found = top_k(Scores(queries, gallery), min(max(ks, default=1), len(gallery))).indices[counted]
    hits = gallery_codes[found] == codes[counted, None]
    return [float(hits[:, :k].any(axis=1).mean()) for k in ks]
