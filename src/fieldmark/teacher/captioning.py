"""A skill of `build-teacher`: writing what tells two look-alikes apart (`caption`), for `fieldmark label captions`.

Learned from a catalogue's attributes. The ideal answer about two photos first says what it sees, as a comparison's
answer does (`compare.answer_json`), then names one or two attributes in which the two items differ, the same ones of
both:

    {"bird_1": {"crown_colour": "red", ...}, "bird_2": {...}, "differences": "crown_colour, wing_bars",
     "Image 1": "red crown, two wing bars", "Image 2": "black crown, no wing bars"}

Without the first part a small language model learns the form in 700 steps, and not to look: 31 % of the values it
named were right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fieldmark.errors import FieldmarkError
from fieldmark.teacher.compare import Domain, answer_json
from fieldmark.teacher.describe import CAPTION_KEYS, CAPTION_PROMPT
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.speaking import PhotoBank, answer_loss, encode_answers, made_up_items

MOST_NAMED = 2
MOST_CANDIDATES = 10  # of 2 ** 10 random photos the nearest, at the hardest
_KINDS = {"colour", "color", "shape"}  # "red crown" says as much as "red crown colour"


def phrase(name: str, value: str) -> str:
    """An attribute in words: `red crown` of crown_colour, `no wing bars` of wing_bars that are none."""
    words = name.replace("_", " ").split()
    if len(words) > 1 and words[-1].lower() in _KINDS:
        words = words[:-1]
    return " ".join(["no" if value == "none" else value, *words])


def caption(attributes: dict[str, str], names: Sequence[str]) -> str:
    """The named attributes of an item, in words."""
    return ", ".join(phrase(name, attributes[name]) for name in names)


def differing(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Names of the attributes that both items have and in which they differ."""
    return [name for name, value in first.items() if value and second.get(name) and second[name] != value]


def ideal_captions(domain: Domain, first: dict[str, str], second: dict[str, str], names: Sequence[str]) -> str:
    """What the teacher should answer about two items, its captions naming these attributes."""
    seen = json.loads(answer_json(domain, first, second, same=False))
    answer = {key: seen[key] for key in (*domain.item_keys, "differences")}
    answer |= dict(zip(CAPTION_KEYS, (caption(first, names), caption(second, names)), strict=True))
    return json.dumps(answer, ensure_ascii=False)


class LookalikeDrawer:
    """Draws pairs of photos whose items differ, from random ones to the nearest of a thousand.

    Args:
        classes: [photos] class of each photo.
        attributes: attributes of each class.
        rng: draws.

    Raises:
        FieldmarkError: no two classes differ in an attribute that both have.
    """

    def __init__(self, classes: np.ndarray, attributes: Sequence[dict[str, str]], rng: np.random.Generator) -> None:
        self.classes, self.rng = classes, rng
        names = sorted({name for row in attributes for name in row})
        codes: dict[str | None, int] = {None: -1}
        table = [[codes.setdefault(row.get(name) or None, len(codes)) for name in names] for row in attributes]
        self.table = np.array(table).reshape(len(attributes), len(names))
        values = [column[column >= 0] for column in self.table.T]
        if not any(len(set(column.tolist())) > 1 for column in values):
            raise FieldmarkError("No two items differ in an attribute; the skill caption needs some that do.")

    def draw(self) -> tuple[int, int]:
        """Two photos; of 1, 2, 4 ... 1,024 candidates (by the toss of a die) the nearest that differs."""
        while True:
            count = 2 ** int(self.rng.integers(MOST_CANDIDATES + 1))
            one, *others = self.rng.integers(len(self.classes), size=1 + count).tolist()
            own, their = self.table[self.classes[one]], self.table[self.classes[others]]
            apart = ((own != their) & (own >= 0) & (their >= 0)).sum(1)
            if apart.any():
                nearest = np.flatnonzero(apart == apart[apart > 0].min())
                return one, others[int(self.rng.choice(nearest))]

    def names(self, first: dict[str, str], second: dict[str, str]) -> list[str]:
        """One or two of the attributes in which two items differ."""
        names = differing(first, second)
        count = int(self.rng.integers(1, MOST_NAMED + 1))
        return [names[place] for place in sorted(self.rng.permutation(len(names))[:count].tolist())]


class Captioning:
    """The skill of captioning: ideal captions of pairs of the bank's photos, and drills on made-up items.

    Args:
        teacher: its language model is trained.
        domain: its names of the two items and of their attributes.
        bank: photos.
        batch_size: pairs a step.
        drills: pairs of made-up items a step; only what follows the descriptions is learned of them.
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
        self.rng = np.random.default_rng((seed, 2))
        self.drawer = LookalikeDrawer(bank.classes, bank.attributes, self.rng)
        self.prompt = teacher.prompt(CAPTION_PROMPT, 2, bank.tokens.shape[2])
        self.without_photos = teacher.prompt(CAPTION_PROMPT, 0, bank.tokens.shape[2])

    def loss(self) -> Tensor:
        """Of one step."""
        tokenizer, bank = self.teacher.tokenizer, self.bank
        pairs = [self.drawer.draw() for _ in range(self.batch_size)]
        items = [(bank.attributes[bank.classes[one]], bank.attributes[bank.classes[other]]) for one, other in pairs]
        ids, mask = encode_answers(tokenizer, self._answers(items), comparison_only=False)
        visual = bank.visual([photo for pair in pairs for photo in pair])
        loss = answer_loss(self.teacher, self.prompt, visual, ids, mask)
        made_up = [made_up_items(bank, self.rng) for _ in range(self.drills)]
        drills = self._answers([(first, second) for first, second in made_up if differing(first, second)])
        if drills:
            ids, mask = encode_answers(tokenizer, drills, comparison_only=True)
            loss = loss + answer_loss(self.teacher, self.without_photos, None, ids, mask)
        return loss

    def parameters(self) -> list[Tensor]:
        """None of its own."""
        return []

    def _answers(self, items: Sequence[tuple[dict[str, str], dict[str, str]]]) -> list[str]:
        return [ideal_captions(self.domain, *pair, self.drawer.names(*pair)) for pair in items]
