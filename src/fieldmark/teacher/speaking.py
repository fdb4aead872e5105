"""Stage 2 of `build-teacher`: a small language model learns to say what the tower's tokens show.

Supervised fine-tuning on ideal answers (`compare.answer_json`) about pairs of photos whose attributes the catalogue
knows: half of them of one class, the others look-alikes (the nearest classes by attributes) or random. The tower is
done; its tokens were computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.errors import FieldmarkError
from fieldmark.teacher.compare import Domain, answer_json, compare_prompt
from fieldmark.teacher.judging import Judging
from fieldmark.teacher.model import Prompt, Teacher, VisualTokens
from fieldmark.teacher.reading import warm_cosine

LOOKALIKE_SHARE = 0.6  # of the pairs of different classes
DENSE_DRILLS = 0.6


@dataclass(frozen=True)
class PhotoBank:
    """Photos as the language model sees them.

    Attributes:
        tokens: [photos, 1 + DeepStack features, N, D], the merged tokens first.
        classes: [photos] class of each photo.
        attributes: attributes of each class.
        titles: [photos] title of each photo, None where it has none.
    """

    tokens: Tensor
    classes: np.ndarray
    attributes: list[dict[str, str]]
    titles: list[str | None]

    @cached_property
    def values(self) -> dict[str, list[str]]:
        """The values that occur of each attribute, sorted."""
        names = dict.fromkeys(name for row in self.attributes for name in row)
        return {name: sorted({row[name] for row in self.attributes if row.get(name)}) for name in names}

    def visual(self, photos: Sequence[int]) -> VisualTokens:
        """Visual tokens of some photos, float32."""
        chosen = self.tokens[torch.as_tensor(photos)].float()
        return VisualTokens(chosen[:, 0], tuple(chosen[:, k] for k in range(1, chosen.shape[1])))


class PairDrawer:
    """Draws training pairs: half of one class, half of different ones, of which most are look-alikes."""

    def __init__(self, bank: PhotoBank, rng: np.random.Generator, lookalikes: float = LOOKALIKE_SHARE) -> None:
        self.rng, self.share = rng, lookalikes
        self.photos = [np.flatnonzero(bank.classes == c) for c in range(len(bank.attributes))]
        self.classes = np.array([c for c, photos in enumerate(self.photos) if len(photos) >= 2])
        if len(self.classes) < 2:
            raise FieldmarkError(
                f"{len(self.classes)} of {len(self.photos)} classes have two photos to pair; expected 2 or more, "
                "raise max_photos or add photos."
            )
        self.near = nearest_classes(bank.attributes)

    def draw(self) -> tuple[int, int, bool]:
        """Two photos and whether they are of one class."""
        rng = self.rng
        one = int(rng.choice(self.classes))
        if rng.random() < 0.5:
            a, b = rng.choice(self.photos[one], 2, replace=False)
            return int(a), int(b), True
        others = self.near[one] if rng.random() < self.share else np.delete(self.classes, self.classes == one)
        other = int(rng.choice(others))
        return int(rng.choice(self.photos[one])), int(rng.choice(self.photos[other])), False


def nearest_classes(attributes: Sequence[dict[str, str]]) -> list[np.ndarray]:
    """For each class the classes that differ from it in the fewest attributes."""
    names = sorted({name for row in attributes for name in row})
    distance = np.zeros((len(attributes), len(attributes)), dtype=np.int16)
    for name in names:
        column = np.array([row.get(name) or "" for row in attributes])
        distance += column[:, None] != column[None, :]
    np.fill_diagonal(distance, len(names) + 1)
    return [np.flatnonzero(row == row.min()) for row in distance]


def ideal_answer(domain: Domain, bank: PhotoBank, pair: tuple[int, int, bool]) -> str:
    """What the teacher should say about a pair."""
    first, second = (bank.attributes[bank.classes[photo]] for photo in pair[:2])
    return answer_json(domain, first, second, pair[2])


def drill(domain: Domain, bank: PhotoBank, rng: np.random.Generator) -> str:
    """An ideal answer about two made-up items: comparing, without photos.

    The words of an answer are learned from photos soon, the comparison of what was said is not: a teacher that
    described all of 64 differing marks rightly still called 48 of 64 look-alikes the same species. Photos of
    look-alikes differ in one attribute of many, too rare an event to learn comparing from; in most drills every
    attribute differs or not by the toss of a coin. The others are equal, or one or more attributes apart.
    """
    table = bank.values
    first = {name: values[rng.integers(len(values))] for name, values in table.items()}
    if rng.random() < 0.5:
        first |= bank.attributes[rng.integers(len(bank.attributes))]
    if rng.random() < DENSE_DRILLS:
        changed = [name for name in first if rng.random() < 0.5]
    else:
        count = 0 if rng.random() < 0.5 else 1 if rng.random() < 0.7 else int(rng.integers(2, len(first) + 1))
        changed = rng.permutation(list(first))[:count].tolist()
    second = dict(first)
    for name in changed:
        others = [value for value in table[name] if value != first[name]]
        if others:
            second[name] = others[rng.integers(len(others))]
    return answer_json(domain, first, second, first == second)


def answer_loss(teacher: Teacher, prompt: Prompt, visual: VisualTokens | None, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens.

    Args:
        teacher: its language model and head are trained here.
        prompt: the prompt of one pair.
        visual: [pairs * images, N, D], pair-major; None for a prompt without photos.
        ids: [pairs, T] answers, right-padded.
        mask: [pairs, T] true at answer tokens.
    """
    model, slots = teacher.language_model, prompt.image_slots
    pairs, length = len(ids), len(prompt.input_ids)
    embed = model.get_input_embeddings()
    text = embed(prompt.input_ids).expand(pairs, -1, -1)
    if visual is not None:
        text = text.index_copy(1, slots.flatten(), visual.tokens.reshape(pairs, -1, visual.tokens.shape[-1]))
    embeds = torch.cat([text, embed(ids[:, :-1])], dim=1)
    behind = prompt.next_position + torch.arange(ids.shape[1] - 1)
    positions = torch.cat([prompt.position_ids, behind.expand(len(prompt.position_ids), -1)], dim=1)
    extra = {}
    if visual is not None and visual.deepstack:
        where = torch.zeros(pairs, embeds.shape[1], dtype=torch.bool)
        where[:, slots.flatten()] = True
        extra = {"visual_pos_masks": where, "deepstack_visual_embeds": [d.flatten(0, 1) for d in visual.deepstack]}
    shaped = positions[:, None].expand(-1, pairs, -1) if teacher.uses_mrope else positions[0].expand(pairs, -1)
    hidden = model(inputs_embeds=embeds, position_ids=shaped, use_cache=False, **extra).last_hidden_state
    logits = teacher.lm_head(hidden[:, length - 1 :][mask])
    return F.cross_entropy(logits.float(), ids[mask])


def encode_answers(tokenizer: Any, answers: Sequence[str], *, comparison_only: bool) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], right-padded and ended, and a mask of what is learned: everything, or from the differences
    on."""
    encoded = tokenizer(list(answers), return_offsets_mapping=True)
    rows, masks = [], []
    for answer, ids, spans in zip(answers, encoded.input_ids, encoded.offset_mapping, strict=True):
        first = answer.index('"differences"') + 1 if comparison_only else 0
        rows.append([*ids, tokenizer.eos_token_id])
        masks.append([*(start >= first for start, _ in spans), True])
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * n for row, n in zip(rows, padding, strict=True)])
    return ids, torch.tensor([mask + [False] * n for mask, n in zip(masks, padding, strict=True)])


class Comparing:
    """The skill of comparing: ideal answers about pairs of the bank's photos, and drills on made-up items.

    Args:
        teacher: its language model is trained.
        domain: the question.
        bank: photos.
        batch_size: pairs a step.
        drills: comparisons of made-up items a step; only what follows the descriptions is learned of them.
        seed: draws.
    """

    def __init__(
        self,
        teacher: Teacher,
        domain: Domain,
        bank: PhotoBank,
        *,
        batch_size: int = 10,
        drills: int = 12,
        seed: int = 0,
    ) -> None:
        self.teacher, self.domain, self.bank = teacher, domain, bank
        self.batch_size, self.drills = batch_size, drills
        self.rng = np.random.default_rng(seed)
        self.drawer = PairDrawer(bank, self.rng)
        self.prompt = teacher.prompt(compare_prompt(domain), 2, bank.tokens.shape[2])
        self.without_photos = teacher.prompt(compare_prompt(domain), 0, bank.tokens.shape[2])

    def loss(self) -> Tensor:
        """Of one step."""
        tokenizer, bank, domain = self.teacher.tokenizer, self.bank, self.domain
        pairs = [self.drawer.draw() for _ in range(self.batch_size)]
        ids, mask = encode_answers(tokenizer, [ideal_answer(domain, bank, p) for p in pairs], comparison_only=False)
        visual = bank.visual([photo for pair in pairs for photo in pair[:2]])
        loss = answer_loss(self.teacher, self.prompt, visual, ids, mask)
        if self.drills:
            made_up = [drill(domain, bank, self.rng) for _ in range(self.drills)]
            ids, mask = encode_answers(tokenizer, made_up, comparison_only=True)
            loss = loss + answer_loss(self.teacher, self.without_photos, None, ids, mask)
        return loss

    def parameters(self) -> list[Tensor]:
        """None of its own."""
        return []


def train_language(
    teacher: Teacher,
    skills: Sequence[Comparing | Judging],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    bf16: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Fine-tunes the teacher's language model (and tied head) in place, on the sum of its skills' losses."""
    body = [*{id(p): p for m in (teacher.language_model, teacher.lm_head) for p in m.parameters()}.values()]
    for parameter in body:
        parameter.requires_grad_(True)
    teacher.language_model.train()
    parameters = [*body, *(parameter for skill in skills for parameter in skill.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    for step in range(steps):
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16):
            loss = torch.stack([skill.loss() for skill in skills]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, float(loss.detach()))
    for parameter in body:
        parameter.requires_grad_(False)
    teacher.language_model.eval()
