"""Alignment scores of two texts and of two photos, against the public forward of one pair at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from fieldmark.data.photos import load_square
from fieldmark.errors import FieldmarkError
from fieldmark.teacher.align import Aligner
from fieldmark.teacher.inside import PHOTOS_QUESTION, TEXTS_QUESTION, photo_scores, text_questions, text_scores
from fieldmark.teacher.model import Teacher
from test_teacher_align import KINDS, TEXTS, photo, yes_no_teacher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=KINDS)
def teacher(request, tmp_path_factory) -> Teacher:
    return yes_no_teacher(request.param, tmp_path_factory.mktemp("teachers"))


@torch.no_grad()
def public_score(teacher: Teacher, question: str, photos: list) -> float:
    """MAPLE Eq. 10 by the model's own forward over its processor's own inputs."""
    content = [{"type": "image"} for _ in photos] + [{"type": "text", "text": question}]
    chat = teacher.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    options = {"size": {"shortest_edge": 224 * 224, "longest_edge": 224 * 224}} if teacher.uses_mrope and photos else {}
    images = [load_square(one, 224) for one in photos] or None
    inputs = teacher.processor(images=images, text=[chat], return_tensors="pt", **options)
    if teacher.uses_mrope:
        teacher.model.model.rope_deltas = None
    logits = teacher.model(**inputs).logits[0, -1].double()
    yes, no = (teacher.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    return float(logits[yes].exp() / (logits[yes].exp() + logits[no].exp()))


def test_two_texts_in_batches_score_as_one_by_one(teacher):
    pairs = list(itertools.product(TEXTS, TEXTS))
    questions, done = text_questions(teacher, iter(pairs)), []
    found = text_scores(Aligner(teacher, 49), questions, batch_size=4, progress=done.append)
    expected = [public_score(teacher, TEXTS_QUESTION.format(first=a, second=b), []) for a, b in pairs]
    assert done == [4, 8, 12, 16, 20, 24, 25]
    assert torch.tensor(expected).std() > 1e-4  # the texts matter
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)


def test_two_photos_in_batches_score_as_one_by_one(teacher):
    photos, pairs, done = [photo(1), photo(2), photo(3)], list(itertools.product(range(3), range(3))), []
    visual = teacher.visual_tokens(photos)
    found = photo_scores(Aligner(teacher, 49), visual, pairs, batch_size=4, progress=done.append)
    expected = [public_score(teacher, PHOTOS_QUESTION, [photos[a], photos[b]]) for a, b in pairs]
    assert done == [4, 8, 9]
    assert torch.tensor(expected).std() > 1e-4  # the photos matter
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("a" * 3000, "b" * 3000), "make a question of 6[0-9]{3} tokens; this teacher reads 4096, shorten them"),
        (("owl", "see <|image_pad|>"), "own token for photos"),
    ],
)
def test_texts_that_cannot_be_asked_about_are_refused(teacher, pair, words):
    with pytest.raises(FieldmarkError, match=words):
        text_questions(teacher, [("owl", "wren"), pair])
