"""A skill of `build-teacher`: saying whether a text fits a photo (`align`), Yes or No.

Learned from a catalogue's titles and attributes. True texts are an item's own title and statements of its attributes.
False ones are its title with one value exchanged for another of the same attribute (the catalogue's own hard
negatives, as one word decides), titles of other items, and statements with other values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.errors import FieldmarkError
from fieldmark.teacher.align import Aligner
from fieldmark.teacher.model import Teacher, VisualTokens

FALSE_FOR_A_TRUE = 2
_TRIES = 50
STATEMENT_SHARE = 0.4
MANY_WRONG_SHARE = 0.85
EDITED_SHARE = 0.6  # of the false titles, where the title names a value that can be exchanged


@dataclass(frozen=True)
class Named:
    """A value that a text names: its first and last character (exclusive), and the value that the item has."""

    start: int
    stop: int
    true: bool
    truth: str


@dataclass(frozen=True)
class Judged:
    """A text about a photo.

    Attributes:
        text: what is said.
        true: whether all of it fits.
        named: the values in it that are known to be right or wrong.
        foretold: whether the words before a value say which attribute it is of, so that it can be foretold.
    """

    text: str
    true: bool
    named: tuple[Named, ...] = ()
    foretold: bool = False


@dataclass
class JudgedTexts:
    """What can be said of a catalogue's items, rightly and wrongly.

    Attributes:
        titles: title of each item, None where it has none.
        attributes: attributes of each item.
        rng: draws.
        values: values of each attribute; those that occur where none are given.
        many_wrong: share of false texts with more than one wrong value.
    """

    titles: Sequence[str | None]
    attributes: Sequence[dict[str, str]]
    rng: np.random.Generator
    values: dict[str, list[str]] = field(default_factory=dict)
    many_wrong: float = MANY_WRONG_SHARE

    def __post_init__(self) -> None:
        names = dict.fromkeys(name for row in self.attributes for name in row)
        found = {name: sorted({row[name] for row in self.attributes if row.get(name)}) for name in names}
        self.values = self.values or found
        self.titled = [i for i, title in enumerate(self.titles) if title]

    def draw(self, item: int, count: int) -> list[Judged]:
        """`count` texts about an item's photo, the first of every three true."""
        return [self._text(item, k % (1 + FALSE_FOR_A_TRUE) == 0) for k in range(count)]

    def _text(self, item: int, true: bool) -> Judged:
        title, rng = self.titles[item], self.rng
        if title is None or (self.attributes[item] and rng.random() < STATEMENT_SHARE):
            return self.statements(item, true)
        if true:
            return Judged(title, True, self._named(item))
        edited = self.edited(item) if rng.random() < EDITED_SHARE else None
        return edited or self.other_title(item)

    def statements(self, item: int, true: bool, count: int | None = None) -> Judged:
        """Some attributes as the comparison's answers write them; of a false text one or many are wrong."""
        row, rng = self.attributes[item], self.rng
        names = list(row)
        count = count or int(rng.integers(1, len(names) + 1))
        chosen = [names[i] for i in rng.permutation(len(names))[:count]]
        open_to_change = [name for name in chosen if len(self.values.get(name, ())) > 1]
        wrong: set[str] = set()
        if not true and open_to_change:
            wrong = {open_to_change[rng.integers(len(open_to_change))]}
            if rng.random() < self.many_wrong:
                wrong |= {name for name in open_to_change if rng.random() < 0.5}
        text, named = "", []
        for name in chosen:
            value = self._other_value(name, row[name]) if name in wrong else row[name]
            text += f'{", " if text else ""}"{name}": "'
            named.append(Named(len(text), len(text) + len(value), name not in wrong, row[name]))
            text += f'{value}"'
        return Judged(text, not wrong, tuple(named), foretold=True)

    def edited(self, item: int) -> Judged | None:
        """The item's title with one or more values of its attributes exchanged; None where the title names none."""
        title, row, rng = self.titles[item] or "", self.attributes[item], self.rng
        named = [(one, self._attributes_with(row, one.truth)) for one in self._named(item)]
        open_to_change = [place for place, (_, names) in enumerate(named) if names]
        if not open_to_change:
            return None
        wrong = {open_to_change[rng.integers(len(open_to_change))]}
        if rng.random() < self.many_wrong:
            wrong |= {place for place in open_to_change if rng.random() < 0.5}
        text, end, moved = "", 0, []
        for place, (one, names) in enumerate(named):
            said = title[one.start : one.stop]
            if place in wrong:
                said = self._other_value(names[rng.integers(len(names))], one.truth)
            text += title[end : one.start]
            moved.append(Named(len(text), len(text) + len(said), place not in wrong, one.truth))
            text, end = text + said, one.stop
        return Judged(text + title[end:], False, tuple(moved))

    def _attributes_with(self, row: dict[str, str], value: str) -> list[str]:
        """Attributes of an item that have this value, and could have another."""
        return [name for name, own in row.items() if own == value and len(self.values.get(name, ())) > 1]

    def _named(self, item: int) -> tuple[Named, ...]:
        """Values of the item that its title names, in its order; of two that overlap the longer one."""
        title = self.titles[item] or ""
        spans = {
            match.span(): value
            for value in {value for value in self.attributes[item].values() if value}
            for match in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", title, re.IGNORECASE)
        }
        longest = [span for span in spans if not any(o != span and o[0] <= span[0] and span[1] <= o[1] for o in spans)]
        return tuple(Named(*span, True, spans[span]) for span in sorted(longest))

    def other_title(self, item: int) -> Judged:
        """The title of an item with other attributes (or unknown ones), at least another title.

        Raises:
            FieldmarkError: all titles are the same.
        """
        own, row = self.titles[item], self.attributes[item]
        found = None
        for other in self.rng.integers(len(self.titled), size=_TRIES).tolist():
            title, others = self.titles[self.titled[other]], self.attributes[self.titled[other]]
            if title != own:
                found = title
                if not row or others != row:
                    break
        found = found or next((title for title in self.titles if title and title != own), None)
        if found is None:
            raise FieldmarkError(f"all titles are {own!r}; the skill align needs items with different ones.")
        return Judged(found, False)

    def _other_value(self, name: str, value: str) -> str:
        others = [other for other in self.values[name] if other != value]
        return others[self.rng.integers(len(others))]


class Judging:
    """The skill of judging: right and wrong texts about the photos of a bank.

    Args:
        teacher: its language model is trained.
        bank: photos with titles and attributes (`speaking.PhotoBank`).
        batch_size: photos a step.
        texts: texts about each photo.
        seed: draws.
    """

    def __init__(self, teacher: Teacher, bank: Any, *, batch_size: int = 12, texts: int = 6, seed: int = 0) -> None:
        self.bank, self.batch_size, self.count = bank, batch_size, texts
        self.rng = np.random.default_rng((seed, 1))
        self.texts = JudgedTexts(bank.titles, [bank.attributes[c] for c in bank.classes], self.rng)
        described = zip(bank.titles, self.texts.attributes, strict=True)
        self.photos = [photo for photo, (title, row) in enumerate(described) if title or row]
        torch.manual_seed(seed)
        self.module = JudgingLoss(Aligner(teacher, bank.tokens.shape[2]))

    def loss(self) -> Tensor:
        """Of one step."""
        photos = [self.photos[i] for i in self.rng.integers(len(self.photos), size=self.batch_size)]
        drawn = [self.texts.draw(photo, self.count) for photo in photos]
        return torch.stack(list(self.module(self.bank.visual(photos), drawn).values())).sum()

    def parameters(self) -> list[Tensor]:
        """Of the reader that is thrown away."""
        return list(self.module.parameters())


class JudgingLoss(nn.Module):
    """Cross-entropy of the answers, of right values, of the true value behind every value, and of "it is right".

    One bit an answer teaches a small language model not even where to look: 300 steps left the entropy of a coin. To
    foretell a right value, and behind a value to say the true one, it must read the photo in the place where it will
    judge; that is asked of the middle layer too, for comparing comes after reading. Whether the value was right is
    asked of the last but one layer, by a linear reader that is thrown away, and there the answer's token can gather it.

    Args:
        aligner: its teacher's language model is trained.
    """

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = [aligner]  # in a list: its teacher's parameters are not this module's
        self.right = nn.Linear(aligner.teacher.hidden_size, 1)
        self.tokens: dict[str, int] = {}

    def forward(self, visual: VisualTokens, texts: Sequence[Sequence[Judged]]) -> dict[str, Tensor]:
        """The losses: `answer`, and where the texts name values `words`, `truth` and `values`.

        Args:
            visual: tokens of B photos.
            texts: K texts for each.
        """
        (aligner,) = self.aligner
        asked = aligner.ask(visual, [[one.text for one in row] for row in texts])
        true = torch.tensor([[one.true for one in row] for row in texts])
        head, (yes, no) = aligner.teacher.lm_head, aligner.answer_ids
        place = torch.arange(asked.ids.shape[2])
        answers = head(asked.states[place == asked.lengths[..., None] - 1]).float()
        foretold = torch.zeros(asked.ids.shape, dtype=torch.bool)
        right, truth = torch.full(asked.ids.shape, -1.0), torch.full(asked.ids.shape, -1)
        for i, row in enumerate(texts):
            for k, one in enumerate(row):
                spans = aligner.spans(one.text)[asked.head :]
                self._mark(one, spans, foretold[i, k], right[i, k], truth[i, k])
        # By half of the layers the photo is read, by the last but one what is said is compared with it.
        body: Any = aligner.teacher.language_model
        half = body.norm(asked.layers[(len(asked.layers) - 1) // 2])
        told = F.cross_entropy(answers, torch.where(true.flatten(), yes, no), reduction="none")
        weight = torch.where(true.flatten(), FALSE_FOR_A_TRUE, 1)
        losses = {"answer": (weight * told).sum() / weight.sum()}
        if foretold.any():
            words = head(torch.cat([states[:, :, :-1][foretold[:, :, 1:]] for states in (asked.states, half)])).float()
            losses["words"] = F.cross_entropy(words, asked.ids[:, :, 1:][foretold[:, :, 1:]].repeat(2))
        if (right >= 0).any():
            said = self.right(asked.layers[-2])[..., 0].float()
            losses["truth"] = F.cross_entropy(head(half[truth >= 0]).float(), truth[truth >= 0])
            losses["values"] = F.binary_cross_entropy_with_logits(said[right >= 0], right[right >= 0])
        return losses

    def _mark(
        self, judged: Judged, spans: Sequence[tuple[int, int]], foretold: Tensor, right: Tensor, truth: Tensor
    ) -> None:
        """Of one text's tokens [T]: which can be foretold; behind each value, whether it is right and the true one."""
        if judged.foretold:
            for place, (first, last) in enumerate(spans):
                foretold[place] = any(one.true and first < one.stop and one.start < last for one in judged.named)
        for one in judged.named:
            behind = next((place for place, (first, _) in enumerate(spans) if first >= one.stop), None)
            if behind is not None:
                right[behind - 1 : behind + 1] = float(one.true)
                truth[behind] = self._first_token(one.truth)

    def _first_token(self, value: str) -> int:
        if value not in self.tokens:
            self.tokens[value] = self.aligner[0].teacher.tokenizer(f" {value}", add_special_tokens=False).input_ids[0]
        return self.tokens[value]
