"""Photos and texts into an image-text student: features for a forward pass with gradient, or embeddings.

The student's own `preprocess` does the work, the one that a plain `SentenceTransformer.encode` runs, so training and
use cannot differ. Here photos are opened by fieldmark (paths, uris, bytes; squares of the student's resolution), texts
are kept from being taken for file names, and what the student cannot take is said in a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

from fieldmark.data.photos import PhotoRef, load_square
from fieldmark.errors import FieldmarkError


def is_multimodal(student: SentenceTransformer) -> bool:
    """Whether the student embeds texts as well as photos."""
    return {"image", "text"} <= set(_modalities(student))


def embeds_both(student: SentenceTransformer) -> bool:
    """Whether the student embeds a photo together with a text: one made of a multimodal LLM does."""
    return "message" in _modalities(student)


def photo_side(student: SentenceTransformer) -> int:
    """Side in pixels of the square that an image-text student sees of a photo."""
    transformer: Any = student[0]
    images = transformer.processor.image_processor
    if "spatial_shapes" in images.model_input_names:  # SigLIP 2 in its flexible form counts patches
        return int(images.patch_size) * math.isqrt(images.max_num_patches)
    return int(images.size.get("height") or math.isqrt(int(images.size["longest_edge"])))


def tokenize_items(
    student: SentenceTransformer,
    images: Sequence[PhotoRef] | None = None,
    texts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Features of a batch, on the CPU, for `student(features)["sentence_embedding"]` (with gradient).

    Args:
        student: an image-text student.
        images: B photos: paths, `aviary://` uris, encoded bytes or Pillow images; each is resized whole to a square.
        texts: B texts. With `images` too, item i is photo i together with text i.

    Returns:
        What `student.preprocess` gives: `input_ids`, `attention_mask` [B, T], `pixel_values`, ..., `modality`.

    Raises:
        FieldmarkError: nothing or an uneven number of photos and texts was given, the student does not take them, a
            photo cannot be read, or a text is longer than the student's context.
    """
    _check_items(student, images, texts)
    if images is None:
        assert texts is not None
        features = student.preprocess([{"text": text} for text in texts])  # as strings, names of files would be opened
    else:
        side = photo_side(student)
        photos = [load_square(image, side) for image in images]
        both = photos if texts is None else [{"image": p, "text": t} for p, t in zip(photos, texts, strict=True)]
        features = student.preprocess(both)  # type: ignore[arg-type]
    _check_length(student, features, texts)
    return features


@overload
def encode_items(
    student: SentenceTransformer,
    *,
    images: Sequence[PhotoRef] | None = ...,
    texts: Sequence[str] | None = ...,
    batch_size: int = ...,
    convert: Literal["numpy"] = ...,
    progress: Callable[[int], None] = ...,
) -> np.ndarray: ...
@overload
def encode_items(
    student: SentenceTransformer,
    *,
    images: Sequence[PhotoRef] | None = ...,
    texts: Sequence[str] | None = ...,
    batch_size: int = ...,
    convert: Literal["tensor"],
    progress: Callable[[int], None] = ...,
) -> torch.Tensor: ...
def encode_items(
    student: SentenceTransformer,
    *,
    images: Sequence[PhotoRef] | None = None,
    texts: Sequence[str] | None = None,
    batch_size: int = 32,
    convert: Literal["numpy", "tensor"] = "numpy",
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray | torch.Tensor:
    """Embeddings of photos, of texts, or of photos with a text each, in the order given.

    Args:
        student: an image-text student; it is in the mode (train or eval) it was in when this returns.
        images: N photos, as in `tokenize_items`; a batch of them is open at a time.
        texts: N texts; batches hold texts of like length.
        batch_size: items at once.
        convert: `numpy` or `tensor`.
        progress: called after each batch with the number of items done.

    Returns:
        [N, D] float32 on the CPU, of unit length.

    Raises:
        FieldmarkError: as `tokenize_items`.
    """
    _check_items(student, images, texts)
    if batch_size < 1:
        raise FieldmarkError(f"batch_size {batch_size} was given; expected 1 or more")
    count = len(texts) if texts is not None else len(images or ())
    order = sorted(range(count), key=lambda item: -len(texts[item])) if texts is not None else list(range(count))
    vectors = torch.empty(count, student.get_embedding_dimension() or 0)
    training = student.training
    student.eval()
    try:
        for start in range(0, count, batch_size):
            rows = order[start : start + batch_size]
            features = tokenize_items(
                student,
                None if images is None else [images[row] for row in rows],
                None if texts is None else [texts[row] for row in rows],
            )
            with torch.inference_mode():
                batch = student(batch_to_device(features, student.device))["sentence_embedding"]
            vectors[rows] = batch.float().cpu()
            progress(start + len(rows))
    finally:
        student.train(training)
    return vectors.numpy() if convert == "numpy" else vectors


def too_long(student: SentenceTransformer, images: Sequence[PhotoRef], texts: Sequence[str]) -> list[int]:
    """Which of N photos with a text each are more than the student reads; `tokenize_items` would refuse them."""
    if not images:
        return []
    side, limit = photo_side(student), _context(student)
    photo = load_square(images[0], side)  # all squares of one side are equally many tokens

    def length(text: str) -> int:
        features = student.preprocess([{"image": photo, "text": text}])  # type: ignore[list-item]
        return features["input_ids"].shape[1]

    room = limit - length("a")
    # A token is a byte at least, so that hardly any text must be counted.
    return [item for item, text in enumerate(texts) if len(text.encode()) > room and length(text) > limit]


def _context(student: SentenceTransformer) -> int:
    """Tokens that the student reads."""
    transformer: Any = student[0]
    return transformer.config.get_text_config().max_position_embeddings


def _check_items(student: SentenceTransformer, images: Sequence[PhotoRef] | None, texts: Sequence[str] | None) -> None:
    """The student takes what is given, and there is something of it."""
    if not is_multimodal(student):
        raise FieldmarkError(
            f"a student of {type(student[0]).__name__} was given, which does not embed both photos and texts; "
            "build one from a multimodal LLM or a dual encoder"
        )
    if not images and not texts:
        raise FieldmarkError("there is nothing to embed; give photos, texts or both")
    if images is not None and texts is not None:
        if len(images) != len(texts):
            raise FieldmarkError(
                f"{len(images)} photos and {len(texts)} texts were given; expected a text for each photo"
            )
        if not embeds_both(student):
            raise FieldmarkError(
                "a photo together with a text was given to a dual encoder, which embeds one or the other; give photos "
                "or texts, or use a student made of a multimodal LLM"
            )
    wrong = next((text for text in texts or () if not isinstance(text, str)), None)
    if wrong is not None or (texts is not None and None in texts):
        raise FieldmarkError(f"a text was given as {type(wrong).__name__}; expected a string (is a title missing?)")


def _check_length(student: SentenceTransformer, features: dict[str, Any], texts: Sequence[str] | None) -> None:
    """No text is longer than the positions the model has."""
    if texts is None:
        return
    transformer: Any = student[0]
    limit = _context(student)
    if features["input_ids"].shape[1] < limit:
        return
    if embeds_both(student):
        lengths = features["attention_mask"].sum(1).tolist()
    else:  # a dual encoder's tokenizer has cut what is too long
        lengths = [len(ids) for ids in transformer.tokenizer(list(texts), truncation=False)["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > limit:
        raise FieldmarkError(
            f"the text {texts[longest][:40]!r}... is {lengths[longest]} tokens long with its prompt; this student "
            f"reads {limit}; shorten it"
        )


def _modalities(student: SentenceTransformer) -> list[Any]:
    transformer: Any = student[0]
    return transformer.modalities
