"""The report of a run that trains photos and texts: what was watched of it, put into words, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from sentence_transformers import SentenceTransformer

from fieldmark.data.candidates import CandidateSets
from fieldmark.data.captions import Group
from fieldmark.evaluation.examples import Thumbnails
from fieldmark.evaluation.group_results import GroupResults, candidate_health, write_groups
from fieldmark.evaluation.multimodal import MultimodalEvaluation
from fieldmark.evaluation.report import write_report
from fieldmark.evaluation.report_image_text import CandidateExample
from fieldmark.evaluation.uncertainty import Paired, p_text, paired_test
from fieldmark.methods.reporting import FinishedRun, cost, curves, percent
from fieldmark.methods.teacher_groups import score_groups
from fieldmark.students.items import encode_items
from fieldmark.teacher.model import Teacher

SHOWN = ("i2t_recall@1", "t2i_recall@1", "text_score", "image_score", "group_score", "gap_ratio")
COUNTS = ("n_images", "n_texts", "n_groups")
CURVES = {
    "loss": "Loss",
    "loss/contrast": "Contrastive part",
    "loss/preference": "Preference part",
    "tau": "Temperature of the contrast (tau)",
    "beta": "Scale of the preferences (beta)",
    "data_wait_share": "Share of time waiting for data",
}
_EXAMPLES = 8
_BEATEN_EXAMPLES = 3  # of them with another candidate that the teacher scores higher

Scores = Mapping[tuple[int, str], float]


@dataclass
class ImageTextWitness:
    """What only a run itself can see: the teacher, and candidate sets before and after training.

    Attributes:
        groups: the test groups.
        teacher: [G, 2, 2] its scores of their photos and captions.
        sets: the training data.
        to_photos: [N, K + 1] its scores of each anchor's text with the candidates' photos; empty without preferences.
        to_texts: [N, K + 1] of each anchor's photo with the candidates' texts.
        anchors: the examples.
        before: cosines of the untrained student, `text_to_image` and `image_to_text` of each example.
    """

    groups: Sequence[Group]
    teacher: np.ndarray
    sets: CandidateSets
    to_photos: np.ndarray
    to_texts: np.ndarray
    anchors: list[int]
    before: list[tuple[list[float], list[float]]]

    @classmethod
    def watch(
        cls,
        teacher: Teacher,
        student: SentenceTransformer,
        groups: Sequence[Group],
        sets: CandidateSets,
        alignment: Scores | None,
        *,
        path: Path,
        resolution: int | None,
        seed: int,
    ) -> ImageTextWitness:
        """Asks the teacher about the groups, and looks at some candidate sets before training.

        Args:
            teacher: the frozen teacher.
            student: untrained.
            groups: of the test part.
            sets: items and their hard negatives.
            alignment: scores by (photo item, text) of these sets; None without preferences.
            path: the run's file of alignment scores, which those of the groups join.
            resolution: side of the photos.
            seed: chooses the examples.

        Raises:
            FieldmarkError: see `fieldmark.teacher.labels.label_alignment`.
        """
        scores = score_groups(teacher, groups, path, resolution)
        to_photos, to_texts = set_scores(sets, alignment) if alignment is not None else (np.zeros((0, 0)),) * 2
        anchors = _chosen(to_photos, seed)
        return cls(groups, scores, sets, to_photos, to_texts, anchors, set_cosines(student, sets, anchors))

    def examples(self, student: SentenceTransformer) -> list[CandidateExample]:
        """The examples, the trained student's cosines beside the untrained one's."""
        after = set_cosines(student, self.sets, self.anchors)
        rows = [_items(self.sets, anchor) for anchor in self.anchors]
        order = list(dict.fromkeys(item for row in rows for item in row))
        photos = Thumbnails(datasets.Dataset.from_dict({"image": [self.sets.photos[item] for item in order]}))
        place = {item: i for i, item in enumerate(order)}
        return [
            CandidateExample(
                photos=[photos[place[item]] for item in row],
                texts=[self.sets.texts[item][0] for item in row],
                text_to_image={"teacher": self.to_photos[anchor].tolist(), "before": old[0], "after": new[0]},
                image_to_text={"teacher": self.to_texts[anchor].tolist(), "before": old[1], "after": new[1]},
            )
            for anchor, row, old, new in zip(self.anchors, rows, self.before, after, strict=True)
        ]

    def results(self, before: MultimodalEvaluation, after: MultimodalEvaluation) -> GroupResults | None:
        """What each group scored; None without groups."""
        if not self.groups:
            return None
        captions = [(group.caption_0, group.caption_1) for group in self.groups]
        categories = [group.category for group in self.groups]
        return GroupResults(captions, categories, self.teacher, before.groups, after.groups)


def set_scores(sets: CandidateSets, alignment: Scores) -> tuple[np.ndarray, np.ndarray]:
    """[N, K + 1] twice: each anchor's text with its candidates' photos, its photo with their texts (the first ones)."""
    rows = [_items(sets, anchor) for anchor in range(len(sets.photos))]
    first = [own[0] for own in sets.texts]
    return (
        np.array([[alignment[item, first[row[0]]] for item in row] for row in rows]),
        np.array([[alignment[row[0], first[item]] for item in row] for row in rows]),
    )


def set_cosines(
    student: SentenceTransformer, sets: CandidateSets, anchors: Sequence[int]
) -> list[tuple[list[float], list[float]]]:
    """The student's cosines of some candidate sets, in the order of `set_scores`."""
    rows = [_items(sets, anchor) for anchor in anchors]
    items = list(dict.fromkeys(item for row in rows for item in row))
    if not items:
        return []
    photos = dict(zip(items, encode_items(student, images=[sets.photos[item] for item in items]), strict=True))
    texts = dict(zip(items, encode_items(student, texts=[sets.texts[item][0] for item in items]), strict=True))
    return [
        (
            [float(texts[row[0]] @ photos[item]) for item in row],
            [float(photos[row[0]] @ texts[item]) for item in row],
        )
        for row in rows
    ]


def write_image_text_report(
    out: Path,
    student: SentenceTransformer,
    train: datasets.Dataset,
    before: MultimodalEvaluation,
    after: MultimodalEvaluation,
    witness: ImageTextWitness,
) -> None:
    """Writes `groups.parquet` and `report.html` of a run that has ended.

    Args:
        out: its folder.
        student: trained.
        train: the rows that were trained on.
        before: the untrained student on the test part.
        after: the trained one.
        witness: of this run.
    """
    results = witness.results(before, after)
    if results is not None:
        write_groups(out, results)
    run = FinishedRun.read(out)
    name = "MAPLE" if run.settings["preference"] != "none" else "contrast"
    write_report(
        out / "report.html",
        title=f"{name if name == 'MAPLE' else 'MAPLE without preferences'} on {run.settings['data']}",
        subtitle=summary(run, train, results),
        table=[{"model": who, **cells(run.metrics, when)} for who, when in (("untrained", "before"), (name, "after"))],
        notes=notes(results),
        curves=curves({name: [run.log]}, CURVES),
        categories={} if results is None else by_category(results),
        groups=results,
        gaps={when: one.gap for when, one in (("before", before), ("after", after)) if one.gap is not None},
        candidates=witness.examples(student),
        health=health(witness),
        settings=run.settings,
        cost=cost({name: [run]}),
    )


def summary(run: FinishedRun, train: datasets.Dataset, results: GroupResults | None) -> str:
    """What was trained on what, how, and what came out, in words."""
    settings, before, after = run.settings, run.metrics["before"], run.metrics["after"]
    steps = max((record["step"] for record in run.log), default=0)
    texts = "comparative captions" if settings["captions"] else "titles"
    sentences = [
        f"{student_words(settings)} was trained on {len(set(train['image'])):,} photos and their {texts} from "
        f"{settings['data']} with {training_words(settings)}: {steps:,} optimizer steps, seed {run.metrics['seed']}.",
        f"It was measured on {after['n_images']:,} photos and {after['n_texts']:,} titles that it had not been trained "
        f"on: of the photos, {percent(before['i2t_recall@1'])} % found a title of theirs first before and "
        f"{percent(after['i2t_recall@1'])} % after training (R@1), of the titles {percent(before['t2i_recall@1'])} and "
        f"{percent(after['t2i_recall@1'])} % a photo.",
    ]
    if results is not None:
        old, new = (run.metrics["intervals"][when]["group_score"] for when in ("before", "after"))
        sentences.append(
            f"Of {after['n_groups']:,} groups of two like photos and two captions, it told "
            f"{percent(before['group_score'])} % ({_range(old)}) fully apart before and "
            f"{percent(after['group_score'])} % ({_range(new)}) after, in brackets 95 % intervals; text score "
            f"{percent(before['text_score'])} to {percent(after['text_score'])} %, image score "
            f"{percent(before['image_score'])} to {percent(after['image_score'])} %."
        )
        if "gap_ratio" in after:  # one group alone has none
            sentences.append(
                f"The modality gap went from {before['gap_ratio']:.2f} to {after['gap_ratio']:.2f} (lower is better)."
            )
    return " ".join(sentences)


def student_words(settings: Mapping[str, Any]) -> str:
    """The student in words: what it is made of, and what of it is trained."""
    source = Path(str(settings["student"] or settings["teacher"]))
    name = "the embedded teacher" if source.parts[-2:] == ("teacher", "embedded") else source.name
    rank = settings["lora_rank"]
    adapters = f"LoRA of rank {rank}" if rank else "trained as a whole"
    if settings["student_kind"] == "dual":
        return f"A dual encoder ({name}, {adapters})"
    pooling = "mean pooling" if settings["pooling"] == "mean" else "its last token"
    how = f"{settings['attention']} attention, {pooling}, {adapters}"
    return f"An embedder (the language model and tower of {name}, {how})"


def training_words(settings: Mapping[str, Any]) -> str:
    """The loss in words."""
    candidates = f"{settings['negatives']} hard candidates an anchor"
    negatives = (
        "these also as negatives of all" if settings["expanded"] and settings["negatives"] else "in-batch negatives"
    )
    if settings["preference"] == "none":
        return f"contrast alone ({candidates}, {negatives})"
    return (
        f"MAPLE ({settings['preference']} preferences of a frozen multimodal teacher at weight "
        f"{settings['preference_weight']:g} beside contrast; {candidates}, {negatives})"
    )


def cells(metrics: Mapping[str, Any], when: str) -> dict[str, Any]:
    """The table's numbers of one measurement, with intervals where they are known."""
    values, intervals = metrics[when], metrics["intervals"][when]
    found = {key: {"value": values[key], "interval": intervals.get(key)} for key in SHOWN if key in values}
    return found | {key: values[key] for key in COUNTS if key in values}


def notes(results: GroupResults | None) -> list[str]:
    """Groups one by one, before against after; how the teacher does on them; how far the student orders as it does."""
    if results is None:
        return ["The test part gave no groups of photos that differ in one attribute; give some with --groups."]
    told = []
    before, after = results.hits("before"), results.hits("after")
    for key, name in (("image_score", "image score"), ("group_score", "group score")):
        paired = paired_test(after[key], before[key])
        told.append(told_of_pairs(name, paired, "the trained student", "the untrained one"))
    own = {key: percent(float(hits.mean())) for key, hits in results.hits("teacher").items()}
    told.append(
        f"The teacher itself: text score {own['text_score']}, image score {own['image_score']}, group score "
        f"{own['group_score']} %."
    )
    old, new = results.correlation("before"), results.correlation("after")
    if old is not None and new is not None:
        told.append(
            f"The student's cosines follow the teacher's scores with a rank correlation of {old:.2f} before and "
            f"{new:.2f} after training."
        )
    return told


def told_of_pairs(score: str, paired: Paired, first: str, second: str) -> str:
    """A paired test over groups as a sentence."""
    return (
        f"On {score}, against {second}, {first} is better on {paired.better:,} groups, worse on {paired.worse:,}, "
        f"equal on {paired.same:,} ({p_text(paired.p_value)})."
    )


def by_category(results: GroupResults) -> dict[str, Any]:
    """Group scores of each category: the teacher's, and the student's before and after."""
    names = {"teacher": "Teacher", "before": "Untrained", "after": "Trained"}
    return {name: results.by_category(who) for who, name in names.items()}


def health(witness: ImageTextWitness) -> dict[str, Any]:
    """What the teacher says about the candidate sets, in both directions."""
    facts: dict[str, Any] = {}
    if not len(witness.to_photos):
        return facts
    for name, scores in (("photos for a text", witness.to_photos), ("texts for a photo", witness.to_texts)):
        found = candidate_health(scores)
        facts[f"Own match not first: {name}"] = {
            "value": f"{percent(found['own_beaten'])} %",
            "note": f"of {len(scores):,} anchors, the teacher scores another candidate higher",
        }
        facts[f"Own match ties for first: {name}"] = {
            "value": f"{percent(found['own_tied'])} %",
            "note": "of anchors; another candidate scores the same",
        }
        facts[f"Mean alignment: {name}"] = {
            "value": f"{found['own']:.3f} and {found['others']:.3f}",
            "note": "the anchor's own match, and the other candidates",
        }
    return facts


def _items(sets: CandidateSets, anchor: int) -> list[int]:
    return [anchor, *sets.negatives[anchor].tolist()]


def _chosen(to_photos: np.ndarray, seed: int) -> list[int]:
    """Anchors to show, drawn by seed: most with their own photo first in the teacher's order, some without."""
    if not len(to_photos):
        return []
    order = np.random.default_rng(seed).permutation(len(to_photos))
    beaten = np.asarray((to_photos[:, 1:] > to_photos[:, :1]).any(axis=1))[order]
    unlike, like = order[beaten].tolist(), order[~beaten].tolist()
    few = unlike[: max(_BEATEN_EXAMPLES, _EXAMPLES - len(like))]
    return [*like[: _EXAMPLES - len(few)], *few]


def _range(bounds: Sequence[float]) -> str:
    return f"{percent(bounds[0])}–{percent(bounds[1])}"
