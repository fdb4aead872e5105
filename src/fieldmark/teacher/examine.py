"""Examines a teacher: how often it answers in valid JSON, how often its verdict is right, how often it disagrees with
itself; and whether it tells right titles from wrong ones.

Pairs are balanced: half of one class, half of different classes; the different ones are look-alikes (nearest classes by
attributes) or, where a catalogue has no attributes, random. The share of mixed groups says whether SAGA could learn
anything from this teacher: a group whose verdicts are all right or all wrong has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from fieldmark.teacher.align import Aligner
from fieldmark.teacher.compare import Domain, compare_prompt, parse_verdict
from fieldmark.teacher.judging import JudgedTexts
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.prefix import rollout
from fieldmark.teacher.speaking import PairDrawer, PhotoBank


@dataclass(frozen=True)
class Examination:
    """Fractions 0..1 over all rollouts or pairs.

    Attributes:
        pairs: number of pairs.
        rollouts: completions a pair.
        valid_json: share of completions with a readable verdict.
        verdict_accuracy: share of completions whose verdict is right (unreadable is wrong).
        accuracy_same: the same, on pairs of one class.
        accuracy_different: the same, on pairs of different classes.
        mixed_groups: share of pairs with right and wrong completions.
        yes_auc: area under the ROC curve of a pair's share of "yes" against the truth.
        completion_length: mean tokens.
        attributes_right: share of stated attribute values that are the catalogue's.
    """

    pairs: int
    rollouts: int
    valid_json: float
    verdict_accuracy: float
    accuracy_same: float
    accuracy_different: float
    mixed_groups: float
    yes_auc: float
    completion_length: float
    attributes_right: float

    def as_dict(self) -> dict[str, float]:
        return {key: round(float(value), 4) for key, value in asdict(self).items()}


def examine(
    teacher: Teacher,
    domain: Domain,
    bank: PhotoBank,
    *,
    pairs: int = 128,
    group_size: int = 8,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    lookalikes: float = 1.0,
    batch_pairs: int = 8,
    seed: int = 0,
) -> Examination:
    """Rolls out `group_size` completions on balanced pairs of the bank's photos."""
    drawer = PairDrawer(bank, np.random.default_rng(seed), lookalikes)
    drawn = balanced(drawer, pairs)
    prompt = teacher.prompt(compare_prompt(domain), 2, bank.tokens.shape[2])
    generator = torch.Generator().manual_seed(seed)
    right = np.zeros((pairs, group_size), dtype=bool)
    valid = np.zeros((pairs, group_size), dtype=bool)
    yes = np.zeros((pairs, group_size))
    lengths: list[int] = []
    named: list[bool] = []
    for start in range(0, pairs, batch_pairs):
        chunk = drawn[start : start + batch_pairs]
        visual = bank.visual([photo for pair in chunk for photo in pair[:2]])
        rolled = rollout(
            teacher,
            prompt,
            visual,
            group_size=group_size,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            generator=generator,
        )
        lengths += rolled.mask.sum(-1).flatten().tolist()
        for row, (first, second, same) in enumerate(chunk):
            for g, text in enumerate(rolled.texts[row]):
                verdict = parse_verdict(text, domain)
                valid[start + row, g] = verdict.valid
                right[start + row, g] = verdict.valid and verdict.same == same
                yes[start + row, g] = bool(verdict.same)
                if verdict.fields:
                    named += _values_right(verdict.fields, domain, bank, (first, second))
    truth = np.array([same for _, _, same in drawn])
    return Examination(
        pairs=pairs,
        rollouts=group_size,
        valid_json=valid.mean(),
        verdict_accuracy=right.mean(),
        accuracy_same=right[truth].mean(),
        accuracy_different=right[~truth].mean(),
        mixed_groups=float((right.any(1) & ~right.all(1)).mean()),
        yes_auc=float(roc_auc_score(truth, yes.mean(1))),
        completion_length=float(np.mean(lengths)),
        attributes_right=float(np.mean(named)) if named else float("nan"),
    )


@dataclass(frozen=True)
class AlignmentExamination:
    """How a teacher judges texts about photos, fractions 0..1.

    Attributes:
        photos: number of photos.
        own_over_edited: share of photos whose own title scores higher than itself with one value exchanged (0.5 where
            no title names a value).
        own_over_other: share whose own title scores higher than the title of an item with other attributes.
        auc: area under the ROC curve of own titles against both kinds of false ones.
        accuracy: share of right answers at a score of one half, own titles and false ones weighing the same.
    """

    photos: int
    own_over_edited: float
    own_over_other: float
    auc: float
    accuracy: float

    def as_dict(self) -> dict[str, float]:
        return {key: round(float(value), 4) for key, value in asdict(self).items()}


def examine_alignment(
    teacher: Teacher,
    bank: PhotoBank,
    *,
    values: dict[str, list[str]],
    photos: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> AlignmentExamination:
    """Scores the bank's titles, right and wrong ones.

    Args:
        teacher: the teacher.
        bank: photos with titles.
        values: values of each attribute that may take another's place.
        photos: photos asked about at most.
        batch_size: photos at once.
        seed: chooses photos and texts.
    """
    rng = np.random.default_rng(seed)
    texts = JudgedTexts(bank.titles, [bank.attributes[c] for c in bank.classes], rng, values, many_wrong=0.0)
    chosen = [int(i) for i in rng.permutation(len(bank.titles)) if bank.titles[i]][:photos]
    aligner = Aligner(teacher, bank.tokens.shape[2])
    asked, edited = [], []
    for photo in chosen:
        wrong = texts.edited(photo)
        other = texts.other_title(photo).text
        edited.append(wrong is not None)
        asked.append([bank.titles[photo] or "", other if wrong is None else wrong.text, other])
    starts = range(0, len(chosen), batch_size)
    parts = [
        aligner.scores(bank.visual(chosen[start : start + batch_size]), asked[start : start + batch_size])
        for start in starts
    ]
    own, changed, other_scores = torch.cat(parts).double().numpy().T
    mask = np.array(edited)
    false = np.concatenate([changed[mask], other_scores])
    truth = np.concatenate([np.ones(len(own)), np.zeros(len(false))])
    return AlignmentExamination(
        photos=len(chosen),
        own_over_edited=float((own > changed)[mask].mean()) if mask.any() else 0.5,
        own_over_other=float((own > other_scores).mean()),
        auc=float(roc_auc_score(truth, np.concatenate([own, false]))),
        accuracy=float(((own > 0.5).mean() + (false < 0.5).mean()) / 2),
    )


def balanced(drawer: PairDrawer, count: int) -> list[tuple[int, int, bool]]:
    """`count` pairs, exactly half of them of one class."""
    same: list[tuple[int, int, bool]] = []
    different: list[tuple[int, int, bool]] = []
    while len(same) < count - count // 2 or len(different) < count // 2:
        pair = drawer.draw()
        (same if pair[2] else different).append(pair)
    mixed = same[: count - count // 2] + different[: count // 2]
    return [mixed[i] for i in drawer.rng.permutation(count)]


def _values_right(fields: dict, domain: Domain, bank: PhotoBank, photos: Sequence[int]) -> list[bool]:
    found = []
    for key, photo in zip(domain.item_keys, photos, strict=True):
        said = fields.get(key)
        truth = bank.attributes[bank.classes[photo]]
        if isinstance(said, dict):
            found += [said.get(name) == value for name, value in truth.items() if name in domain.attributes]
    return found
