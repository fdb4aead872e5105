"""Alignment scores with a shared photo prefix against the public forward, one photo and text at a time."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from fieldmark.data.photos import load_square
from fieldmark.errors import FieldmarkError
from fieldmark.teacher.align import QUESTION, Aligner
from fieldmark.teacher.labels import alignment_cache
from fieldmark.teacher.model import Teacher
from helpers_tiny import TEMPLATE, make_tiny_teacher

KINDS = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl", "llava")
TEXTS = ["a red bird", "Zinc, 5 pieces", "", "éàü ひ", "a much longer title with many words, a number 12345 and an end"]


def yes_no_teacher(kind: str, folder: Path) -> Teacher:
    """A tiny teacher whose tokenizer knows Yes and No as single tokens, with a space before them as others."""
    made = make_tiny_teacher(kind, folder / kind)
    teacher = Teacher.load(made)
    teacher.tokenizer.add_tokens(["Yes", "No", " Yes", " No"])
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
def one_by_one(teacher: Teacher, image: Image.Image, text: str, answers: tuple[str, str] = ("Yes", "No")) -> float:
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
    yes, no = (teacher.tokenizer.convert_tokens_to_ids(word) for word in answers)
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


ASSISTANT = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (ASSISTANT, ("Yes", "No")),
        ("ASSISTANT:", (" Yes", " No")),
        ("<|im_start|>", ("Yes", "No")),
    ],
)
def test_answers_are_the_tokens_that_the_chat_goes_on_with(tmp_path, caplog, ending, words):
    teacher = yes_no_teacher("llava", tmp_path)
    teacher.processor.chat_template = TEMPLATE.replace(ASSISTANT, ending)
    visual = teacher.visual_tokens([photo(7)])
    with caplog.at_level(logging.INFO, logger="fieldmark.teacher.align"):
        aligner = Aligner(teacher, visual.tokens.shape[1])
    ids = {word: teacher.tokenizer.convert_tokens_to_ids(word) for word in words}
    assert aligner.answers == ids
    assert aligner.answer_ids == tuple(ids.values())
    assert len({*ids.values(), teacher.tokenizer.unk_token_id}) == 3
    assert caplog.messages == [f"alignment answers: {', '.join(f'{word!r} is token {ids[word]}' for word in words)}"]
    found = aligner.scores(visual, [["owl"]]).item()
    assert found == pytest.approx(one_by_one(teacher, photo(7), "owl", words), abs=1e-4)
    made_by = alignment_cache(tmp_path / "f.parquet", teacher).made_by
    assert made_by.get("answer_words", ["Yes", "No"]) == list(words)  # unnamed where they are the usual ones


def test_scores_by_other_answers_are_not_gone_on_with(tmp_path):
    teacher = yes_no_teacher("llava", tmp_path)
    with alignment_cache(tmp_path / "f.parquet", teacher) as cache:
        cache.add([{"key": "a", "photo": "p", "text": "owl", "score": 0.5}])
    assert len(alignment_cache(tmp_path / "f.parquet", teacher).rows) == 1
    teacher.processor.chat_template = TEMPLATE.replace(ASSISTANT, "ASSISTANT:")
    with pytest.raises(FieldmarkError, match="answer_words was None, is \\[' Yes', ' No'\\]"):
        alignment_cache(tmp_path / "f.parquet", teacher)


def test_a_colon_needs_answers_with_a_space(tmp_path):
    teacher = Teacher.load(make_tiny_teacher("llava", tmp_path / "made"))
    teacher.tokenizer.add_tokens(["Yes", "No"])
    teacher.processor.chat_template = TEMPLATE.replace(ASSISTANT, "ASSISTANT:")
    with pytest.raises(FieldmarkError, match="no single token for ' Yes'"):
        Aligner(teacher, 49)
    teacher.processor.chat_template = None
    with pytest.raises(FieldmarkError, match="has no chat template"):
        alignment_cache(tmp_path / "f.parquet", teacher)
