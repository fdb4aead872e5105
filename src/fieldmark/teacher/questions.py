"""Questions about one photo each, whose words differ from item to item: its title stands in them.

`prefix.rollout` computes a prompt once for all photos. Prompts of equally many tokens with one photo in front have the
same positions and the same slots for its tokens, so photos whose questions are as long as each other run together, each
with its own tokens and none with padding. What an answer says therefore does not depend on what was asked beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from fieldmark.data.photos import PhotoRef, load_square, open_photo
from fieldmark.errors import FieldmarkError
from fieldmark.teacher.model import DEFAULT_RESOLUTION, PROCESSOR_OPTIONS, Prompt, Teacher
from fieldmark.teacher.prefix import rollout


@dataclass(frozen=True)
class Answer:
    """What was said: text without special tokens, tokens with the end token, whether it ended before the cap."""

    text: str
    tokens: int
    finished: bool


def chat_text(processor: Any, question: str) -> str:
    """The chat as text: a photo, the question, and the beginning of the answer."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def square_side(teacher: Teacher, resolution: int | None = None) -> int | None:
    """Side in pixels of the square that a photo becomes; None where the processor itself fixes the size."""
    return (resolution or DEFAULT_RESOLUTION) if teacher.uses_mrope else None


def square_photo(photo: PhotoRef, side: int | None) -> Image.Image:
    """A photo for the processor of `square_processor`; `side` is that of `square_side`."""
    return open_photo(photo) if side is None else load_square(photo, side)


def square_processor(teacher: Teacher, resolution: int | None = None) -> Any:
    """A copy of the teacher's processor that takes each photo as `Teacher.visual_tokens` does, without being told.

    Trainers call a processor without options, whose stock limits would make another number of tokens of the photo.
    """
    processor = copy.deepcopy(teacher.processor)
    options: dict[str, Any] = dict(PROCESSOR_OPTIONS.get(teacher.model_type, {}))
    side = square_side(teacher, resolution)
    if side is not None:
        bounds = {"shortest_edge": side * side, "longest_edge": side * side}
        options["size"] = type(processor.image_processor.size)(**bounds)
    for name, value in options.items():
        setattr(processor.image_processor, name, value)
    return processor


class PhotoQuestions:
    """Prompts of one photo and a question.

    Args:
        teacher: the teacher.
        tokens_per_image: N, visual tokens of a photo.

    Raises:
        FieldmarkError: its processor tokenises a prompt otherwise than its tokenizer does.
    """

    def __init__(self, teacher: Teacher, tokens_per_image: int) -> None:
        self.teacher = teacher
        self.whole = teacher.prompt("photo", 1, tokens_per_image)
        self.photo_end = int(self.whole.image_slots.max()) + 1
        tail, own = self.whole.input_ids[self.photo_end :].tolist(), self._behind("photo")
        # Tokens that the processor itself puts behind a photo (none for most models).
        self.between = tail[: len(tail) - len(own)]
        if self.between + own != tail:
            raise FieldmarkError(
                f"the {teacher.model_type} processor tokenises a question otherwise than its tokenizer does; "
                "use a Qwen-VL, LLaVA or InternVL checkpoint"
            )

    def tail(self, question: str, max_new_tokens: int = 0) -> list[int]:
        """Token ids behind the photo.

        Args:
            question: what is asked.
            max_new_tokens: of the answer.

        Raises:
            FieldmarkError: question and answer are longer than the teacher's context, or the question holds its image
                token.
        """
        ids = self.between + self._behind(question)
        context = self.teacher.language_model.config.max_position_embeddings
        length = self.photo_end + len(ids)
        if length + max_new_tokens > context:
            raise FieldmarkError(
                f"the question {question[:40]!r}... of {length} tokens and an answer of {max_new_tokens} are more than "
                f"the {context} tokens this teacher reads; shorten the title or lower max_new_tokens"
            )
        if self.teacher.image_token_id in ids:
            raise FieldmarkError(
                f"the question {question[-80:]!r} holds the teacher's own token for photos; take it out"
            )
        return ids

    def prompt(self, tails: Sequence[Sequence[int]]) -> Prompt:
        """The prompt of as many photos as there are tails, all of one length T; `input_ids` is [photos, P]."""
        whole, end = self.whole, self.photo_end
        behind = torch.tensor(tails, device=whole.input_ids.device)
        first = whole.position_ids[:, end : end + 1]
        positions = first + torch.arange(behind.shape[1], device=behind.device)
        return Prompt(
            input_ids=torch.cat([whole.input_ids[:end].expand(len(behind), -1), behind], dim=1),
            position_ids=torch.cat([whole.position_ids[:, :end], positions], dim=1),
            image_slots=whole.image_slots,
            next_position=int(first.max()) + behind.shape[1],
        )

    def _behind(self, question: str) -> list[int]:
        """Tokens of the chat's text from behind the photo's placeholder on."""
        chat = chat_text(self.teacher.processor, question)
        placeholder = self.teacher.tokenizer.convert_ids_to_tokens(self.teacher.image_token_id)
        text = chat[chat.index(placeholder) + len(placeholder) :]
        return self.teacher.tokenizer(text, add_special_tokens=False).input_ids


def check_questions(
    teacher: Teacher,
    photo: PhotoRef,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    resolution: int | None = None,
) -> tuple[PhotoQuestions, list[list[int]]]:
    """Refuses, before any is asked, questions that cannot be; one photo is looked at.

    Returns:
        Prompts of one photo and a question, and the `tail` of each question.

    Raises:
        FieldmarkError: the photo cannot be read, or a question cannot be asked.
    """
    probe = teacher.visual_tokens([open_photo(photo)], resolution)
    asked = PhotoQuestions(teacher, probe.tokens.shape[1])
    return asked, [asked.tail(question, max_new_tokens) for question in questions]


def ask_about_photos(
    teacher: Teacher,
    photos: Sequence[PhotoRef],
    questions: Sequence[str],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    seeds: Sequence[int] | None = None,
    resolution: int | None = None,
    batch_size: int = 16,
) -> Iterator[list[tuple[int, Answer]]]:
    """One answer to each photo's question, batch by batch: short questions first, so that a batch has one length.

    Args:
        teacher: the teacher; its own tower sees the photos.
        photos: B photos.
        questions: a question each.
        temperature: 0 takes the most likely token.
        max_new_tokens: an answer ends there at the latest.
        seeds: of each photo's draws; answers at temperature 0 need none.
        resolution: side in pixels the photos are resized to, None for the teacher's usual one.
        batch_size: photos at once, at most.

    Yields:
        Indices into `photos` with their answers.

    Raises:
        FieldmarkError: a photo cannot be read, or a question cannot be asked; all questions are looked at first.
    """
    if not photos:
        return
    asked, tails = check_questions(teacher, photos[0], questions, max_new_tokens=max_new_tokens, resolution=resolution)
    for batch in _batches([len(tail) for tail in tails], batch_size):
        rolled = rollout(
            teacher,
            asked.prompt([tails[i] for i in batch]),
            teacher.visual_tokens([open_photo(photos[i]) for i in batch], resolution),
            group_size=1,
            temperature=temperature,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            generator=[torch.Generator().manual_seed(seeds[i] if seeds else 0) for i in batch],
        )
        lengths = rolled.mask[:, 0].sum(-1)
        last = rolled.ids[:, 0].gather(1, lengths[:, None] - 1)[:, 0].tolist()
        yield [
            (i, Answer(text, length, end in teacher.eos_token_ids))
            for i, (text,), length, end in zip(batch, rolled.texts, lengths.tolist(), last, strict=True)
        ]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices by length, at most `batch_size` of one length together."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or lengths[i] != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
