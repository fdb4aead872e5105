"""The alignment score: how well a text fits a photo in the eyes of a frozen multimodal LLM.

Paper: MAPLE, arXiv 2506.06970, Eq. 10: alpha = e^Yes / (e^Yes + e^No), from the logits of the first token of the answer
to "Does the image align with the text ...? Answer Yes or No" (section 2; the image comes first).

Why sharing is exact. The prompts of one photo's texts agree up to the text, so their states agree up to there
(see `teacher.prefix`): the photo's part is computed once, and each text behind it attends to it and to itself. The
prompts are split between two tokens of the whole prompt's own tokenisation, never inside one.

Which tokens Yes and No are depends on how the chat goes on (see `answer_words`): behind the line break of most
templates they stand as they are, behind the colon of LLaVA-1.5's `ASSISTANT:` with a space before them, which makes
other tokens. The ids are logged, and `Aligner.answers` holds them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fieldmark.errors import FieldmarkError
from fieldmark.teacher.model import Prompt, Teacher, VisualTokens
from fieldmark.teacher.prefix import suffix_states

logger = logging.getLogger(__name__)

QUESTION = "Does the image align with the text {text}? Answer Yes or No"
ANSWERS = ("Yes", "No")


@dataclass(frozen=True)
class Asked:
    """Questions that ran: what each photo's questions share is left out.

    Attributes:
        ids: [B, K, T] token ids, right-padded.
        lengths: [B, K] tokens of each.
        layers: for each decoder layer [B, K, T, D] states; the last are normalised for the head.
        head: tokens of the questions that lie in the shared part.
    """

    ids: Tensor
    lengths: Tensor
    layers: tuple[Tensor, ...]
    head: int

    @property
    def states(self) -> Tensor:
        """[B, K, T, D] last hidden states."""
        return self.layers[-1]


class Aligner:
    """Asks a teacher whether texts fit photos.

    Args:
        teacher: the frozen teacher (or one in training).
        tokens_per_image: N, visual tokens of a photo.

    Attributes:
        answers: Yes and No as the chat goes on with them (`answer_words`), and the id of each.

    Raises:
        FieldmarkError: the tokenizer has no single token for Yes or No where the answer begins.
    """

    def __init__(self, teacher: Teacher, tokens_per_image: int) -> None:
        self.teacher = teacher
        self.whole = teacher.prompt(QUESTION.format(text="photo"), 1, tokens_per_image)
        self.photo_end = int(self.whole.image_slots.max()) + 1
        self.answers = _answers(teacher)
        self._check_tail()

    @property
    def answer_ids(self) -> tuple[int, int]:
        """Ids of Yes and No."""
        yes, no = self.answers.values()
        return yes, no

    def logits(self, visual: VisualTokens, texts: Sequence[Sequence[str]]) -> Tensor:
        """[B, K] float32, Yes minus No: the score is its sigmoid. Arguments and errors are those of `answer_logits`."""
        logits = self.answer_logits(visual, texts)
        yes, no = self.answer_ids
        return logits[..., yes].float() - logits[..., no].float()

    def answer_logits(self, visual: VisualTokens, texts: Sequence[Sequence[str]]) -> Tensor:
        """[B, K, V] logits of the answer's first token. Arguments and errors are those of `ask`."""
        asked = self.ask(visual, texts)
        last = (asked.lengths - 1)[..., None, None].expand(-1, -1, 1, asked.states.shape[-1])
        return self.teacher.lm_head(asked.states.gather(2, last)[:, :, 0])

    def ask(self, visual: VisualTokens, texts: Sequence[Sequence[str]]) -> Asked:
        """Runs the questions, up to where the answers begin.

        Args:
            visual: tokens of B photos.
            texts: K texts for each photo.

        Raises:
            FieldmarkError: no texts, another number of texts for some photo, or a text that cannot be asked about.
        """
        counts = {len(row) for row in texts}
        if len(texts) != len(visual.tokens) or len(counts) != 1 or 0 in counts:
            raise FieldmarkError(
                f"{len(visual.tokens)} photos came with {len(texts)} lists of {sorted(counts)} texts; give each photo "
                "the same number of texts, one or more"
            )
        tails = [self.tail(text) for row in texts for text in row]
        # Every tail keeps its last token behind the shared part.
        head = _common_length([tail[:-1] for tail in tails])
        rest = [tail[head:] for tail in tails]
        lengths = torch.tensor([len(tail) for tail in rest], device=self.teacher.device)
        ids = torch.zeros(len(rest), int(lengths.max()), dtype=torch.long, device=self.teacher.device)
        for row, tail in zip(ids, rest, strict=True):
            row[: len(tail)] = torch.tensor(tail)
        shape = (len(texts), counts.pop())
        ids, lengths = ids.unflatten(0, shape), lengths.unflatten(0, shape)
        layers = suffix_states(self.teacher, self._prompt(tails[0][:head]), visual, ids)
        return Asked(ids, lengths, layers, head)

    @torch.no_grad()
    def scores(self, visual: VisualTokens, texts: Sequence[Sequence[str]]) -> Tensor:
        """[B, K] alignment scores in 0..1 (MAPLE Eq. 10), see `logits`."""
        return torch.sigmoid(self.logits(visual, texts))

    def tail(self, text: str) -> list[int]:
        """Token ids of the question about `text`, behind the photo.

        Raises:
            FieldmarkError: the text is longer than the teacher's context, or holds its image token.
        """
        ids = self._between + _ids(self.teacher, _behind_the_photo(self.teacher, text))
        context = self.teacher.language_model.config.max_position_embeddings
        if self.photo_end + len(ids) > context:
            raise FieldmarkError(
                f"the text {text[:40]!r}... makes a question of {self.photo_end + len(ids)} tokens; this teacher reads "
                f"{context}, shorten the text"
            )
        if self.teacher.image_token_id in ids:
            raise FieldmarkError(f"the text {text[:40]!r} holds the teacher's own token for photos; take it out")
        return ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each token of `tail(text)` its first and last character (exclusive) in the text, negative before it."""
        behind = _behind_the_photo(self.teacher, text)
        opening = QUESTION.partition("{text}")[0]
        start = behind.index(opening) + len(opening)
        offsets = self.teacher.tokenizer(behind, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        before = [(-1, 0)] * len(self._between)
        return before + [(first - start, last - start) for first, last in offsets]

    @cached_property
    def _between(self) -> list[int]:
        """Tokens that the processor itself puts behind a photo (none for most models)."""
        tail = self.whole.input_ids[self.photo_end :].tolist()
        own = _ids(self.teacher, _behind_the_photo(self.teacher, "photo"))
        return tail[: len(tail) - len(own)]

    def _check_tail(self) -> None:
        if self.tail("photo") != self.whole.input_ids[self.photo_end :].tolist():
            raise FieldmarkError(
                f"the {self.teacher.model_type} processor tokenises a question otherwise than its tokenizer does; "
                "use a Qwen-VL, LLaVA or InternVL checkpoint"
            )

    def _prompt(self, head: list[int]) -> Prompt:
        """The shared part: the photo and `head` tokens behind it."""
        whole, end = self.whole, self.photo_end + len(head)
        behind = whole.position_ids[:, self.photo_end :][:, :1]
        positions = behind + torch.arange(len(head), device=behind.device)
        return Prompt(
            input_ids=torch.cat(
                [whole.input_ids[: self.photo_end], torch.tensor(head, device=behind.device, dtype=torch.long)]
            ),
            position_ids=torch.cat([whole.position_ids[:, : self.photo_end], positions], dim=1),
            image_slots=whole.image_slots,
            next_position=int(behind.max()) + end - self.photo_end,
        )


def chat(teacher: Teacher, question: str, images: int) -> str:
    """The prompt as text: one turn of a user, `images` photos and then the question, up to where the answer begins.

    Raises:
        FieldmarkError: the processor has no chat template.
    """
    if not teacher.processor.chat_template:
        raise FieldmarkError(
            f"the processor of this {teacher.model_type} teacher has no chat template; use an instruct checkpoint"
        )
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return teacher.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def answer_words(teacher: Teacher) -> tuple[str, str]:
    """Yes and No as this teacher's chats go on with them.

    As they are behind a blank, a line break or a special token (`<|im_start|>assistant` and a line break, Qwen-VL);
    with a space before them behind anything else (`ASSISTANT:`, LLaVA-1.5), where the next word begins with one.

    Raises:
        FieldmarkError: the processor has no chat template.
    """
    question = _behind_the_photo(teacher, "photo")
    if question[-1].isspace() or _ids(teacher, question)[-1] in teacher.tokenizer.all_special_ids:
        return ANSWERS
    return f" {ANSWERS[0]}", f" {ANSWERS[1]}"


def _behind_the_photo(teacher: Teacher, text: str) -> str:
    """The chat as text, from behind the photo's placeholder on; what the text itself says cannot move the split."""
    whole = chat(teacher, QUESTION.format(text=text), 1)
    placeholder = teacher.tokenizer.convert_ids_to_tokens(teacher.image_token_id)
    return whole[whole.index(placeholder) + len(placeholder) :]


def _common_length(rows: list[list[int]]) -> int:
    """How many first elements all rows share."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


def _ids(teacher: Teacher, text: str) -> list[int]:
    return teacher.tokenizer(text, add_special_tokens=False).input_ids


def _answers(teacher: Teacher) -> dict[str, int]:
    """The answers' first token, as the chat goes on with it: word -> id."""
    question = _behind_the_photo(teacher, "photo")
    before, found = _ids(teacher, question), {}
    for word in answer_words(teacher):
        ids = _ids(teacher, question + word)
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            raise FieldmarkError(
                f"the tokenizer of this {teacher.model_type} teacher has no single token for {word!r} where the "
                "answer begins; alignment scores need one for Yes and for No"
            )
        found[word] = ids[-1]
    logger.info("alignment answers: %s", ", ".join(f"{word!r} is token {number}" for word, number in found.items()))
    return found
