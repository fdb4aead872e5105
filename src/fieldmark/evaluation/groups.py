"""Group scores of Winoground-type sets: two photos and two captions that must not be mixed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.inputs import Rows


def group_scores(similarity: Any) -> dict[str, float]:
    """Text, image and group score (MAPLE section 4.1, after Winoground); a tie is wrong.

    Args:
        similarity: ``[G, 2, 2]``, of group g the score of photo i with caption t at ``[g, i, t]``; photo 0 goes with
            caption 0, photo 1 with caption 1.

    Returns:
        ``text_score``: share of groups where each photo scores higher with its own caption than with the other;
        ``image_score``: where each caption scores higher with its own photo; ``group_score``: both; ``n_groups``.
        Chance is 1/4, 1/4, 1/6.

    Raises:
        FieldmarkError: another shape, no group, or NaN.
    """
    text, image = _right(similarity)
    return {
        "text_score": float(text.mean()),
        "image_score": float(image.mean()),
        "group_score": float((text & image).mean()),
        "n_groups": len(text),
    }


def group_hits(similarity: Any) -> dict[str, np.ndarray]:
    """``[G]`` bool of `text_score`, `image_score` and `group_score`: the groups that each counts as right.

    Arguments and errors are those of :func:`group_scores`.
    """
    text, image = _right(similarity)
    return {"text_score": text, "image_score": image, "group_score": text & image}


def group_scores_by_category(similarity: Any, categories: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """:func:`group_scores` of the groups of each category, by name; groups without a category are in none.

    Raises:
        FieldmarkError: as :func:`group_scores`, or another number of categories.
    """
    table = as_array(similarity, "similarity")
    _right(table)
    if len(categories) != len(table):
        raise FieldmarkError(f"{len(categories)} categories were given for {len(table)} groups; expected one each")
    names = sorted({name for name in categories if name is not None})
    return {name: group_scores(table[[other == name for other in categories]]) for name in names}


def group_similarity(images: Any, captions: Any) -> np.ndarray:
    """Cosines ``[G, 2, 2]`` of embedded groups, for :func:`group_scores`.

    Each is a sum in float64 over one pair alone, so equal captions or photos score exactly alike.

    Args:
        images: ``[G, 2, D]``.
        captions: ``[G, 2, D]``.

    Raises:
        FieldmarkError: other or unequal shapes, NaN, infinity or zeros.
    """
    photos, texts = as_array(images, "images"), as_array(captions, "captions")
    if photos.ndim != 3 or photos.shape[1] != 2 or photos.shape != texts.shape:
        raise FieldmarkError(f"images have shape {photos.shape} and captions {texts.shape}; expected [G, 2, D] in both")
    groups, _, dim = photos.shape
    unit = [
        Rows(table.reshape(-1, dim), name).unit(slice(None)).double().numpy().reshape(groups, 2, dim)
        for table, name in ((photos, "images"), (texts, "captions"))
    ]
    return (unit[0][:, :, None, :] * unit[1][:, None, :, :]).sum(axis=3)


def as_array(values: Any, name: str) -> np.ndarray:
    """Scores or embeddings as float64 numpy, whatever float type they have.

    Raises:
        FieldmarkError: no table of numbers.
    """
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double().numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise FieldmarkError(f"{name} is no table of numbers ({error}); give an array or a tensor") from None


def _right(similarity: Any) -> tuple[np.ndarray, np.ndarray]:
    """[G] bool: whether both photos find their caption, whether both captions find their photo."""
    scores = as_array(similarity, "similarity")
    if scores.ndim != 3 or scores.shape[1:] != (2, 2) or not len(scores):
        raise FieldmarkError(f"similarity has shape {scores.shape}; expected [groups, 2 photos, 2 captions]")
    bad = np.isnan(scores).any(axis=(1, 2))
    if bad.any():
        raise FieldmarkError(
            f"the scores of group {int(bad.argmax())} hold NaN; check the model or the cache they are of"
        )
    right, photo_1, photo_0 = scores[:, [0, 1], [0, 1]], scores[:, 1, 0], scores[:, 0, 1]
    text = (right[:, 0] > photo_0) & (right[:, 1] > photo_1)
    image = (right[:, 0] > photo_1) & (right[:, 1] > photo_0)
    return text, image
