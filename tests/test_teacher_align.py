"""Alignment scores with a shared photo prefix against the public forward, one photo and text at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from fieldmark.data.photos import load_square
from fieldmark.errors import FieldmarkError
from fieldmark.teacher.align import QUESTION, Aligner
from fieldmark.teacher.model import Teacher
from helpers_tiny import make_tiny_teacher

KINDS = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl", "llava")
TEXTS = ["a red bird", "Zinc, 5 pieces", "", "éàü ひ", "a much longer title with many words, a number 12345 and an end"]


def yes_no_teacher(kind: str, folder: Path) -> Teacher:
    """A tiny teacher whose tokenizer knows Yes and No as single tokens."""
    made = make_tiny_teacher(kind, folder / kind)
    teacher = Teacher.load(made)
    teacher.tokenizer.add_tokens(["Yes", "No"])
    torch.manual_seed(1)
    teacher.model.resize_token_embeddings(len(teacher.tokenizer), mean_resizing=False)
    with torch.no_grad():  # random weights of 0.02 answer 0.5 to everything
        for parameter in (*teacher.model.model.language_model.parameters(), teacher.model.lm_head.weight):
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return Teacher(teacher.model, teacher.processor)


@pytest.fixture(scope="module", params=KINDS)
def teacher(request, tmp_path_factory) -> Teacher:
    return yes_no_teacher(request.param, tmp_path_factory.mktemp("teachers"))


def photo(seed: int) -> Image.Image:
    pixels = torch.randint(0, 255, (224, 224, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@torch.no_grad()
def one_by_one(teacher: Teacher, image: Image.Image, text: str) -> float:
    """MAPLE Eq. 10 by the model's own forward over its processor's own inputs."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(text=text)}]
    chat = teacher.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    options = {}
    if teacher.uses_mrope:
        options["size"] = {"shortest_edge": 224 * 224, "longest_edge": 224 * 224}
    inputs = teacher.processor(images=[load_square(image, 224)], text=[chat], return_tensors="pt", **options)
    teacher.model.model.rope_deltas = None
    logits = teacher.model(**inputs).logits[0, -1].double()
    yes, no = (teacher.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    return float(logits[yes].exp() / (logits[yes].exp() + logits[no].exp()))


def test_shared_scores_are_those_of_one_by_one(teacher):
    photos = [photo(1), photo(2), photo(3)]
    visual = teacher.visual_tokens(photos)
    aligner = Aligner(teacher, visual.tokens.shape[1])
    texts = [TEXTS[:4], TEXTS[1:], [*TEXTS[2:], "a red bird"]]
    found = aligner.scores(visual, texts)
    expected = torch.tensor([[one_by_one(teacher, p, t) for t in row] for p, row in zip(photos, texts, strict=True)])
    assert found.shape == (3, 4)
    assert expected.std() > 1e-4  # the texts matter
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=0)
    for row in range(3):  # neither the other photos nor the other texts matter
        alone = torch.cat([aligner.scores(visual[row : row + 1], [[text]]) for text in texts[row]], dim=1)
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-5, rtol=0)


def test_gradient_reaches_a_teacher_in_training(teacher):
    visual = teacher.visual_tokens([photo(4)])
    parameters = list(teacher.language_model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        logits = Aligner(teacher, visual.tokens.shape[1]).logits(visual, [["one", "two"]])
        norms = [
            0.0 if g is None else float(g.norm())
            for g in torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
        ]
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    assert sum(norm > 0 for norm in norms) >= len(norms) - 2


def test_mistakes_are_one_sentence(tmp_path):
    plain = Teacher.load(make_tiny_teacher("qwen3_vl", tmp_path / "bytes"))
    with pytest.raises(FieldmarkError, match="no single token for 'Yes'"):
        Aligner(plain, 49)
    teacher = yes_no_teacher("qwen3_vl", tmp_path)
    visual = teacher.visual_tokens([photo(5), photo(6)])
    aligner = Aligner(teacher, 49)
    for texts, words in (
        ([["a"]], "2 photos came with 1 lists"),
        ([["a"], []], "same number of texts"),
        ([["a"], ["b", "c"]], "same number of texts"),
        ([["a" * 5000], ["b"]], "shorten the text"),
        ([["see <|image_pad|>"], ["b"]], "own token for photos"),
    ):
        with pytest.raises(FieldmarkError, match=words):
            aligner.scores(visual, texts)
