"""Alignment scores inside one modality: of a text with a text, of a photo with a photo.

A teacher's modality gap (MAPLE, arXiv 2506.06970, section 2 and Table 6) needs them beside those of photos with texts
(`teacher.align`). The paper prints the question about a photo and a text alone. Deviations and assumptions:

1. Two texts are asked about in its words, without a photo: "Does the text A align with the text B? Answer Yes or No".
2. So are two photos, which come first: "Does the first image align with the second image? Answer Yes or No".
3. A pair is asked about in the order given; the other order may score otherwise.

The answers are the tokens of `Aligner.answers`. Prompts of one batch share nothing. Padding stands behind them, where a
causal language model's earlier tokens do not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fieldmark.errors import FieldmarkError
from fieldmark.teacher.align import Aligner, chat
from fieldmark.teacher.model import Teacher, VisualTokens
from fieldmark.teacher.prefix import prompt_logits

TEXTS_QUESTION = "Does the text {first} align with the text {second}? Answer Yes or No"
PHOTOS_QUESTION = "Does the first image align with the second image? Answer Yes or No"

Progress = Callable[[int], None]


def text_questions(teacher: Teacher, pairs: Iterable[tuple[str, str]]) -> list[list[int]]:
    """Token ids of the question about each pair of texts.

    Raises:
        FieldmarkError: two texts make a question longer than the teacher's context, a text holds its image token, or
            the processor tokenises otherwise than its tokenizer.
    """
    known = list(pairs)
    chats = [chat(teacher, TEXTS_QUESTION.format(first=first, second=second), 0) for first, second in known]
    rows: list[list[int]] = teacher.tokenizer(chats).input_ids
    if rows[0] != teacher.processor(text=chats[:1], return_tensors="pt")["input_ids"][0].tolist():
        raise FieldmarkError(
            f"the {teacher.model_type} processor tokenises a question otherwise than its tokenizer does; "
            "use a Qwen-VL, LLaVA or InternVL checkpoint"
        )
    context = teacher.language_model.config.max_position_embeddings
    for (first, second), ids in zip(known, rows, strict=True):
        if len(ids) > context:
            raise FieldmarkError(
                f"the texts {first[:40]!r}... and {second[:40]!r}... make a question of {len(ids)} tokens; this "
                f"teacher reads {context}, shorten them"
            )
        if teacher.image_token_id in ids:
            raise FieldmarkError(
                f"the texts {first[:40]!r} and {second[:40]!r} hold the teacher's own token for photos; take it out"
            )
    return rows


@torch.no_grad()
def text_scores(
    aligner: Aligner,
    questions: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    progress: Progress = lambda done: None,
) -> Tensor:
    """[P] float32 alignment scores (0..1) of P pairs of texts, on the CPU.

    Args:
        aligner: of the teacher.
        questions: of `text_questions`.
        batch_size: pairs asked about at once, those of like length together.
        progress: called with the number of pairs done.
    """
    found = torch.empty(len(questions))
    order = sorted(range(len(questions)), key=lambda pair: len(questions[pair]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        found[chunk] = _scores(aligner, _logits(aligner.teacher, [questions[pair] for pair in chunk]))
        progress(start + len(chunk))
    return found


@torch.no_grad()
def photo_scores(
    aligner: Aligner,
    visual: VisualTokens,
    pairs: Sequence[tuple[int, int]],
    *,
    batch_size: int = 16,
    progress: Progress = lambda done: None,
) -> Tensor:
    """[P] float32 alignment scores (0..1) of P pairs of photos, on the CPU.

    Args:
        aligner: of the teacher.
        visual: tokens of the photos.
        pairs: first and second photo of each pair.
        batch_size: pairs asked about at once.
        progress: called with the number of pairs done.
    """
    teacher = aligner.teacher
    prompt = teacher.prompt(PHOTOS_QUESTION, 2, visual.tokens.shape[1])
    found = torch.empty(len(pairs))
    for start in range(0, len(pairs), batch_size):
        chunk = slice(start, start + batch_size)
        photos = [photo for pair in pairs[chunk] for photo in pair]
        both = VisualTokens(visual.tokens[photos], tuple(feature[photos] for feature in visual.deepstack))
        found[chunk] = _scores(aligner, prompt_logits(teacher, prompt, both))
        progress(start + len(photos) // 2)
    return found


def _logits(teacher: Teacher, rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, V] logits behind each row of token ids."""
    lengths = torch.tensor([len(row) for row in rows], device=teacher.device)
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long, device=teacher.device)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = torch.tensor(row)
    positions = torch.arange(ids.shape[1], device=teacher.device).expand(3, *ids.shape)
    states = teacher.language_model(
        input_ids=ids, position_ids=positions if teacher.uses_mrope else positions[0], use_cache=False
    ).last_hidden_state
    return teacher.lm_head(states[torch.arange(len(rows)), lengths - 1])


def _scores(aligner: Aligner, logits: Tensor) -> Tensor:
    """MAPLE Eq. 10."""
    yes, no = aligner.answer_ids
    return torch.sigmoid(logits[:, yes].float() - logits[:, no].float()).cpu()
